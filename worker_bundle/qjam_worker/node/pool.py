"""The worker processes of a node: started, assigned, interrupted, replaced when they die, stopped."""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Protocol, Union

from qjam_worker.ipc import at_fork
from qjam_worker.ipc.cores import thread_environment
from qjam_worker.ipc.files import Files, Mapped, remove
from qjam_worker.ipc.mailbox import (
    CANCELLED,
    DONE,
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
from qjam_worker.ipc.slots import SLOT, SLOTS, out_slot
from qjam_worker.worker.fork_server import EXITED, FORKED, NEWS, REQUEST
from qjam_worker.worker.memory_limit import HIGHEST

from .fork_server_client import Forked, ForkServer
from .results import Slot

# Seconds that user code gets to react to an interrupt before its process is killed.
GRACE = 2.0
# Seconds for which somebody may have stopped a worker (SIGSTOP) that has work, before it is killed; twice that at most.
STOPPED = 10.0
# Seconds that idle workers get to leave by themselves when the node stops.
LEAVE = 0.5
# A worker that dies this often before it is ready will not come up by trying again.
START_ATTEMPTS = 3
OUTPUT_READ = 64 * 1024
CALLS_READ = 4096  # bytes, one for each answer in a page
# What is still read of the output of a worker that has ended or is let go. A pipe holds no more, but a process that is
# left may write to it without end.
LAST_WORDS = 1024 * 1024
PARENT = -1  # the "worker" whose output is the warm parent's own
PARENT_TAIL = 4096  # bytes of it that are kept, to tell why it died


class PoolEvents(Protocol):
    """What the node is told."""

    def on_pool_ready(self) -> None: ...
    def on_worker_replaced(self, worker: WorkerHandle) -> None: ...
    def on_worker_message(self, worker: WorkerHandle, message: dict[str, Any]) -> None: ...
    def on_answers(self, answers: list[tuple[WorkerHandle, dict[str, Any]]]) -> None: ...
    def on_worker_exit(self, worker: WorkerHandle, how: str, at: Optional[int], pid: int) -> None: ...
    def on_output(self, worker: int, stream: int, data: bytes) -> None: ...
    def on_pool_broken(self, reason: str) -> None: ...


class WorkerHandle:
    """The node's side of one worker: a place in the pool, filled by one process after another."""

    mailbox: Mailbox
    mailbox_path: str
    status: memoryview  # the words of its page
    slot: Slot

    def __init__(self, index: int) -> None:
        self.index = index
        self.pid: Optional[int] = None
        self.channel: Optional[Channel] = None
        self.modules: Optional[Channel] = None  # where its imports are answered
        self.reusable_files: list[str] = []  # files of its results that the process may write to again
        self.lent_files: list[str] = []  # of these, those that it was given with its work
        self.outbox: list[dict[str, Any]] = []  # what it is told with its next work: a busy one does not read
        self.sent_count = 0  # messages that the process was sent
        self.ready = False
        self.farewell: Optional[dict[str, Any]] = None  # the answer of a process that leaves, until there is another
        self.failures = 0
        self.seq = 0  # of the work that it has now; 0 when idle
        self.jobs: set[int] = set()
        self.kill_at: Optional[float] = None
        self.outputs: list[int] = []

    def __repr__(self) -> str:
        return f"<worker {self.index} pid={self.pid} {'busy' if self.seq else 'idle' if self.ready else 'starting'}>"

    @property
    def idle(self) -> bool:
        return self.ready and not self.seq


class Pool:
    def __init__(
        self,
        count: int,
        files: Files,
        selector: selectors.BaseSelector,
        events: PoolEvents,
        paths: Sequence[str] = (),
        warm: Optional[ForkServer] = None,
        memory_limit: Optional[int] = None,
    ) -> None:
        self.files = files
        self.memory_limit = memory_limit
        self._warm = warm
        self.paths = list(paths)
        self.selector = selector
        self.events = events
        self._slots = self.files.create(SLOTS, count * SLOT)
        self.workers = [self._place(index) for index in range(count)]
        self._assigned: list[WorkerHandle] = []  # that have work in their pages and are not called yet
        self._broadcast = counter()
        self._answered, self._answering = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._prints = select.epoll()  # what workers print
        self.selector.register(self._answered, selectors.EVENT_READ, self._on_answers)
        self.selector.register(self._prints, selectors.EVENT_READ, self._on_prints)
        self._printers: dict[int, Callable[[], None]] = {}
        self.process: Union[subprocess.Popen[bytes], Forked, None] = None
        self.parent: Optional[socket.socket] = None
        self.parent_output = -1
        self._parent_said = b""
        self._seq = 0
        self._muted = False
        self._announced = False
        self._interrupted: set[int] = set()  # workers that have a kill_at
        self._look_at: Optional[float] = None  # when to look for stopped workers
        self._stopped: set[int] = set()  # processes that were so at the last look
        at_fork.add(self)

    def _place(self, index: int) -> WorkerHandle:
        worker = WorkerHandle(index)
        self._lay_out(worker)
        view = self._slots.view[index * SLOT : (index + 1) * SLOT]
        worker.slot = Slot(Mapped(self._slots.path, view), self._slots.view, index)
        return worker

    def _lay_out(self, worker: WorkerHandle) -> None:
        worker.mailbox_path, view = self.files.create(mailbox_name(worker.index), MAILBOX)
        worker.mailbox = Mailbox(view)
        worker.status = worker.mailbox.words

    # Starting

    def start(self) -> None:
        """Have the warm parent, which is started if there is none yet, fork all workers."""
        if self._warm is None:
            self._start_parent()
        else:
            self._adopt(self._warm.process, self._warm.control, self._warm.output)
        for worker in self.workers:
            self._fork(worker)

    def _start_parent(self) -> None:
        ours, theirs = socket.socketpair()
        output, output_end = os.pipe()
        root = str(Path(__file__).absolute().parents[2])
        replaced = 0 if sys.flags.isolated else 1  # the folder that it is started in
        command = (
            f"import sys; sys.path[:{replaced}] = {[root, *self.paths]!r}; "
            f"from qjam_worker.worker.fork_server import main; main({theirs.fileno()}, {self.files.directories!r})"
        )
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *(["-I"] if sys.flags.isolated else []), "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                pass_fds=[theirs.fileno()],
                env=thread_environment(len(self.workers)),
                start_new_session=True,
            )
        os.close(output_end)
        self._adopt(process, ours, output)

    def _adopt(self, process: Union[subprocess.Popen[bytes], Forked], ours: socket.socket, output: int) -> None:
        self.process = process
        self.parent_output = output
        self.parent = ours
        self.selector.register(ours, selectors.EVENT_READ, self._on_parent)
        os.set_blocking(output, False)
        self._register_output(PARENT, 2, output)

    def _fork(self, worker: WorkerHandle) -> None:
        assert self.parent is not None
        self._see_to_files(worker)
        # Before there is a process that could take the task of the last one for its own.
        worker.sent_count = worker.status[TASK] = worker.status[SENT] = worker.status[DONE] = 0
        pipes = [os.pipe() for _ in range(5)]
        (bell_end, bell), (answer, answer_end), (modules_end, modules), (out, out_end), (err, err_end) = pipes
        ends = [bell_end, answer_end, modules_end, out_end, err_end]
        given = [bell_end, self._broadcast, answer_end, self._answering, modules_end, out_end, err_end]
        try:
            socket.send_fds(self.parent, [REQUEST.pack(worker.index, min(self.memory_limit or 0, HIGHEST))], given)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the end of the parent is told by its socket
        for fd in ends:
            os.close(fd)
        worker.channel = channel = Channel(answer, bell)
        worker.modules = Channel(-1, modules)
        worker.outbox.clear()
        for path in (*worker.reusable_files, *worker.lent_files):
            remove(path)
        worker.reusable_files.clear()
        worker.lent_files = []
        worker.ready = False
        worker.pid = None
        worker.jobs.clear()
        self.selector.register(answer, selectors.EVENT_READ, partial(self._on_message, worker, channel))
        worker.outputs = [out, err]
        for stream, fd in ((1, out), (2, err)):
            os.set_blocking(fd, False)
            self._register_output(worker.index, stream, fd)

    def _see_to_files(self, worker: WorkerHandle) -> None:
        """Make the files of its place anew where user code, or somebody who tidies up, has removed them."""
        if not (os.path.exists(worker.mailbox_path) and os.path.exists(worker.slot.path)):
            remove(worker.mailbox_path)
            if worker.slot.rows is None:
                remove(worker.slot.path)
            self._lay_out(worker)
            worker.slot = Slot(self.files.create(out_slot(worker.index), SLOT))

    # Events

    def _on_parent(self) -> None:
        assert self.parent is not None
        try:
            news = self.parent.recv(NEWS.size, socket.MSG_WAITALL)
        except ConnectionResetError:  # it died with our requests unread
            news = b""
        if not news:
            self._on_parent_death()
            return
        what, index, pid, status = NEWS.unpack(news)
        worker = self.workers[index]
        if what == FORKED:
            worker.pid = pid
        elif pid == worker.pid:
            self._on_exit(worker, status)

    def _on_parent_death(self) -> None:
        """Its workers die with it. Killed from outside, it is replaced; if it could not start, that is told."""
        assert self.process is not None
        self._on_readable(PARENT, 2, self.parent_output, to_the_end=True)
        status = self.process.wait()
        self._forget_parent()
        if status >= 0 or not self._announced:
            last = self._parent_said.decode(errors="replace").strip()
            self.events.on_pool_broken(f"the warm parent of the workers has died{': ' if last else ''}{last}")
            return
        for worker in self.workers:
            self._kill(worker)
        self._start_parent()
        for worker in self.workers:
            self._on_exit(worker, signal.SIGKILL)

    def _wake_parent(self) -> None:
        """User code may have stopped it."""
        if self.process is not None:
            _signal(self.process.pid, signal.SIGCONT)

    def _forget_parent(self) -> None:
        if self.parent is not None:
            self._unregister(self.parent)
            try:
                self.parent.shutdown(socket.SHUT_RDWR)  # reaches it also when a fork of the program has copies
            except OSError:
                pass  # it has gone first
            self.parent.close()
            self.parent = None
        self._unregister_output(self.parent_output)
        os.close(self.parent_output)

    def _on_message(self, worker: WorkerHandle, channel: Channel) -> None:
        if worker.channel is not channel:
            return  # the last ring of a process that has been replaced in this same turn of the loop
        try:
            messages = channel.receive()
        except EOFError:
            self.selector.unregister(channel.read_fd)  # the parent tells how it ended
            self._wake_parent()
            return
        self._on_prints()
        for message in messages:
            if message["op"] == "ready":
                worker.ready = True
                worker.pid = message["pid"]  # the parent's news of it may come later
                worker.failures = 0
                if self._announced:
                    self.events.on_worker_replaced(worker)
                    self._on_farewell(worker)
                elif all(other.ready for other in self.workers):
                    self._announced = True
                    self.events.on_pool_ready()
            elif message["op"] == "import" or message["seq"] == worker.seq:
                if self._muted:
                    self._read_out(worker)  # what was printed before the answer comes before it
                if message.get("leaving"):
                    worker.farewell = message
                else:
                    self.events.on_worker_message(worker, message)

    def _on_farewell(self, worker: WorkerHandle) -> None:
        """The last answer of the process before this one counts now, so that nothing was given to it after that."""
        message, worker.farewell = worker.farewell, None
        if message is not None:
            self.events.on_worker_message(worker, message)

    def _hear_last(self, worker: WorkerHandle) -> None:
        """An answer that was given before the end counts, also when the end is heard of first."""
        try:
            if worker.seq and worker.status[DONE] == worker.seq:
                worker.farewell = worker.mailbox.answer.read()
            elif worker.seq and worker.channel is not None and select.select([worker.channel.read_fd], [], [], 0)[0]:
                answers = [one for one in worker.channel.receive() if one.get("seq") == worker.seq]
                worker.farewell = answers[-1] if answers else None
        except Exception:  # noqa: BLE001, S110  there is none, or user code has written over it
            pass

    def _on_exit(self, worker: WorkerHandle, status: int) -> None:
        if worker.farewell is None:
            self._hear_last(worker)
        at = worker.status[SLICE] if worker.status[RUNNING] and worker.status[SLICE] >= 0 else None
        was_ready, pid = worker.ready, worker.pid
        self._let_go(worker)
        worker.kill_at = None
        self._interrupted.discard(worker.index)
        worker.status[RUNNING] = worker.status[CANCELLED] = 0
        worker.failures += 0 if was_ready else 1
        if worker.failures == START_ATTEMPTS:
            self.events.on_pool_broken(f"worker {worker.index} {how_it_ended(status)} before it was ready")
            return
        if worker.farewell is not None:
            self._fork(worker)
            return
        worker.seq = 0
        self._fork(worker)
        self.events.on_worker_exit(worker, how_it_ended(status), at, pid or 0)

    def _let_go(self, worker: WorkerHandle) -> None:
        """Read the last that the worker has printed and close its ends."""
        self._read_out(worker)
        for fd in worker.outputs:
            self._unregister_output(fd)
            os.close(fd)
        worker.outputs = []
        if worker.channel is not None:
            self._unregister(worker.channel.read_fd)
            worker.channel.close()
            worker.channel = None
        if worker.modules is not None:
            worker.modules.close()
            worker.modules = None

    def _unregister(self, file: Any) -> None:
        try:
            self.selector.unregister(file)
        except KeyError:
            pass

    # Output

    def _register_output(self, worker: int, stream: int, fd: int) -> None:
        if not self._muted:
            self._prints.register(fd, select.EPOLLIN)
            self._printers[fd] = partial(self._on_readable, worker, stream, fd)

    def _unregister_output(self, fd: int) -> None:
        if self._printers.pop(fd, None) is not None:
            self._prints.unregister(fd)

    def _on_prints(self) -> None:
        """Read what was printed: all of it that came before an answer, before the answer."""
        for fd, _ in self._prints.poll(0):
            printer = self._printers.get(fd)
            if printer is not None:
                printer()

    def _on_readable(self, worker: int, stream: int, fd: int, to_the_end: bool = False) -> None:
        left = LAST_WORDS if to_the_end else 1
        while left > 0:
            try:
                data = os.read(fd, OUTPUT_READ)
            except BlockingIOError:
                return
            if data and worker == PARENT:
                self._parent_said = (self._parent_said + data)[-PARENT_TAIL:]
            elif data:
                self.events.on_output(worker, stream, data)
            else:
                self._unregister_output(fd)
            left -= len(data) or left

    def _read_out(self, worker: WorkerHandle) -> None:
        for stream, fd in enumerate(worker.outputs, start=1):
            self._on_readable(worker.index, stream, fd, to_the_end=True)

    def mute(self, muted: bool) -> None:
        """Stop or go on reading what the workers print; while muted, their prints wait, as on a slow terminal."""
        if muted == self._muted:
            return
        self._muted = muted
        for worker in self.workers:
            for stream, fd in enumerate(worker.outputs, start=1):
                if muted:
                    self._unregister_output(fd)
                else:
                    self._register_output(worker.index, stream, fd)

    # Work

    def assign(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        """Give work to an idle worker; it begins with the next `call`."""
        assert worker.channel is not None
        worker.slot.clear()
        if worker.lent_files:
            self.take_back(worker, [])
        if worker.reusable_files and message["op"] == "run":
            message["reuse"] = worker.lent_files = list(worker.reusable_files)
            worker.reusable_files.clear()
        for earlier in worker.outbox:
            self._send(worker, earlier)
        worker.outbox.clear()
        self._seq += 1
        worker.seq = self._seq
        if worker.mailbox.task.write(message):
            worker.status[SENT] = worker.sent_count
            worker.status[TASK] = worker.seq
            self._assigned.append(worker)
        else:
            self._send(worker, {**message, "seq": worker.seq})
        if self._look_at is None:
            self._look_at = time.monotonic() + STOPPED

    def wake(self) -> None:
        """Wake the workers that have got work: one by its bell, more by one beat of the broadcast, idle ones included.

        The system wakes them on all processors so; those that were called one after the other often shared one. 16
        workers called by 16 doorbell took 0.13 of the 0.52 ms of a round (31 KB each way).
        """
        assigned, self._assigned = self._assigned, []
        if len(assigned) > 1:
            os.write(self._broadcast, ONE)
        elif assigned and assigned[0].channel is not None:  # else it has ended meanwhile
            assigned[0].channel.ring()

    def tell(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        """Let a worker know, at the latest before its next work."""
        if worker.idle and worker.channel is not None:
            self._send(worker, message)
        else:
            worker.outbox.append(message)

    def _send(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        assert worker.channel is not None
        worker.sent_count += 1
        worker.channel.send(message)

    def _on_answers(self) -> None:
        """Some workers have left their answers in their pages."""
        os.read(self._answered, CALLS_READ)
        answered = [worker for worker in self.workers if worker.seq and worker.status[DONE] == worker.seq]
        self._on_prints()
        answers = []
        for worker in answered:
            if self._muted:
                self._read_out(worker)
            try:
                answers.append((worker, worker.mailbox.answer.read()))
            except Exception:  # noqa: BLE001  user code has written there
                self._kill(worker)
        self.events.on_answers(answers)

    def _kill(self, worker: WorkerHandle) -> None:
        if worker.pid is not None:
            _signal(worker.pid, signal.SIGKILL)

    def take_back(self, worker: WorkerHandle, used: list[Optional[str]]) -> None:
        """Remove the files that a worker might have written to again and has not."""
        for path in set(worker.lent_files).difference(filter(None, used)):
            remove(path)
        worker.lent_files = []

    def rest(self, worker: WorkerHandle) -> None:
        """The worker has answered."""
        worker.seq = 0
        if self._interrupted:
            self._interrupted.discard(worker.index)
            worker.kill_at = None

    def interrupt(self, worker: WorkerHandle, now: float) -> None:
        """Stop what the worker does: KeyboardInterrupt in user code, SIGKILL if that does not help in time."""
        if worker.seq and worker.kill_at is None and worker.pid is not None:
            worker.status[CANCELLED] = worker.seq
            worker.kill_at = now + GRACE
            self._interrupted.add(worker.index)
            _signal(worker.pid, signal.SIGINT)

    def next_deadline(self) -> Optional[float]:
        if not self._interrupted:
            return self._look_at
        due = [self.workers[index].kill_at or 0.0 for index in self._interrupted]
        return min(due if self._look_at is None else [*due, self._look_at])

    def on_timer(self, now: float) -> None:
        for worker in [self.workers[index] for index in self._interrupted]:
            if worker.kill_at is not None and worker.kill_at <= now and worker.pid is not None:
                worker.kill_at = None
                self._interrupted.discard(worker.index)
                self._kill(worker)
        if self._look_at is not None and self._look_at <= now:
            self._look_for_stopped(now)

    def _look_for_stopped(self, now: float) -> None:
        """Nobody waits for ever for a worker that somebody has stopped: its work goes to another process."""
        busy = [worker.pid for worker in self.workers if worker.seq and worker.pid is not None]
        stopped = {pid for pid in busy if _is_stopped(pid)}
        for pid in stopped & self._stopped:
            _signal(pid, signal.SIGKILL)
        self._stopped = stopped
        self._look_at = now + STOPPED if busy else None

    # Stopping

    def close(self) -> None:
        """Stop everything: idle workers by the closed bell, the rest by the parent, which then removes the files."""
        idle = {worker.pid for worker in self.workers if worker.idle}
        for worker in self.workers:
            self._let_go(worker)
        if self.parent is not None:
            self._wake_parent()
            self._await_exits(self.parent, idle, time.monotonic() + LEAVE)
            self._forget_parent()
        if self.process is not None:
            self.process.wait()
        for worker in self.workers:
            worker.slot.borrowed.clear()  # they refer to it, and so to its memory
        self.workers.clear()
        self._slots = Mapped("", memoryview(b""))
        for file in (self._answered, self._prints):
            self._unregister(file)
        self._prints.close()
        for fd in (self._answered, self._answering, self._broadcast):
            os.close(fd)
        at_fork.discard(self)

    def abandon(self) -> None:
        """In a fork of the program: close the copies of descriptors whose end is to tell of the program's end."""
        fds = [self._broadcast, self._answered, self._answering, self._prints.fileno(), self.parent_output] + (
            [self.parent.detach()] if self.parent is not None else []
        )
        for worker in self.workers:
            fds += worker.outputs
            for channel in (worker.channel, worker.modules):
                fds += [] if channel is None else [channel.read_fd, channel.write_fd]
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _await_exits(self, parent: socket.socket, pids: set[Optional[int]], deadline: float) -> None:
        while pids and (left := deadline - time.monotonic()) > 0:
            parent.settimeout(left)
            try:
                news = parent.recv(NEWS.size, socket.MSG_WAITALL)
            except OSError:
                return
            if not news:
                return
            what, _, pid, _ = NEWS.unpack(news)
            if what == EXITED:
                pids.discard(pid)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].startswith(b"T")
    except OSError:
        return False


def how_it_ended(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed by signal {-code}"
