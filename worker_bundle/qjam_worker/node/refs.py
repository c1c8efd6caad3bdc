"""Refs on a node: asked for on disk and at the master, received block by block, handed to who needs them."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterable, Sequence
from typing import Any, Callable, Optional, Protocol

import msgpack

from qjam_worker.ipc.files import NoRoom
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.messages import MAX_REASON
from qjam_worker.wire.refs import ARGUMENT, PARAMS, SLICE, Ref, of_slice

from .call_service import CallService
from .commands import Command
from .disk_cache import DiskCache, default_folder
from .disk_cache_threads import DiskCacheThreads
from .module_cache import ModuleCache
from .pool import Pool
from .scheduler import Scheduler
from .store import Store


class Send(Protocol):
    """Sends a message to the master."""

    def __call__(self, kind: Kind, header: dict[str, Any], buffers: Sequence[Any] = ()) -> None: ...


class RefReceiver:
    """Receives refs for the scheduler. `act` carries out the commands that follow."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        calls: CallService,
        modules: ModuleCache,
        pool: Pool,
        send: Send,
        act: Callable[[Iterable[Command]], None],
    ) -> None:
        self._store, self._scheduler, self._calls, self._modules = store, scheduler, calls, modules
        self._pool = pool
        self._send, self._act = send, act
        self.disk_cache: Optional[DiskCacheThreads] = None
        self._released: set[Ref] = set()  # to be removed as soon as they are on disk

    # From the master

    def on_refs(self, header: dict[str, Any], buffers: list[Any]) -> None:
        """A block of a ref, or the word that the ref will not come."""
        ref = Ref(*header["ref"])
        if header.get("gone"):
            self._modules.refuse(ref)
            if ref not in self._store:  # it must not be completed with the bytes of other data
                self._store.drop(ref)
            self._act(self._scheduler.on_gone(ref))
            return
        data = [memoryview(buffer).cast("B") for buffer in buffers]
        if self._is_expected(ref, header["offset"], data):
            self._write(ref, header["offset"], header["total"], data)
        self._send(Kind.CREDIT, {"bytes": sum(map(len, data))})
        if ref not in self._store:
            return
        if ref.kind == ARGUMENT:
            self._calls.on_arrived(ref)
            return
        if self.disk_cache is not None and ref.kind == SLICE:
            self.disk_cache.keep(ref.key, self._store.path(ref), self._store.size(ref))
        self._act(self._scheduler.on_arrived(ref, time.monotonic()))
        if self.disk_cache is not None and not self._scheduler.wants:
            self.disk_cache.write()
        if ref in self._modules:
            module = msgpack.unpackb(self._store.read(ref), unicode_errors="surrogatepass")
            self._store.drop(ref)
            self._modules.arrived(ref, module)

    def _is_expected(self, ref: Ref, offset: int, data: list[memoryview]) -> bool:
        """Whether the node needs this block. ValueError when no round can have asked for one like it."""
        if not any(data):
            raise ValueError(f"a block of {ref} is empty")
        here = self._store.have(ref)
        if ref in self._scheduler.wants or (ref.kind == ARGUMENT and self._calls.expects(ref)):
            if offset > here:
                raise ValueError(f"the bytes of {ref} from {here} on are lacking; a block begins at {offset}")
            return True
        if here or self._scheduler.named(ref):  # a round that is over has asked, and another one may
            return offset <= here
        if ref.kind != PARAMS:  # else its round has ended here, which the master did not know
            raise ValueError(f"{ref} was never asked for")
        return False

    def _write(self, ref: Ref, offset: int, total: int, data: list[memoryview]) -> None:
        dropped: list[str] = []
        try:
            for piece in data:
                dropped += self._store.write(ref, offset, total, piece)
                offset += len(piece)
        except NoRoom as error:
            for number in self._scheduler.wanting(ref):
                self._act(self._scheduler.on_no_room(number, str(error), time.monotonic()))
            self._calls.on_no_room(ref, str(error))
            self._modules.refuse(ref)
        if dropped:
            self._pool.tell_all({"op": "drop", "paths": dropped})

    def drop(self, refs: Iterable[Ref]) -> None:
        """Remove refs, and the maps that workers have of them; what is still to be kept on disk, when it is there."""
        self._released.update(refs)
        self._drop_released()

    def _drop_released(self) -> None:
        waiting = set() if self.disk_cache is None else self.disk_cache.waiting
        dropped = []
        for ref in [ref for ref in self._released if ref.key not in waiting]:
            self._released.discard(ref)
            if self._scheduler.named(ref) or self._calls.expects(ref):
                continue  # it has come again
            if self._store.have(ref):
                dropped.append(self._store.path(ref))
            self._store.drop(ref)
            if self.disk_cache is not None and ref.kind == SLICE:
                self.disk_cache.release(ref.key)
        if dropped:
            self._pool.tell_all({"op": "drop", "paths": dropped})

    # On disk

    def keep_slices(self, quota: int, selector: selectors.BaseSelector) -> None:
        """Keep slices on disk from now on. If that cannot be, the user is told, and the node works without."""
        try:
            self.disk_cache = DiskCacheThreads(DiskCache(default_folder(), quota), self._store.limit // 2)
        except OSError as error:
            self._note(f"slices are not kept (keep_data): {error}")
        else:
            selector.register(self.disk_cache, selectors.EVENT_READ, self._on_found)

    def ask(self, number: Optional[int], wanted: list[list[Any]]) -> None:
        """Ask the master for what a round lacks; slices are looked for on disk first."""
        if self.disk_cache is not None:
            look = self.disk_cache.look
            wanted = [
                [ref, have, end] for ref, have, end in wanted if have or ref.kind != SLICE or not look(ref.key, number)
            ]
        if wanted:
            self._send(Kind.GET, {"round": number, "refs": wanted})

    def _on_found(self) -> None:
        assert self.disk_cache is not None
        lacking: dict[Optional[int], list[list[Any]]] = {}
        for key, number, path, size in self.disk_cache.found():
            ref = of_slice(key)
            if not self._scheduler.named(ref):  # it was released meanwhile
                self.disk_cache.release(key)
            elif path is not None and ref not in self._store:
                self._store.adopt(ref, path, size)
                self._act(self._scheduler.on_arrived(ref, time.monotonic()))
            elif path is None and ref in self._scheduler.wants:
                lacking.setdefault(number, []).append([ref, self._store.have(ref), None])
        for number, wanted in lacking.items():
            self._send(Kind.GET, {"round": number, "refs": wanted})
        self._drop_released()
        self._pass_on_notes(self.disk_cache)

    def _pass_on_notes(self, disk_cache: DiskCacheThreads) -> None:
        while not disk_cache.notes.empty():
            self._note(disk_cache.notes.get())

    def _note(self, text: str) -> None:
        self._send(Kind.STATE, {"state": "note", "text": text[:MAX_REASON]})

    def close(self, selector: selectors.BaseSelector) -> None:
        """End the threads of the disk cache; what they say counts."""
        if self.disk_cache is not None:
            selector.unregister(self.disk_cache)
            self.disk_cache.close()
            self._pass_on_notes(self.disk_cache)
