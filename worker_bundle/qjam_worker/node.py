"""The node of one host: takes work from the master, gives it to the workers over shared memory, sends roots back.

It never runs user code and never unpickles, so it answers whatever a task does.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Callable, Optional

import msgpack
import numpy as np
import zmq

from . import wire
from .imports import Imports
from .link import LIVENESS, Link
from .params import ParamsPlaces
from .pool import PRINTED, RANG, Pool, WorkerHandle
from .reducing import Span
from .results import Held, fold_small
from .rounds import NodeJob, NodeRound
from .store import Files, NoRoom, Store, map_file, remove
from .warm import Warm, usable_cores
from .wire import Kind
from .worker import result_prefix

# Bytes of refs that may be on their way to a node: four chunks keep a link busy, and bound the memory they take.
CREDIT = 16 * 1024 * 1024
# Bytes of printed text on their way to the master; beyond it print() waits, as on a slow terminal.
PRINT_CREDIT = 1024 * 1024
# The share of the host's memory that slices may take before the least recently used ones go.
STORE_SHARE = 0.5
# What ZeroMQ tells of a link that was up and is no more, or that the master refuses.
BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class Node:
    """`run` serves the master at the other end of `uplink` until it says BYE, or `leave` is called from `watch`.

    `uplink` is a connected DEALER. `watch` maps file descriptors to functions that are called when they are readable.
    `paths` are folders in which the workers find packages before they look where their python does. `warm` is a parent
    of workers that has been forked already. `memory_limit`: bytes that each worker may take for itself.
    """

    def __init__(
        self,
        uplink: zmq.Socket[bytes],
        workers: int,
        *,
        bases: Optional[Iterable[str]] = None,
        watch: Optional[dict[int, Callable[[], None]]] = None,
        paths: Sequence[str] = (),
        warm: Optional[Warm] = None,
        memory_limit: Optional[int] = None,
    ) -> None:
        self.uplink = Link(uplink)
        self.monitor: Optional[Link] = None
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
        warm: Optional[Warm],
        memory_limit: Optional[int],
    ) -> None:
        self.selector = selectors.DefaultSelector()
        for fd, call in watch.items():
            self.selector.register(fd, selectors.EVENT_READ, (PRINTED, call))
        self.selector.register(self.uplink, selectors.EVENT_READ, (RANG, self.uplink.stir))
        self.pool = Pool(workers, self.files, self.selector, self, paths, warm, memory_limit)
        self.store = Store(self.files, int(_memory() * STORE_SHARE))
        self.jobs: dict[int, NodeJob] = {}
        self.rounds: dict[int, NodeRound] = {}
        self.params = ParamsPlaces(self.files, self.store)
        self.asked: set[str] = set()
        self.imports = Imports(self.pool)
        self.print_credit = PRINT_CREDIT
        self.made = 0
        self.leaving: Optional[str] = None
        self.answers: dict[str, Callable[[WorkerHandle, dict[str, Any], Optional[NodeRound]], None]] = {
            "done": self._on_done,
            "error": self._on_error,
            "cancelled": lambda worker, message, round_: None,
        }
        self.handlers: dict[Kind, Callable[[dict[str, Any], list[Any]], None]] = {
            Kind.WELCOME: lambda header, buffers: None,
            Kind.JOB: self.on_job,
            Kind.TASK: self.on_task,
            Kind.REFS: self.on_refs,
            Kind.CREDIT: self.on_credit,
            Kind.CANCEL: self.on_cancel,
            Kind.PING: lambda header, buffers: self.send(Kind.PONG, header),
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
        warm: Optional[Warm] = None,
        memory_limit: Optional[int] = None,
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
        monitor = None if keys is None else Link(uplink.get_monitor_socket(BROKEN))
        uplink.connect(endpoint)
        node = cls(uplink, workers, bases=bases, watch=watch, paths=paths, warm=warm, memory_limit=memory_limit)
        if monitor is not None:
            node.leave_when_broken(monitor)
        return node

    def leave_when_broken(self, monitor: Link) -> None:
        """Leave when the link has broken: what was on its way is lost, and nobody can tell what that was."""
        self.monitor = monitor

        def on_event() -> None:
            monitor.stir()
            if monitor.receive() is not None:
                self.leave("its link to the master broke")

        self.selector.register(monitor, selectors.EVENT_READ, (RANG, on_event))
        on_event()  # the descriptor of a ZeroMQ socket tells of nothing before the socket was found empty once

    def leave(self, reason: str) -> None:
        self.leaving = reason

    def start(self) -> None:
        """Start the workers and report to the master."""
        np.seterr(all="ignore")  # for this thread: folding here must not warn in the user's process
        self.pool.start()
        self._hello()

    def run(self) -> None:
        """Serve until it is time to leave. For a node with a process of its own."""
        try:
            self.start()
            while self.receive():
                self.poll(None)
        finally:
            self.close()

    def poll(self, timeout: Optional[float]) -> None:
        """Wait for events, `timeout` seconds at most, and handle them. The uplink is `receive`'s: call that first."""
        deadline = self.pool.next_deadline()
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            timeout = left if timeout is None else min(timeout, left)
        events = self.selector.select(timeout)
        if len(events) > 1:
            events.sort(key=lambda event: event[0].data[0])
        for key, _ in events:
            key.data[1]()
        if deadline is not None:
            self.pool.on_timer(time.monotonic())

    def fileno(self) -> int:
        """Readable when `poll` has something to do: for a loop that this node is a guest of."""
        return self.selector.fileno()

    def next_deadline(self) -> Optional[float]:
        """When `poll` is due even if nothing happens, by time.monotonic(), in seconds."""
        return self.pool.next_deadline()

    def close(self) -> None:
        """Stop the workers, remove the files, say BYE."""
        self.pool.close()
        self.selector.close()
        self._forget_files()
        self._remove_files()
        self.send(Kind.BYE, {"reason": self.leaving or "the node failed"})
        if self.monitor is not None:
            self.uplink.socket.disable_monitor()
            self.monitor.socket.close()
        self.uplink.socket.close()

    def _remove_files(self) -> None:
        self.files.remove()
        for lock in self.locks:
            os.close(lock)
        self.locks = []

    def _forget_files(self) -> None:
        """Let go of every mapping now: the files are removed, but their memory lasts as long as somebody maps it."""
        self.store.clear()
        self.rounds.clear()
        self.params.clear()

    # The uplink

    def send(self, kind: Kind, header: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        self.uplink.send(wire.pack(kind, header, buffers))

    def _hello(self) -> None:
        self.send(
            Kind.HELLO,
            {
                "version": str(wire.VERSION),
                "python": sys.version.split()[0],
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "cores": usable_cores(),
                "memory": _memory(),
                "workers": [worker.index for worker in self.pool.workers],
                "held": self.store.refs(),
                "credit": CREDIT,
            },
        )

    def receive(self) -> bool:
        """Take what the master has sent; False when it is time to leave."""
        while self.leaving is None and (frames := self.uplink.receive()) is not None:
            message = wire.unpack(frames)
            self.handlers[message.kind](message.header, message.buffers)
        return self.leaving is None

    def stir(self) -> None:
        """The master has sent something, through a socket of this same thread."""
        self.uplink.stir()

    # Jobs and rounds

    def on_job(self, header: dict[str, Any], buffers: list[Any]) -> None:
        number = header["job"]
        for old in header.get("forget", ()):
            self._forget_job(old)
        self.imports.begin(header["entry"]["epoch"])
        if number not in self.jobs:
            self.jobs[number] = NodeJob(number, header["entry"], header["nslices"], header["reduce"])
        self.jobs[number].add(dict(header["slices"]))

    def _forget_job(self, number: int) -> None:
        if self.jobs.pop(number, None) is not None:
            for worker in self.pool.workers:
                if number in worker.jobs:
                    worker.jobs.discard(number)
                    self.pool.tell(worker, {"op": "forget", "job": number})

    def on_task(self, header: dict[str, Any], buffers: list[Any]) -> None:
        number, job = header["round"], self.jobs[header["job"]]
        round_ = self.rounds.get(number)
        if round_ is None:
            if header["params"] is None and not buffers:
                return  # given up here, which the master does not know yet
            round_ = self.rounds[number] = NodeRound(number, job, len(self.pool.workers))
            try:
                self.params.keep(number, header["params"], buffers)
            except NoRoom as error:
                self._fail(round_, "room", str(error))
                return
        for ref in (self._code_ref(job), self.params.ref(number)):
            if ref is not None and not self._pin(round_, ref):
                round_.lacking.add(ref)
        refs = [job.refs[index] for index in header["indices"]]
        round_.add(header["indices"], {ref for ref in refs if ref is not None and not self._pin(round_, ref)})
        self._ask_for_missing(round_)
        self._assign()

    def _pin(self, round_: NodeRound, ref: str) -> bool:
        """Keep the ref for the round; False when it is not here yet."""
        if ref not in round_.pinned:
            round_.pinned.add(ref)
            self.store.pin(ref)
        return ref in self.store

    def _ask_for_missing(self, round_: NodeRound) -> None:
        """Tell the master which refs the round lacks."""
        if not (round_.lacking or round_.waiting):
            return
        missing = [ref for ref in round_.missing if ref not in self.asked]
        if missing:
            self.asked.update(missing)
            refs = [[ref, self.store.have(ref)] for ref in missing]
            self.send(Kind.STATE, {"state": "blocked", "round": round_.number, "missing": refs})

    @staticmethod
    def _code_ref(job: NodeJob) -> Optional[str]:
        ref: Optional[str] = job.entry["code"]
        return ref

    def _end(self, round_: NodeRound) -> None:
        """The round is over here: stop who works for it, give back what it held."""
        del self.rounds[round_.number]
        for worker in self.pool.workers:
            if worker.round == round_.number:
                self.pool.interrupt(worker, time.monotonic())
        for ref in round_.pinned:
            self.store.unpin(ref)
        self.asked -= round_.pinned - {ref for other in self.rounds.values() for ref in other.pinned}
        self.params.release(round_.number)
        for held in round_.held:
            held.release()

    def on_cancel(self, header: dict[str, Any], buffers: list[Any]) -> None:
        round_ = self.rounds.get(header["round"])
        if round_ is not None:
            self._end(round_)

    # Refs

    def on_refs(self, header: dict[str, Any], buffers: list[Any]) -> None:
        ref = header["ref"]
        if header.get("gone"):
            self._on_gone(ref)
            return
        data = [memoryview(buffer).cast("B") for buffer in buffers]
        self._write(ref, header["offset"], header["total"], data)
        self.send(Kind.CREDIT, {"bytes": sum(map(len, data))})
        if ref in self.store:
            self.asked.discard(ref)
            for round_ in self.rounds.values():
                round_.arrived(ref)
            if ref in self.imports:
                self._on_module(ref)
            else:
                self._assign()

    def _on_gone(self, ref: str) -> None:
        """The master has dropped it with the round that asked first; another round may still want it."""
        self.asked.discard(ref)
        self.imports.refuse(ref)
        for round_ in [r for r in self.rounds.values() if ref in r.pinned]:
            self._ask_for_missing(round_)

    def _write(self, ref: str, offset: int, total: int, data: list[memoryview]) -> None:
        dropped: list[str] = []
        try:
            for piece in data:
                dropped += self.store.write(ref, offset, total, piece)
                offset += len(piece)
        except NoRoom as error:
            for round_ in [r for r in self.rounds.values() if ref in r.pinned]:
                self._fail(round_, "room", str(error))
            self.imports.refuse(ref)
        if dropped:
            for worker in self.pool.workers:
                self.pool.tell(worker, {"op": "drop", "paths": dropped})

    def _on_module(self, ref: str) -> None:
        module = msgpack.unpackb(self.store.read(ref))
        self.store.drop(ref)
        self.imports.arrived(ref, module)

    def on_credit(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.print_credit += header["bytes"]
        self.pool.mute(self.print_credit <= 0)

    # Giving out work

    def _assign(self) -> None:
        """Give every idle worker something to do, the oldest round first."""
        for round_ in [r for r in self.rounds.values() if r.has_work]:
            for worker in self.pool.workers:
                if round_.number not in self.rounds:
                    break  # given up on the way: no room
                if not worker.seq and worker.ready and not self._give(worker, round_) and round_.job.has_data:
                    break

    def _give(self, worker: WorkerHandle, round_: NodeRound) -> bool:
        refs = round_.job.refs
        block = round_.take_map(worker.index)
        message: dict[str, Any]
        if block:
            message = {
                "op": "run",
                "params": self.params.where(round_.number),
                "slices": [self._slice_place(index, refs[index]) for index in block],
            }
        elif fold := round_.take_fold(worker.index, attrgetter("small")):
            try:
                message = {"op": "fold", "items": self._fold_items(fold)}
            except NoRoom as error:
                self._fail(round_, "room", str(error))
                return False
        else:
            return False
        job = round_.job
        if job.number not in worker.jobs:
            worker.jobs.add(job.number)
            code = self._code_ref(job)
            place = None if code is None else (self.store.path(code), self.store.size(code))
            self.pool.tell(
                worker,
                {"op": "job", "job": job.number, "entry": job.entry, "code": place, "nslices": job.nslices},
            )
        worker.round = round_.number
        message["job"] = job.number
        self.pool.ring(worker, message)
        return True

    def _slice_place(self, index: int, ref: Optional[str]) -> tuple[int, Optional[str], int]:
        return (index, None, 0) if ref is None else (index, self.store.path(ref), self.store.size(ref))

    def _fold_items(self, fold: dict[Span, Held]) -> list[tuple[int, int, str, int, int]]:
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
        self._assign()

    def on_worker_replaced(self, worker: WorkerHandle) -> None:
        self.send(Kind.STATE, {"state": "replaced", "worker": worker.index, "pid": worker.pid})
        self._assign()

    def on_worker_message(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        if message["op"] == "import":
            self._on_import(worker, message)
            return
        round_ = self.rounds.get(worker.round) if worker.round is not None else None
        self.pool.rest(worker)
        try:
            self.answers[message["op"]](worker, message, round_)
        except Exception as error:  # noqa: BLE001  no answer of one worker may be the end of the node
            if round_ is not None and round_.number in self.rounds:
                self._fail(round_, "node", f"the node cannot use the answer of worker {worker.index}: {error!r}")
        if self.rounds:
            self._assign()

    def _on_done(self, worker: WorkerHandle, message: dict[str, Any], round_: Optional[NodeRound]) -> None:
        roots = [((lo, hi), self._hold(worker, plain, *where)) for lo, hi, plain, where in message["roots"]]
        if round_ is None:
            for _, held in roots:
                held.release()
            return
        for used in round_.put(worker.index, roots):
            used.release()
        if not round_.job.user_reduce:
            for span, _ in roots:
                round_.tree.fold_from(span, fold_small)
        self._finish(round_)

    def _hold(self, worker: WorkerHandle, plain: bool, path: str, offset: int, size: int) -> Held:
        if path == worker.slot.path:  # the slot is written again with the worker's next task
            return Held(memoryview(bytes(worker.slot.view[offset : offset + size])), plain)
        return Held(map_file(path, size), plain, path)

    def _finish(self, round_: NodeRound) -> None:
        """Send the roots when nothing is left to do here."""
        if not round_.settled or not round_.tree.values:
            return
        roots, buffers = [], []
        for lo, hi in round_.tree.spans:
            frames = round_.tree.values[lo, hi].frames()
            roots.append([lo, hi, len(frames)])
            buffers += frames
        self.send(Kind.RESULT, {"round": round_.number, "roots": roots}, buffers)
        if round_.tree.complete:
            self._end(round_)
        else:
            for span in roots:
                round_.tree.take((span[0], span[1])).release()

    def _on_error(self, worker: WorkerHandle, message: dict[str, Any], round_: Optional[NodeRound]) -> None:
        if round_ is not None:
            self._report(
                round_,
                "task",
                message["text"],
                worker.index,
                message["slice"],
                message["summary"],
                message["pickled"],
            )

    def _report(
        self,
        round_: NodeRound,
        what: str,
        text: str,
        worker: Optional[int],
        slice_: Optional[int],
        summary: str,
        pickled: Optional[bytes] = None,
    ) -> None:
        header = {
            "round": round_.number,
            "what": what,
            "text": text,
            "worker": worker,
            "slice": slice_,
            "summary": summary,
        }
        self.send(Kind.ERROR, header, [] if pickled is None else [pickled])

    def _fail(self, round_: NodeRound, what: str, text: str) -> None:
        """Give a round up that cannot go on here."""
        self._report(round_, what, text, None, None, text)
        self._end(round_)

    def _on_import(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        ref = self.imports.ask(worker, message["epoch"], message["name"])
        if ref is not None and ref not in self.asked:
            self.asked.add(ref)
            self.send(Kind.STATE, {"state": "blocked", "round": worker.round, "missing": [[ref, 0]]})

    def on_worker_exit(self, worker: WorkerHandle, how: str, at: Optional[int], pid: int) -> None:
        self.imports.forget(worker)
        self._remove_untold_results(worker.index, pid)
        round_ = self.rounds.get(worker.round) if worker.round is not None else None
        report = {"state": "lost", "worker": worker.index, "how": how, "pid": pid}
        if round_ is not None:
            slices = round_.lose(worker.index)
            report.update({"round": round_.number, "slice": at, "slices": slices})
        self.send(Kind.STATE, report)

    def _remove_untold_results(self, worker: int, pid: int) -> None:
        known = {held.path for round_ in self.rounds.values() for held in round_.held}
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
