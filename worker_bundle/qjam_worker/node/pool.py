"""The worker processes of a node: started, given tasks, interrupted, replaced when they die, stopped."""

from __future__ import annotations

import os
import select
import selectors
import signal
import time
from functools import partial
from typing import Any, Optional, Protocol

from qjam_worker.ipc import at_fork
from qjam_worker.ipc.files import Files, Mapped
from qjam_worker.ipc.mailbox import (
    ALONE,
    CANCELLED,
    MAILBOX,
    ONE,
    RUNNING,
    SENT,
    SLICE,
    TASK,
    Mailbox,
    counter,
    mailbox_name,
)
from qjam_worker.ipc.pipes import Channel
from qjam_worker.ipc.slots import SLOT, SLOTS
from qjam_worker.worker.fork_server import EXITED, FORKED

from .fork_server_client import ForkServer, send_signal
from .options import NodeOptions
from .output_pump import OutputPump
from .process_status import how_it_ended, is_stopped
from .results import Slot
from .worker_handle import WorkerHandle

# Seconds that user code gets to react to an interrupt before its process is killed.
GRACE = 2.0
# A worker that is stopped (SIGSTOP) with a task is killed after this many seconds; after twice that at most.
STOPPED = 10.0
# Seconds that idle workers get to leave by themselves when the node stops.
LEAVE = 0.5
# A worker that dies this often before it is ready will not come up by trying again.
START_ATTEMPTS = 3
WAKES_READ = 4096  # bytes, one for each answer in a mailbox


class PoolEvents(Protocol):
    """What the pool tells the node."""

    def on_pool_ready(self) -> None: ...
    def on_worker_replaced(self, worker: WorkerHandle) -> None: ...
    def on_worker_message(self, worker: WorkerHandle, message: dict[str, Any]) -> None: ...
    def on_answers(self, answers: list[tuple[WorkerHandle, dict[str, Any]]]) -> None: ...
    def on_worker_exit(self, worker: WorkerHandle, how: str, at: Optional[int], pid: int) -> None: ...
    def on_output(self, worker: int, stream: int, data: bytes) -> None: ...
    def on_pool_broken(self, reason: str) -> None: ...


