"""The node of one host: takes work from the master, gives it to the workers over shared memory, sends roots back.

It never runs user code and never unpickles, so it answers whatever a task does.
"""

from __future__ import annotations

import os
import selectors
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Callable, Optional, Union

import msgpack
import numpy as np
import zmq

from qjam_worker.ipc.file_slices import FileSlice
from qjam_worker.ipc.files import Files, NoRoom, map_file, remove
from qjam_worker.ipc.slots import result_prefix
from qjam_worker.ipc.spin_wait import SpinWait
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import PARAMS, SLICE, Ref, of_params, of_slice
from qjam_worker.wire.sockets import LIVENESS, Dealer, Uplink

from .disk_cache import DiskCache, default_folder
from .disk_cache_threads import DiskCacheThreads
from .fork_server_client import ForkServer
from .module_cache import ModuleCache
from .params import ParamsLocations
from .pool import Pool, WorkerHandle
from .results import Held
from .rounds import Fold, NodeJob
from .scheduler import Command, Ended, Forget, Give, Interrupt, Scheduler, Tell, refusal
from .slice_index import SliceIndex
from .store import Store

# Bytes of refs that may be on their way to a node: four chunks keep a link busy, and bound the memory they take.
CREDIT = 16 * 1024 * 1024
# Bytes of printed text on their way to the master; beyond it print() waits, as on a slow terminal.
PRINT_CREDIT = 1024 * 1024
# Characters of the reason for leaving that the master is told.
MAX_REASON = 8192
# The share of the host's memory that slices may take before the least recently used ones go.
STORE_SHARE = 0.5
# What ZeroMQ tells of a link that was up and is no more, or that the master refuses.
BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class Node:
    """`run` serves the master at the other end of `uplink` until it says BYE, or `leave` is called from `watch`.

    `selector` is that of the loop which the node lives in, where it has none of its own: what is registered there has
    what to call as its data. `watch` maps file descriptors to functions that are called when they are readable.
    `paths` are folders in which the workers find packages before they look where their python does. `warm` is a parent
    of workers that has been forked already. `memory_limit`: bytes that each worker may take for itself. `keep_data`:
    bytes of slices that may be kept on disk; None for none.
    """

    def __init__(
        self,
        uplink: Uplink,
        workers: int,
        *,
        selector: Optional[selectors.BaseSelector] = None,
        bases: Optional[Iterable[str]] = None,
        watch: Optional[dict[int, Callable[[], None]]] = None,
        paths: Sequence[str] = (),
        warm: Optional[ForkServer] = None,
        memory_limit: Optional[int] = None,
        keep_data: Optional[int] = None,
    ) -> None:
        self.uplink = uplink
        self.leaving: Optional[str] = None
        # What was on its way over a broken link is lost, and nobody can tell what that was.
        uplink.on_broken = lambda: self.leave("its link to the master broke")
        self.keep_data = keep_data
        self.disk_cache: Optional[DiskCacheThreads] = None
        self.selector = selectors.DefaultSelector() if selector is None else selector
        self.waiting = SpinWait(self.selector)
        self.files = Files.make(bases) if warm is None else warm.files
        self.locks = self.files.lock() if warm is None else warm.locks
        try:
            self._prepare(workers, watch or {}, paths, warm, memory_limit)
        except BaseException:
            self._remove_files()
            raise

    def _prepare(
        self,
        workers: int,
        watch: dict[int, Callable[[], None]],
        paths: Sequence[str],
        warm: Optional[ForkServer],
        memory_limit: Optional[int],
    ) -> None:
        for fd, call in watch.items():
            self.selector.register(fd, selectors.EVENT_READ, call)
        for file, stir in self.uplink.files():
            self.selector.register(file, selectors.EVENT_READ, stir)
        self.pool = Pool(workers, self.files, self.selector, self, paths, warm, memory_limit)
        self.store = Store(self.files, int(_memory() * STORE_SHARE))
        self.slices = SliceIndex(self.store)
        self.scheduler = Scheduler(workers, self.slices)
        self.params = ParamsLocations(self.files, self.store)
        self.imports = ModuleCache(self.pool)
        self.print_credit = PRINT_CREDIT
        self.made = 0
        self.commands: deque[Command] = deque()
        self.acting = False
        self.perform: dict[type, Callable[[Any], None]] = {
            Tell: self._tell,
            Give: self._give,
            Interrupt: lambda command: self.pool.interrupt(self.pool.workers[command.worker], time.monotonic()),
            Forget: self._forget,
            Ended: lambda command: self.params.release(command.round),
        }
        self.answers: dict[str, Callable[[WorkerHandle, dict[str, Any], float], list[Command]]] = {
            "done": self._on_done,
            "error": lambda worker, message, now: self.scheduler.on_error(worker.index, message, now),
            "cancelled": lambda worker, message, now: self.scheduler.on_cancelled(worker.index, now),
        }
        self.handlers: dict[Kind, Callable[[dict[str, Any], list[Any]], None]] = {
            Kind.WELCOME: lambda header, buffers: self.act(self.scheduler.on_welcome(header)),
            Kind.JOB: self.on_job,
            Kind.TASK: self.on_task,
            Kind.SHARE: lambda header, buffers: self.act(self.scheduler.on_share(header, time.monotonic())),
            Kind.REFS: self.on_refs,
            Kind.CREDIT: self.on_credit,
            Kind.CANCEL: lambda header, buffers: self.act(self.scheduler.on_cancel(header, time.monotonic())),
            Kind.PING: lambda header, buffers: self.send(Kind.PONG, {"t": header["t"]}),
            Kind.BYE: lambda header, buffers: self.leave(header["reason"]),
        }

    @classmethod
    def connect(
        cls,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        name: str,
        workers: int,
        *,
        keys: Optional[dict[str, str]] = None,
        bases: Optional[Iterable[str]] = None,
        watch: Optional[dict[int, Callable[[], None]]] = None,
        paths: Sequence[str] = (),
        warm: Optional[ForkServer] = None,
        memory_limit: Optional[int] = None,
        keep_data: Optional[int] = None,
    ) -> Node:
        """A node with an uplink to the master's ROUTER at `endpoint`, which will know it as `name`.

        `keys` are the Z85 texts of the master's public CURVE key and of this node's own pair: server, public, secret.
        Without them the link is not encrypted, and a link that breaks is not the end of the node.
        """
        uplink = context.socket(zmq.DEALER)
        uplink.setsockopt(zmq.ROUTING_ID, name.encode())
        uplink.setsockopt(zmq.LINGER, 1000)
        for option in (zmq.SNDHWM, zmq.RCVHWM):
            uplink.setsockopt(option, 0)  # what may be on its way is bounded by credit, in bytes
        if keys is not None:
            uplink.setsockopt(zmq.IPV6, 1)
            uplink.setsockopt(zmq.CURVE_SERVERKEY, keys["server"].encode())
            uplink.setsockopt(zmq.CURVE_PUBLICKEY, keys["public"].encode())
            uplink.setsockopt(zmq.CURVE_SECRETKEY, keys["secret"].encode())
            for sign, value in LIVENESS:
                uplink.setsockopt(sign, value)
        dealer = Dealer(uplink, None if keys is None else uplink.get_monitor_socket(BROKEN))
        uplink.connect(endpoint)
        return cls(
            dealer,
            workers,
            bases=bases,
            watch=watch,
            paths=paths,
            warm=warm,
            memory_limit=memory_limit,
            keep_data=keep_data,
        )

    def leave(self, reason: str) -> None:
        self.leaving = reason[:MAX_REASON]

    def start(self) -> None:
        """Start the workers and report to the master."""
        self.pool.start()
        self._hello()
        if self.keep_data is not None:
            self._keep(self.keep_data)

    def run(self) -> None:
        """Serve until it is time to leave. For a node with a process of its own."""
        np.seterr(all="ignore")  # folding must not warn
        try:
            self.start()
            while self.receive():
                self.poll(None)
        finally:
            self.close()

    def poll(self, timeout: Optional[float]) -> None:
        """Wait for events, `timeout` seconds at most, and handle them. The uplink is `receive`'s: call that first."""
        deadline = self.next_deadline()
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            timeout = left if timeout is None else min(timeout, left)
        events = self.waiting.select(timeout, next(iter(self.scheduler.rounds), None))
        for key, _ in events:
            key.data()
        if deadline is not None:
            self.on_timer(time.monotonic())

    def on_timer(self, now: float) -> None:
        """Do what is due."""
        self.pool.on_timer(now)
        self.act(self.scheduler.on_timer(now))

    def next_deadline(self) -> Optional[float]:
        """When `on_timer` is due, by time.monotonic(), in seconds."""
        kill, check = self.pool.next_deadline(), self.scheduler.next_deadline()
        if kill is None or check is None:
            return check if kill is None else kill
        return min(kill, check)

    def close(self) -> None:
        """Stop the workers, remove the files, say BYE."""
        if self.disk_cache is not None:
            self.selector.unregister(self.disk_cache)
            self.disk_cache.close()  # first: the files that it still copies from go with the workers' parent
            self._pass_on_notes(self.disk_cache)
        self.pool.close()
        self.selector.close()
        self._forget_files()
        self._remove_files()
        self.send(Kind.BYE, {"reason": self.leaving or "the node failed"})
        self.uplink.close()

    def _remove_files(self) -> None:
        self.files.remove()
        for lock in self.locks:
            os.close(lock)
        self.locks = []

    def _forget_files(self) -> None:
        """Let go of every mapping now: the files are removed, but their memory lasts as long as somebody maps it."""
        self.store.clear()
        self.scheduler.rounds.clear()
        self.params.clear()

    # The uplink

    def send(self, kind: Kind, header: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        self.uplink.send(kind, header, buffers)

    def _hello(self) -> None:
        self.send(Kind.HELLO, {"workers": len(self.pool.workers), "credit": CREDIT})

    def receive(self) -> bool:
        """Take what the master has sent; False when it is time to leave, as it is when that cannot be meant."""
        try:
            while self.leaving is None and (message := self.uplink.receive()) is not None:
                if message.kind not in self.handlers:
                    raise ValueError(f"{message.kind.name} is for the master")
                self.handlers[message.kind](message.header, message.buffers)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, the master hears of it
            self.leave(f"it was sent what it does not understand: {type(error).__name__}: {error}")
        return self.leaving is None

    # Jobs and rounds

    def act(self, commands: Iterable[Command]) -> None:
        """Carry out what was decided, in that order: what follows from carrying it out comes after the rest."""
        self.commands.extend(commands)
        if self.acting or not self.commands:
            return
        self.acting = True
        try:
            while self.commands:
                command = self.commands.popleft()
                self.perform[type(command)](command)
        finally:
            self.acting = False
        self.pool.wake()

    def on_job(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.imports.begin(header["entry"]["epoch"])
        commands = self.scheduler.on_job(header)
        if "file" in header:
            self.slices.learn(header["job"], header["file"], self.scheduler.jobs[header["job"]].refs)
        self.act(commands)

    def _forget(self, command: Forget) -> None:
        self.slices.forget(command.job)
        for worker in self.pool.workers:
            if command.job in worker.jobs:
                worker.jobs.discard(command.job)
                self.pool.tell(worker, {"op": "forget", "job": command.job})

    def on_task(self, header: dict[str, Any], buffers: list[Any]) -> None:
        number = header["round"]
        if number not in self.scheduler.rounds:
            if header["params"] == "have":
                return  # given up here, which the master does not know yet
            ref = of_params(number) if header["params"] == "ref" else None
            try:
                self.params.keep(number, ref, buffers)
            except NoRoom as error:
                self.act([refusal(number, str(error))])
                return
        self.act(self.scheduler.on_task(header, time.monotonic()))

    # Refs

    def on_refs(self, header: dict[str, Any], buffers: list[Any]) -> None:
        ref = Ref(*header["ref"])
        if header.get("gone"):
            self._on_gone(ref)
            return
        data = [memoryview(buffer).cast("B") for buffer in buffers]
        if self._is_expected(ref, header["offset"], data):
            self._write(ref, header["offset"], header["total"], data)
        self.send(Kind.CREDIT, {"bytes": sum(map(len, data))})
        if ref not in self.store:
            return
        if self.disk_cache is not None and ref.kind == SLICE:
            self.disk_cache.keep(ref.key, self.store.path(ref), self.store.size(ref))
        self.act(self.scheduler.on_arrived(ref, time.monotonic()))
        if self.disk_cache is not None and not self.scheduler.asked:
            self.disk_cache.write()
        if ref in self.imports:
            self._on_module(ref)

    def _is_expected(self, ref: Ref, offset: int, data: list[memoryview]) -> bool:
        """Whether a chunk is of use. ValueError when none like it can have been asked for."""
        if not any(data):
            raise ValueError(f"a chunk of {ref} is empty")
        here = self.store.have(ref)
        if ref in self.scheduler.asked:
            if offset > here:
                raise ValueError(f"the bytes of {ref} from {here} on are lacking; a chunk begins at {offset}")
            return True
        if here or self.scheduler.named(ref):  # a round that is over has asked, and another one may
            return offset <= here
        if ref.kind != PARAMS:  # else its round has ended here, which the master did not know
            raise ValueError(f"{ref} was never asked for")
        return False

    def _on_gone(self, ref: Ref) -> None:
        self.imports.refuse(ref)
        self.act(self.scheduler.on_gone(ref))

    def _write(self, ref: Ref, offset: int, total: int, data: list[memoryview]) -> None:
        dropped: list[str] = []
        try:
            for piece in data:
                dropped += self.store.write(ref, offset, total, piece)
                offset += len(piece)
        except NoRoom as error:
            for number in self.scheduler.wanting(ref):
                self.act(self.scheduler.on_no_room(number, str(error), time.monotonic()))
            self.imports.refuse(ref)
        if dropped:
            for worker in self.pool.workers:
                self.pool.tell(worker, {"op": "drop", "paths": dropped})

    def _on_module(self, ref: Ref) -> None:
        module = msgpack.unpackb(self.store.read(ref), unicode_errors="surrogatepass")
        self.store.drop(ref)
        self.imports.arrived(ref, module)

    # Slices on disk

    def _keep(self, quota: int) -> None:
        """From now on. Where that cannot be, the user is told, and all goes on as it would without."""
        try:
            self.disk_cache = DiskCacheThreads(DiskCache(default_folder(), quota), self.store.limit // 2)
        except OSError as error:
            self._say(f"slices are not kept (keep_data): {error}")
        else:
            self.selector.register(self.disk_cache, selectors.EVENT_READ, self._on_kept)

    def _say(self, text: str) -> None:
        self.send(Kind.STATE, {"state": "note", "text": text[:MAX_REASON]})

    def _tell(self, command: Tell) -> None:
        """Say it to the master; slices that are lacking are looked for on disk first."""
        kind, header, buffers = command
        if self.disk_cache is not None and header.get("state") == "blocked":
            number = header["round"]
            missing = [
                [ref, have]
                for ref, have in header["missing"]
                if have or ref.kind != SLICE or not self.disk_cache.look(ref.key, number)
            ]
            if not missing:
                return
            header = {**header, "missing": missing}
        self.send(kind, header, buffers)

    def _on_kept(self) -> None:
        assert self.disk_cache is not None
        lacking: dict[Optional[int], list[list[Any]]] = {}
        for key, number, path, size in self.disk_cache.found():
            ref = of_slice(key)
            if path is not None and ref not in self.store:
                self.store.adopt(ref, path, size)
                self.act(self.scheduler.on_arrived(ref, time.monotonic()))
            elif path is None and ref in self.scheduler.asked:
                lacking.setdefault(number, []).append([ref, self.store.have(ref)])
        for number, missing in lacking.items():
            self.send(Kind.STATE, {"state": "blocked", "round": number, "missing": missing})
        self._pass_on_notes(self.disk_cache)

    def _pass_on_notes(self, disk_cache: DiskCacheThreads) -> None:
        while not disk_cache.notes.empty():
            self._say(disk_cache.notes.get())

    def on_credit(self, header: dict[str, Any], buffers: list[Any]) -> None:
        if self.print_credit + header["bytes"] > PRINT_CREDIT:
            raise ValueError(f"it may print {header['bytes']} bytes more than it has printed")
        self.print_credit += header["bytes"]
        self.pool.mute(self.print_credit <= 0)

    # Giving out work

    def _give(self, command: Give) -> None:
        index, round_, work = command
        if round_.number not in self.scheduler.rounds:  # given up since this was decided
            self.act(self.scheduler.on_cancelled(index, time.monotonic()))
            return
        worker, job = self.pool.workers[index], round_.job
        message: dict[str, Any] = {"job": job.number}
        if work.fold is None:
            message["op"], message["params"] = "run", self.params.where(round_.number, index)
            message["slices"] = self._slice_places(job, work.slices)
        else:
            try:
                message.update(op="fold", items=self._fold_items(work.fold))
                if work.fold.parts > 1:
                    message.update(part=[work.part, work.fold.parts], out=self._out(work.fold).path)
            except NoRoom as error:
                self.act(self.scheduler.on_failed(index, "room", str(error), time.monotonic()))
                return
        if job.number not in worker.jobs:
            worker.jobs.add(job.number)
            place = None if job.code is None else (self.store.path(job.code), self.store.size(job.code))
            self.pool.tell(
                worker,
                {"op": "job", "job": job.number, "entry": job.entry, "code": place, "nslices": job.nslices},
            )
        self.pool.assign(worker, message)

    def _slice_places(self, job: NodeJob, slices: list[int]) -> list[tuple[int, Union[str, FileSlice, None], int]]:
        if not job.has_data:
            return [(index, None, 0) for index in slices]
        return [(index, *self.slices.where(ref)) for index in slices if (ref := job.refs[index]) is not None]

    def _out(self, fold: Fold) -> Held:
        """Where the parts of a fold go."""
        if fold.out is None:
            self.made += 1
            size = max(len(held.flat) for held in fold.values() if held.flat is not None)
            path, fd, _ = self.files.open(f"fold{self.made}", size)
            os.close(fd)
            fold.out = Held(map_file(path, size), True, path)
        return fold.out

    def _fold_items(self, fold: Fold) -> list[tuple[int, int, str, int, int]]:
        """Where a worker finds the results to fold."""
        items = []
        for (lo, hi), held in fold.items():
            self.made += 1
            path, size = held.in_file(self.files, f"fold{self.made}")
            items.append((lo, hi, path, 0, size))
        return items

    # What the workers say

    def on_pool_ready(self) -> None:
        self.send(Kind.STATE, {"state": "ready", "workers": [worker.pid for worker in self.pool.workers]})
        for worker in self.pool.workers:
            self.act(self.scheduler.on_ready(worker.index, time.monotonic()))

    def on_worker_replaced(self, worker: WorkerHandle) -> None:
        self.send(Kind.STATE, {"state": "replaced", "worker": worker.index, "pid": worker.pid})
        self.act(self.scheduler.on_ready(worker.index, time.monotonic()))

    def on_worker_message(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        if message["op"] == "import":
            self._on_import(worker, message)
            return
        self.on_answers([(worker, message)])

    def on_answers(self, answers: list[tuple[WorkerHandle, dict[str, Any]]]) -> None:
        """Workers have answered; new work is given out when all have been heard."""
        now = time.monotonic()
        commands: list[Command] = []
        for worker, message in answers:
            self.pool.rest(worker)
            try:
                commands += self.answers[message["op"]](worker, message, now)
            except Exception as error:  # noqa: BLE001  no answer of one worker may be the end of the node
                text = f"the node cannot use the answer of worker {worker.index}: {error!r}"
                commands += self.scheduler.on_failed(worker.index, "node", text, now)
        self.act(commands + self.scheduler.assign(now))

    def _on_done(self, worker: WorkerHandle, message: dict[str, Any], now: float) -> list[Command]:
        slot = worker.slot
        roots = []
        if not message.get("keeps"):
            self.params.returned(self.scheduler.seats[worker.index].round, worker.index)
        for lo, hi, plain, (path, offset, size) in message["roots"]:
            if path == slot.path:
                held = slot.hold(plain, offset, size)
            else:
                held = Held(map_file(path, size), plain, path)
                held.reusable_files = worker.reusable_files
            roots.append(((lo, hi), held))
        if worker.lent_files:
            self.pool.take_back(worker, [held.path for _, held in roots])
        return self.scheduler.on_done(worker.index, roots, now, assign=False)

    def _on_import(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        ref = self.imports.ask(worker, message["epoch"], message["name"])
        if ref is not None:
            self.act(self.scheduler.on_import(worker.index, ref))

    def on_worker_exit(self, worker: WorkerHandle, how: str, at: Optional[int], pid: int) -> None:
        self.imports.forget(worker)
        self._remove_untold_results(worker.index, pid)
        self.params.see_to_slots()
        self.act(self.scheduler.on_exit(worker.index, how, at, pid, time.monotonic()))

    def _remove_untold_results(self, worker: int, pid: int) -> None:
        known = {held.path for round_ in self.scheduler.rounds.values() for held in round_.held}
        for directory in self.files.directories:
            for name in os.listdir(directory):
                path = os.path.join(directory, name)
                if name.startswith(result_prefix(worker, pid)) and path not in known:
                    remove(path)

    def on_output(self, worker: int, stream: int, data: bytes) -> None:
        self.send(Kind.LOG, {"worker": worker, "stream": stream}, [data])
        self.print_credit -= len(data)
        self.pool.mute(self.print_credit <= 0)

    def on_pool_broken(self, reason: str) -> None:
        self.leave(reason)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
