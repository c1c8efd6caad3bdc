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

import numpy as np

from qjam_worker.ipc import shortage
from qjam_worker.ipc.file_slices import FileSlice
from qjam_worker.ipc.files import Files, NoRoom, map_file, remove
from qjam_worker.ipc.slots import result_prefix
from qjam_worker.ipc.spin_wait import SpinWait
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.messages import MAX_REASON
from qjam_worker.wire.refs import of_params
from qjam_worker.wire.sockets import Uplink

from .call_service import CallService
from .commands import Command, Drop, Ended, Forget, Give, Interrupt, Tell, refusal
from .folds import Fold
from .fork_server_client import ForkServer
from .module_cache import ModuleCache
from .options import NodeOptions
from .params import ParamsLocations
from .pool import Pool
from .refs import RefReceiver
from .results import Held
from .rounds import NodeRound
from .scheduler import Scheduler
from .slice_index import SliceIndex
from .store import Store
from .worker_handle import WorkerHandle

# Bytes of refs that may be on their way to a node: four blocks keep a link busy, and bound the memory that they take.
CREDIT = 16 * 1024 * 1024
# Bytes of printed text on their way to the master; beyond it print() waits, as on a slow terminal.
PRINT_CREDIT = 1024 * 1024
# The share of the host's memory that slices may take before the least recently used ones go.
STORE_SHARE = 0.5