class Pool:
    """The workers that `options` ask for. `fork_server`: one that runs already."""

    def __init__(
        self,
        options: NodeOptions,
        files: Files,
        selector: selectors.BaseSelector,
        events: PoolEvents,
        fork_server: Optional[ForkServer] = None,
    ) -> None:
        self.files = files
        self.options = options
        self.selector = selector
        self.events = events
        self.output = OutputPump(selector)
        self._slots = self.files.create(SLOTS, options.workers * SLOT)
        self.workers = [self._place(index) for index in range(options.workers)]
        self._assigned: list[WorkerHandle] = []  # that have a task in their mailboxes and are not woken yet
        self._broadcast = counter()
        self._answered, self._answering = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.selector.register(self._answered, selectors.EVENT_READ, self._on_answers)
        self._server = fork_server
        self._seq = 0
        self._announced = False
        self._interrupted: set[int] = set()  # workers that have a kill_at
        self._look_at: Optional[float] = None  # when to look for stopped workers
        self._stopped: set[int] = set()  # processes that were so at the last look
        at_fork.add(self)

    def _place(self, index: int) -> WorkerHandle:
        worker = WorkerHandle(index)
        worker.mailbox_path, view = self.files.create(mailbox_name(index), MAILBOX)
        worker.mailbox = Mailbox(view)
        worker.status = worker.mailbox.words
        slots = self._slots.view
        worker.slot = Slot(Mapped(self._slots.path, slots[index * SLOT : (index + 1) * SLOT]), slots, index)
        return worker

    # Starting

    def start(self) -> None:
        """Have the fork server, which is started if none runs yet, fork all workers."""
        self._adopt(self._server or ForkServer.start(self.files, self.options))
        for worker in self.workers:
            self._fork(worker)

    def _adopt(self, server: ForkServer) -> None:
        self._server = server
        self.selector.register(server.control, selectors.EVENT_READ, self._on_server)
        self.output.add(server.output, server.take_output, urgent=True)

    def _fork(self, worker: WorkerHandle) -> None:
        assert self._server is not None
        for path in (worker.mailbox_path, self._slots.path):
            if not os.path.exists(path):  # user code, or somebody who tidies up, has removed it
                self.events.on_pool_broken(f"{path} was removed, which new worker processes need")
                return
        worker.forget_task()
        pipes = [os.pipe() for _ in range(5)]
        (task_end, task), (answer, answer_end), (modules_end, modules), (out, out_end), (err, err_end) = pipes
        fds = [task_end, self._broadcast, answer_end, self._answering, modules_end, out_end, err_end]
        self._server.fork(worker.index, self.options.memory_limit, fds)
        for fd in (task_end, answer_end, modules_end, out_end, err_end):
            os.close(fd)
        channel = Channel(answer, task)
        worker.begin(channel, Channel(-1, modules))
        self.selector.register(answer, selectors.EVENT_READ, partial(self._on_message, worker, channel))
        worker.outputs = [out, err]
        for stream, fd in ((1, out), (2, err)):
            self.output.add(fd, partial(self._on_output, worker, stream))

    def _on_output(self, worker: WorkerHandle, stream: int, data: bytes) -> None:
        if not worker.ready:
            worker.said = data
        self.events.on_output(worker.index, stream, data)

    # The fork server

    def _on_server(self) -> None:
        assert self._server is not None
        news = self._server.news()
        if news is None:
            self._on_server_death(self._server)
            return
        worker = self.workers[news.worker]
        if news.what == FORKED:
            worker.pid = news.pid
        elif news.pid == worker.pid:
            self._on_exit(worker, news.status)

    def _on_server_death(self, server: ForkServer) -> None:
        """Its workers die with it. One that was killed from outside is replaced, one that could not start is not."""
        self.output.drain(server.output)
        status = server.process.wait()
        self._forget_server(server)
        if status >= 0 or not self._announced:
            last = server.last_words
            self.events.on_pool_broken(f"the fork server of the workers has died{': ' if last else ''}{last}")
            return
        for worker in self.workers:
            worker.kill()
        self._adopt(ForkServer.start(self.files, self.options))
        for worker in self.workers:
            self._on_exit(worker, signal.SIGKILL)

    def _forget_server(self, server: ForkServer) -> None:
        self._server = None
        self._unregister(server.control)
        server.hang_up()
        self.output.remove(server.output)

    # Workers

    def _on_message(self, worker: WorkerHandle, channel: Channel) -> None:
        if worker.channel is not channel:
            return  # the last message of a process that has been replaced in this same turn of the loop
        try:
            messages = channel.receive()
        except EOFError:
            self.selector.unregister(channel.read_fd)  # the fork server tells how it ended
            if self._server is not None:
                self._server.resume()
            return
        self.output.read()
        for message in messages:
            if message["op"] == "ready":
                worker.ready = True
                worker.pid = message["pid"]  # the fork server's report of it may come later
                worker.failures = 0
                if self._announced:
                    self.events.on_worker_replaced(worker)
                    self._on_last_answer(worker)
                elif all(other.ready for other in self.workers):
                    self._announced = True
                    self.events.on_pool_ready()
            elif message["op"] == "import" or message["seq"] == worker.seq:
                if self.output.muted:
                    self._read_out(worker)  # what was printed before the answer comes before it
                if message.get("leaving"):
                    worker.last_answer = message
                else:
                    self.events.on_worker_message(worker, message)

    def _on_last_answer(self, worker: WorkerHandle) -> None:
        """The last answer of the process before this one counts now, so that nothing was given to it after that."""
        message, worker.last_answer = worker.last_answer, None
        if message is not None:
            self.events.on_worker_message(worker, message)

    def _hear_last(self, worker: WorkerHandle) -> None:
        """An answer that was given before the end counts, also when the end is heard of first."""
        try:
            if worker.answered():
                worker.last_answer = worker.mailbox.answer.read()
            elif worker.seq and worker.channel is not None and select.select([worker.channel.read_fd], [], [], 0)[0]:
                answers = [one for one in worker.channel.receive() if one.get("seq") == worker.seq]
                worker.last_answer = answers[-1] if answers else None
        except Exception:  # noqa: BLE001, S110  there is none, or user code has written over it
            pass

    def _on_exit(self, worker: WorkerHandle, status: int) -> None:
        if worker.last_answer is None:
            self._hear_last(worker)
        at = worker.status[SLICE] if worker.status[RUNNING] and worker.status[SLICE] >= 0 else None
        was_ready, pid = worker.ready, worker.pid
        self._let_go(worker)
        worker.kill_at = None
        self._interrupted.discard(worker.index)
        worker.status[RUNNING] = worker.status[CANCELLED] = 0
        worker.failures += 0 if was_ready else 1
        if worker.failures == START_ATTEMPTS:
            how = f"worker {worker.index} {how_it_ended(status)} before it was ready"
            self.events.on_pool_broken(": ".join(filter(None, [how, self._last_line(worker)])))
            return
        if worker.last_answer is not None:
            self._fork(worker)
            return
        worker.seq = 0
        self._fork(worker)
        self.events.on_worker_exit(worker, how_it_ended(status), at, pid or 0)

    def _last_line(self, worker: WorkerHandle) -> str:
        """What a process that did not come up has printed last, or the fork server for it."""
        said = worker.said.decode(errors="replace").strip()
        if not said and self._server is not None:
            self.output.drain(self._server.output)
            said = self._server.last_words
        return said.rpartition("\n")[2]

    def _let_go(self, worker: WorkerHandle) -> None:
        """Read the last that the worker has printed and close its ends."""
        self._read_out(worker)
        for fd in worker.outputs:
            self.output.remove(fd)
        worker.outputs = []
        if worker.channel is not None:
            self._unregister(worker.channel.read_fd)
            worker.channel.close()
            worker.channel = None
        if worker.modules is not None:
            worker.modules.close()
            worker.modules = None

    def _read_out(self, worker: WorkerHandle) -> None:
        for fd in worker.outputs:
            self.output.drain(fd)

    def _unregister(self, file: Any) -> None:
        try:
            self.selector.unregister(file)
        except KeyError:
            pass

    # Tasks

    def assign(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        """Give a task to an idle worker; it begins with the next `wake`."""
        assert worker.channel is not None
        worker.slot.clear()
        if worker.files_in_reuse:
            worker.take_back([])
        if worker.reusable_files and message["op"] == "run":
            message["reuse"] = worker.files_in_reuse = list(worker.reusable_files)
            worker.reusable_files.clear()
        for earlier in worker.outbox:
            worker.send(earlier)
        worker.outbox.clear()
        self._seq += 1
        worker.seq = self._seq
        if worker.mailbox.task.write(message):
            worker.status[SENT] = worker.sent_count
            worker.status[TASK] = worker.seq
            self._assigned.append(worker)
        else:
            worker.send({**message, "seq": worker.seq})
        if self._look_at is None:
            self._look_at = time.monotonic() + STOPPED

    def wake(self) -> None:
        """Wake the workers that have got a task: one by its pipe, several by one write to the eventfd that all watch.

        The system then wakes them on all cores; workers that were woken one after the other often shared one. To wake
        16 workers by 16 pipes took 0.13 of the 0.52 ms of a round (31 KB each way).
        """
        assigned, self._assigned = self._assigned, []
        if len(assigned) == 1:
            assigned[0].status[ALONE] = sum(worker.seq != 0 for worker in self.workers) == 1
        else:
            for worker in assigned:
                worker.status[ALONE] = 0
        if len(assigned) > 1:
            os.write(self._broadcast, ONE)
        elif assigned and assigned[0].channel is not None:  # else it has ended meanwhile
            assigned[0].channel.wake()

    def tell(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        """Send a worker a message; it reads it before its next task."""
        if worker.idle and worker.channel is not None:
            worker.send(message)
        else:
            worker.outbox.append(message)

    def tell_all(self, message: dict[str, Any]) -> None:
        """Send all workers a message."""
        for worker in self.workers:
            self.tell(worker, message)

    def _on_answers(self) -> None:
        """Some workers have left their answers in their mailboxes."""
        os.read(self._answered, WAKES_READ)
        answered = [worker for worker in self.workers if worker.answered()]
        self.output.read()
        answers = []
        for worker in answered:
            if self.output.muted:
                self._read_out(worker)
            try:
                answers.append((worker, worker.mailbox.answer.read()))
            except Exception:  # noqa: BLE001  user code has written there
                worker.kill()
        self.events.on_answers(answers)

    def rest(self, worker: WorkerHandle) -> None:
        """The worker has answered."""
        worker.seq = 0
        if self._interrupted:
            self.spare(worker)

    def interrupt(self, worker: WorkerHandle, now: float, *, call: bool = False) -> None:
        """Stop the worker's task: KeyboardInterrupt in user code, SIGKILL if that does not help in time. `call`: only
        the call that it runs, until `spare` is called.
        """
        if worker.seq and worker.kill_at is None and worker.pid is not None:
            if not call:
                worker.status[CANCELLED] = worker.seq
            worker.kill_at = now + GRACE
            self._interrupted.add(worker.index)
            worker.kill(signal.SIGINT)

    def spare(self, worker: WorkerHandle) -> None:
        """The worker has stopped what it was to stop."""
        self._interrupted.discard(worker.index)
        worker.kill_at = None

    def next_deadline(self) -> Optional[float]:
        """When `on_timer` is due."""
        if not self._interrupted:
            return self._look_at
        due = [self.workers[index].kill_at or 0.0 for index in self._interrupted]
        return min(due if self._look_at is None else [*due, self._look_at])

    def on_timer(self, now: float) -> None:
        """Kill the workers that have not reacted in time."""
        for worker in [self.workers[index] for index in self._interrupted]:
            if worker.kill_at is not None and worker.kill_at <= now and worker.pid is not None:
                worker.kill_at = None
                self._interrupted.discard(worker.index)
                worker.kill()
        if self._look_at is not None and self._look_at <= now:
            self._look_for_stopped(now)

    def _look_for_stopped(self, now: float) -> None:
        """Nobody waits for ever for a worker that somebody has stopped: its task goes to another process."""
        busy = [worker.pid for worker in self.workers if worker.seq and worker.pid is not None]
        stopped = {pid for pid in busy if is_stopped(pid)}
        for pid in stopped & self._stopped:
            send_signal(pid, signal.SIGKILL)
        self._stopped = stopped
        self._look_at = now + STOPPED if busy else None

    # Stopping

    def close(self) -> None:
        """Stop everything: idle workers leave when their pipes close, the fork server kills the rest and ends."""
        idle = {worker.pid for worker in self.workers if worker.idle}
        for worker in self.workers:
            self._let_go(worker)
        server = self._server
        if server is not None:
            server.resume()
            self._await_exits(server, idle, time.monotonic() + LEAVE)
            self._forget_server(server)
            server.process.wait()
        for worker in self.workers:
            worker.slot.borrowed.clear()  # they refer to it, and so to its memory
        self.workers.clear()
        self._slots = Mapped("", memoryview(b""))
        self._unregister(self._answered)
        self.output.close()
        for fd in (self._answered, self._answering, self._broadcast):
            os.close(fd)
        at_fork.discard(self)

    def abandon(self) -> None:
        """In a fork of the program: close the copies of descriptors whose end is to tell of the program's end."""
        self.output.abandon()
        if self._server is not None:
            self._server.control.close()
        fds = [self._broadcast, self._answered, self._answering]
        for worker in self.workers:
            for channel in (worker.channel, worker.modules):
                fds += [] if channel is None else [channel.read_fd, channel.write_fd]
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _await_exits(self, server: ForkServer, pids: set[Optional[int]], deadline: float) -> None:
        while pids and (left := deadline - time.monotonic()) > 0:
            server.control.settimeout(left)
            try:
                news = server.news()
            except OSError:
                return
            if news is None:
                return
            if news.what == EXITED:
                pids.discard(news.pid)
