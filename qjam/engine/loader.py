"""Loads refs to be sent, in a thread of its own: a data set may run user code, and the loop never does."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from qjam_worker.values import codec, flat
from qjam_worker.wire.frames import SMALL
from qjam_worker.wire.refs import ARGUMENT, CODE, MODULE, PARAMS, Ref, module_name
from qjam_worker.wire.transfers import BLOCK_BYTES

from .pending import Pending

STOP_TIMEOUT = 5.0  # seconds
# Bytes that are copied and then hashed at a time: few enough that they are in the processor's cache still.
PIECE = 256 * 1024
# Blocks that are kept to be used again: as many as one node accepts at a time.
BUFFERS = 4


class Changed(RuntimeError):
    """A slice is not what it was when it was hashed."""


class Blob:
    """The flat form of a value, in pieces; the large ones are still in the user's memory."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = [memoryview(piece).cast("B") for piece in pieces]
        self._starts = [0, *accumulate(len(piece) for piece in self._pieces)]
        self.size = self._starts[-1]

    def range(self, offset: int, size: int) -> list[memoryview]:
        """The bytes [offset, offset + size) as views."""
        end = offset + size
        return [
            piece[max(0, offset - start) : end - start]
            for start, piece in zip(self._starts, self._pieces, strict=False)
            if start < end and start + len(piece) > offset
        ]


class Scratch:
    """Memory for blocks on their way, used again as soon as nobody refers to it: fresh memory costs page faults, which
    take longer than copying and hashing together.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[npt.NDArray[np.uint8], weakref.ref[Any]]] = []

    def take(self, size: int) -> memoryview:
        """So many bytes, which are free again when all views of them are gone."""
        if not SMALL < size <= BLOCK_BYTES:
            return np.empty(size, np.uint8).data
        place = next((place for place, (_, used) in enumerate(self._buffers) if used() is None), None)
        buffer = np.empty(BLOCK_BYTES, np.uint8) if place is None else self._buffers[place][0]
        view = buffer[:size]
        if place is not None:
            self._buffers[place] = buffer, weakref.ref(view)
        elif len(self._buffers) < BUFFERS:
            self._buffers.append((buffer, weakref.ref(view)))
        return view.data


class HashedBlob(Blob):
    """A slice. What is sent of it is copied, and the copy is hashed: no host ever has other bytes under a hash than
    those that were hashed, whatever user code writes meanwhile.
    """

    def __init__(self, pieces: list[Any], content_hash: str, refs: Sequence[str], scratch: Scratch) -> None:
        import xxhash  # here, for user modules that import qjam are loaded on hosts that lack it

        super().__init__(pieces)
        self._wanted, self._refs, self._scratch = content_hash, refs, scratch
        self._content = xxhash.xxh3_128()
        self._hashed = 0  # bytes

    def range(self, offset: int, size: int) -> list[memoryview]:
        """A copy of these bytes. Raises Changed in place of the last ones if any have changed."""
        if offset != self._hashed:  # the node has some from before
            self._content.reset()
            for view in super().range(0, offset):
                self._content.update(view)
        copy, end = self._scratch.take(size), 0
        for view in super().range(offset, size):
            for start in range(0, len(view), PIECE):
                begin, end = end, min(end + PIECE, end + len(view) - start)
                copy[begin:end] = view[start : start + PIECE]
                self._content.update(copy[begin:end])
        self._hashed = offset + size
        if self._hashed == self.size and self._content.hexdigest() != self._wanted:
            index = self._refs.index(self._wanted)
            raise Changed(f"slice {index} of the data set changed since it was hashed: make a new DataSet")
        return [copy]


class Loader:
    """A thread that loads one ref after the other, and calls back when it has."""

    def __init__(self, find_module: Callable[[str], bytes]) -> None:
        self._find_module = find_module
        self.arguments: dict[str, Any] = {}  # large parts of the arguments of calls, by key
        self._scratch = Scratch()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="qjam-load", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def load(
        self, ref: Ref, pending: Pending | None, done: Callable[[Blob], None], failed: Callable[[BaseException], None]
    ) -> None:
        """Load a ref of the round `pending`, then call `done` with its content, or `failed`; in the thread."""

        def task() -> None:
            try:
                blob = self._blob(ref, pending)
            except BaseException as error:  # noqa: BLE001  user code: a data set's slice(), which may even sys.exit()
                failed(error)
            else:
                done(blob)

        self._tasks.put(task)

    def stop(self) -> None:
        """End the thread when its tasks are done; one that hangs in user code is left behind."""
        self._tasks.put(None)
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # and with it the slice

    def _blob(self, ref: Ref, pending: Pending | None) -> Blob:
        if ref.kind == MODULE:
            return Blob([self._find_module(module_name(ref))])
        if ref.kind == ARGUMENT:
            return Blob([self.arguments[ref.key]])
        if pending is None:
            raise LookupError(f"{ref} is of a round that is over")
        if ref.kind == PARAMS:
            return Blob(flat.pieces(pending.params))
        if ref.kind == CODE and pending.code is not None:
            return Blob([pending.code])
        assert pending.dataset is not None
        pieces = flat.pieces(codec.encode(pending.dataset.slice_from_hash(ref.key), lasting=True))
        return HashedBlob(pieces, ref.key, pending.spec.refs or (ref.key,), self._scratch)