class Node:
    """`run` serves the master at the other end of `uplink` until it says BYE, or until a function of `watch` calls
    `leave`.

    `selector`: that of the loop in which the node lives, if it runs none itself; the node registers its calls there.
    `watch`: file descriptors, each with a function to call when it is readable. `bases`: folders for its mapped files.
    `fork_server`: one that was forked already.
    """

    def __init__(
        self,
        uplink: Uplink,
        options: NodeOptions,
        *,
        selector: Optional[selectors.BaseSelector] = None,
        bases: Optional[Iterable[str]] = None,
        watch: Optional[dict[int, Callable[[], None]]] = None,
        fork_server: Optional[ForkServer] = None,
    ) -> None:
        self.uplink = uplink
        self.options = options
        self.leaving: Optional[str] = None
        # What was on its way over a broken link is lost, and nobody can tell what that was.
        uplink.on_broken = lambda: self.leave("its link to the master broke")
        self.selector = selectors.DefaultSelector() if selector is None else selector
        self.waiting = SpinWait(self.selector)
        early = None if fork_server is None else fork_server.files
        self.files = Files.make(bases) if early is None else early
        self.locks = self.files.lock() if fork_server is None else fork_server.locks
        try:
            self._prepare(watch or {}, fork_server)
        except BaseException:
            self._remove_files()
            raise

    def _prepare(self, watch: dict[int, Callable[[], None]], fork_server: Optional[ForkServer]) -> None:
        for fd, call in watch.items():
            self.selector.register(fd, selectors.EVENT_READ, call)
        for file, stir in self.uplink.files():
            self.selector.register(file, selectors.EVENT_READ, stir)
        options = self.options
        self.pool = Pool(options, self.files, self.selector, self, fork_server)
        self.store = Store(self.files, int(_memory() * STORE_SHARE))
        self.slices = SliceIndex(self.store)
        self.scheduler = Scheduler(options.workers, self.slices)
        self.params = ParamsLocations(self.files, self.store)
        self.modules = ModuleCache()
        self.calls = CallService(self.files, self.pool, self.scheduler, self.store, self.act)
        self.refs = RefReceiver(self.store, self.scheduler, self.calls, self.modules, self.pool, self.send, self.act)
        self.print_credit = PRINT_CREDIT
        self.made = 0  # files for folds
        self.host = ""  # the name that the master has for this one
        self.commands: deque[Command] = deque()
        self.acting = False
        self.perform: dict[type, Callable[[Any], None]] = {
            Tell: self._tell,
            Give: self._give,
            Interrupt: lambda command: self.pool.interrupt(self.pool.workers[command.worker], time.monotonic()),
            Forget: self._forget,
            Drop: self._drop,
            Ended: lambda command: self.params.release(command.round),
            **self.calls.perform,
        }
        self.answers: dict[str, Callable[[WorkerHandle, dict[str, Any], float], list[Command]]] = {
            "done": self._on_done,
            "error": lambda worker, message, now: self.scheduler.on_error(worker.index, message, now),
            "cancelled": lambda worker, message, now: self.scheduler.on_cancelled(worker.index, now),
            "called": lambda worker, message, now: self.calls.on_called(worker.index, now),
        }
        self.handlers: dict[Kind, Callable[[dict[str, Any], list[Any]], None]] = {
            Kind.WELCOME: self.on_welcome,
            Kind.JOB: self.on_job,
            Kind.DATA: self.on_data,
            Kind.TASK: self.on_task,
            Kind.SHARE: lambda header, buffers: self.act(self.scheduler.on_share(header, time.monotonic())),
            Kind.RELEASE: lambda header, buffers: self.act(self.scheduler.on_release(header)),
            Kind.REFS: self.refs.on_refs,
            **self.calls.handlers,
            Kind.CREDIT: self.on_credit,
            Kind.CANCEL: lambda header, buffers: self.act(self.scheduler.on_cancel(header, time.monotonic())),
            Kind.PING: lambda header, buffers: self.send(Kind.PONG, {"t": header["t"]}),
            Kind.BYE: lambda header, buffers: self.leave(header["reason"]),
        }

    def leave(self, reason: str) -> None:
        """Stop serving; the master is told why."""
        self.leaving = reason[:MAX_REASON]

    def start(self) -> None:
        """Start the workers and report to the master."""
        self.pool.start()
        self.send(Kind.HELLO, {"workers": self.options.workers, "credit": CREDIT})
        if self.options.keep_data is not None:
            self.refs.keep_slices(self.options.keep_data, self.selector)

    def run(self) -> None:
        """Serve until it is time to leave. For a node that is a process of its own."""
        np.seterr(all="ignore")  # folding must not warn
        try:
            self.start()
            while self.receive():
                self.poll(None)
        except Exception as error:
            self.leave(f"the node failed: {shortage.told(error)}")
            raise
        finally:
            self.close()

    def poll(self, timeout: Optional[float]) -> None:
        """Wait for events, `timeout` seconds at most, and handle them. `receive` reads the uplink: call that first."""
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
        self.calls.on_timer(now)
        self.act(self.scheduler.on_timer(now))

    def next_deadline(self) -> Optional[float]:
        """When `on_timer` is due, by time.monotonic(), in seconds."""
        due = self.pool.next_deadline(), self.scheduler.next_deadline(), self.calls.next_deadline()
        return min((at for at in due if at is not None), default=None)

    def close(self) -> None:
        """Stop the workers, remove the files, say BYE."""
        self.refs.close(self.selector)  # first: the fork server removes the files that it still copies from
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
        """Unmap all files now: they are removed, but their memory lasts as long as somebody maps it."""
        self.store.clear()
        self.scheduler.rounds.clear()
        self.params.clear()
        self.calls.close()

    # The uplink

    def send(self, kind: Kind, header: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        self.uplink.send(kind, header, buffers)

    def receive(self) -> bool:
        """Handle what the master has sent; False when it is time to leave. A senseless message ends the node."""
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
        """Carry out commands in order; those that follow from one come after the rest."""
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

    def on_welcome(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.host = header["host"]
        self.act(self.scheduler.on_welcome(header))

    def on_job(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.modules.begin(header["entry"]["epoch"])
        self.act(self.scheduler.on_job(header))

    def on_data(self, header: dict[str, Any], buffers: list[Any]) -> None:
        commands = self.scheduler.on_data(header)
        if "file" in header:
            self.slices.learn(header["data"], header["file"], self.scheduler.data[header["data"]].refs)
        self.act(commands)

    def _forget(self, command: Forget) -> None:
        for worker in self.pool.workers:
            if command.job in worker.jobs:
                worker.jobs.discard(command.job)
                self.pool.tell(worker, {"op": "forget", "job": command.job})

    def _drop(self, command: Drop) -> None:
        places = [place for ref in command.refs if (place := self.slices.drop(ref)) is not None]
        if places:
            self.pool.tell_all({"op": "drop", "paths": places})
        self.refs.drop(command.refs)

    def on_task(self, header: dict[str, Any], buffers: list[Any]) -> None:
        number = header["round"]
        if number not in self.scheduler.rounds:
            if header["params"] == "have":
                return  # the node gave the round up, and the master does not know yet
            ref = of_params(number) if header["params"] == "ref" else None
            try:
                self.params.keep(number, ref, buffers)
            except NoRoom as error:
                self.act([refusal(number, str(error))])
                return
        self.act(self.scheduler.on_task(header, time.monotonic()))

    def _tell(self, command: Tell) -> None:
        kind, header, buffers = command
        if kind is Kind.GET:
            self.refs.ask(header["round"], header["refs"])
        else:
            self.send(kind, header, buffers)

    def on_credit(self, header: dict[str, Any], buffers: list[Any]) -> None:
        if self.print_credit + header["bytes"] > PRINT_CREDIT:
            raise ValueError(f"it may print {header['bytes']} bytes more than it has printed")
        self.print_credit += header["bytes"]
        self.pool.output.mute(self.print_credit <= 0)

    # Giving out work

    def _give(self, command: Give) -> None:
        index, round_, work = command
        if round_.number not in self.scheduler.rounds:  # given up since this was decided
            self.act(self.scheduler.on_cancelled(index, time.monotonic()))
            return
        worker, job = self.pool.workers[index], round_.job
        message: dict[str, Any] = {"job": job.number, "nslices": round_.data.nslices}
        if work.fold is None:
            message["op"], message["params"] = "run", self.params.where(round_.number, index)
            message["slices"] = self._slice_places(round_, work.slices)
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
            about = {"job": job.number, "entry": job.entry, "code": place, "host": self.host}
            self.pool.tell(worker, {"op": "job", **about})
        self.pool.assign(worker, message)

    def _slice_places(
        self, round_: NodeRound, slices: list[int]
    ) -> list[tuple[int, Union[str, FileSlice, None], int, int]]:
        """Of each slice its index, path, size, and which attempt this is."""
        refs, attempts = round_.data.refs, round_.attempts
        if not round_.has_data:
            return [(index, None, 0, attempts.get(index, 1)) for index in slices]
        return [
            (index, *self.slices.where(ref), attempts.get(index, 1))
            for index in slices
            if (ref := refs[index]) is not None
        ]

    def _out(self, fold: Fold) -> Held:
        """Where the parts of a fold go."""
        if fold.out is None:
            self.made += 1
            size = max(len(held.flat) for held in fold.values() if held.flat is not None)
            path, fd, _ = self.files.open(f"fold{self.made}", size)
            os.close(fd)
            fold.out = Held(map_file(path, size), True, path)
        return fold.out

    def _fold_items(self, fold: Fold) -> list[tuple[int, int, str, bool, int]]:
        """Where a worker finds the results to fold."""
        items = []
        for (lo, hi), held in fold.items():
            self.made += 1
            path, size = held.in_file(self.files, f"fold{self.made}")
            items.append((lo, hi, path, held.plain, size))
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
                text = f"the node cannot use the answer of worker {worker.index}: {shortage.told(error)}"
                commands += self.scheduler.on_failed(worker.index, "node", text, now)
        commands += self.calls.look(now)
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
        if worker.files_in_reuse:
            worker.take_back([held.path for _, held in roots])
        return self.scheduler.on_done(worker.index, roots, now, assign=False)

    def _on_import(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        ref = self.modules.ask(worker, message["epoch"], message["name"])
        if ref is not None:
            self.act(self.scheduler.on_import(worker.index, ref))

    def on_worker_exit(self, worker: WorkerHandle, how: str, at: Optional[int], pid: int) -> None:
        now = time.monotonic()
        commands = self.calls.on_exit(worker.index, how, now)
        self.modules.forget(worker)
        self._remove_untold_results(worker.index, pid)
        self.params.see_to_slots()
        self.act([*self.scheduler.on_exit(worker.index, how, at, pid, now), *commands])

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
        self.pool.output.mute(self.print_credit <= 0)

    def on_pool_broken(self, reason: str) -> None:
        self.leave(reason)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
