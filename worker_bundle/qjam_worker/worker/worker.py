"""One worker process: wait for a task, map, fold, answer. User code runs here and nowhere else."""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Callable, NoReturn, Optional, TypeVar

from qjam_worker import importing
from qjam_worker.ipc import shortage
from qjam_worker.ipc.file_slices import FileSlice
from qjam_worker.ipc.files import Files, map_file
from qjam_worker.ipc.mailbox import (
    ALONE,
    AWAKE,
    CANCELLED,
    DONE,
    MAILBOX,
    RUNNING,
    SENT,
    SLICE,
    TASK,
    Mailbox,
    mailbox_name,
)
from qjam_worker.ipc.pipes import Channel
from qjam_worker.ipc.slots import SLOT
from qjam_worker.task import Task, set_current
from qjam_worker.values import segmented_sum
from qjam_worker.values.reduction import Span, Tree, default_reduce

from .application import Code
from .calls import Calls
from .code_loader import CodeLoader, Job
from .detach import detached, encoded
from .doorbell import Doorbell
from .exceptions import describe
from .forks import end_as_a_fork, has_children
from .memory_limit import MemoryLimit
from .process_state import ProcessState, bare_signal
from .public_face import PublicFace
from .result_writer import ResultWriter, Where
from .slice_cache import SliceCache, decoded
from .streams import flush_streams, open_streams, out_of_the_way, restore_streams
from .user_modules import ShippedModules

# Seconds until user code that was to be interrupted in an import is interrupted again.
IMPORT_PAUSE = 0.02
# Calls within calls, without which python's own libraries are of no use.
MIN_CALLS = 200

_SIGINT = (int(signal.SIGINT),)

Results = list[tuple[Span, Any]]
T = TypeVar("T")

_SHORT = frozenset(["done", "called"])  # answers that go through the mailbox


def main(index: int, fds: list[int], files: Files, memory_limit: Optional[int] = None, here: bool = False) -> int:
    """Serve one node until it closes its end of the pipe; returns the exit status.

    `fds`: the pipe of messages to this worker, the broadcast that wakes all workers, the pipe of messages from it, the
    pipe that wakes the node for answers in mailboxes, the pipe of requested modules, stdout, stderr. `here`: whether
    this is the master's machine.
    """
    try:
        _settle(*fds[5:])
        messages, broadcast, answer, answered, modules = map(out_of_the_way, fds[:5])
        doorbell = Doorbell(messages, broadcast, answered)
        worker = Worker(index, Channel(messages, answer), Channel(modules, -1), files, doorbell, memory_limit, here)
    except OSError as error:
        raise SystemExit(f"a worker process cannot start: {shortage.told(error)}") from error
    return worker.serve()


def _settle(out: int, err: int) -> None:
    importing.in_worker = True
    open_streams(out, err)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the fork server


class Worker:
    """Does the tasks of one node, one at a time. `answers`: where its requests for modules are answered."""

    def __init__(
        self,
        index: int,
        channel: Channel,
        answers: Channel,
        files: Files,
        doorbell: Doorbell,
        memory_limit: Optional[int] = None,
        here: bool = False,
    ) -> None:
        self.channel = channel
        self.answers = answers
        self.pid = os.getpid()
        self.files = files
        self.index = index
        self.mailbox = Mailbox(map_file(files.find(mailbox_name(index)), MAILBOX, write=True))
        self.status = self.mailbox.words
        self.doorbell = doorbell
        self.heard = 0  # messages that were read from the pipe
        self.seq = 0  # of the task that was done last
        self.ended = self.awake_until = 0.0  # when it was done; until when to wait awake for the next one
        self.slots: dict[str, memoryview] = {}  # of params
        self.results = ResultWriter(files, index, self._give_up)
        self.slices = SliceCache(self._map_file, self._give_up)
        modules = ShippedModules(self.ask, os.path.join(files.directories[-1], "packages"), here)
        modules.install()
        PublicFace().install()
        self.loader = CodeLoader(modules, self._map_file)
        self.memory = MemoryLimit(memory_limit)
        self.state = ProcessState()
        self.calls = Calls(index, files, self, self.memory.limit)
        self.large_params: Optional[weakref.ref[Any]] = None  # the map of those of this task
        self.interruptible = False
        self.ask_lock = threading.Lock()
        self.operations: dict[str, Callable[[dict[str, Any]], None]] = {
            "job": self.on_job,
            "run": self.on_run,
            "fold": self.on_fold,
            "calls": self.on_calls,
            "drop": self.on_drop,
            "forget": self.on_forget,
        }

    def serve(self) -> int:
        """Do tasks until the node closes the pipe; the exit status."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        self.channel.send({"op": "ready", "pid": self.pid})
        words, task = self.mailbox.words, self.mailbox.task
        try:
            while True:
                seq = words[TASK]
                if seq <= self.seq:  # it is lower where the last task came through the pipe
                    if self.awake_until and time.monotonic() < self.awake_until:
                        os.sched_yield()
                    elif self.doorbell.wait():
                        self._hear()
                    continue
                began = time.monotonic()
                while self.heard < words[SENT]:
                    self._hear()
                self.seq = seq
                self._do(task.read())
                ended, self.awake_until = time.monotonic(), 0.0
                if words[ALONE] and began - self.ended < AWAKE:
                    self.awake_until = ended + AWAKE
                self.ended = ended
        except EOFError:
            return 0

    def _hear(self) -> None:
        for message in self.channel.receive():
            if message is not None:
                self.heard += 1
                self.seq = message.get("seq", self.seq)
                self._do(message)

    def _do(self, message: dict[str, Any]) -> None:
        self.operations[message["op"]](message)

    # What the node says

    def on_job(self, message: dict[str, Any]) -> None:
        self.loader.jobs[message["job"]] = Job.described(message)

    def on_forget(self, message: dict[str, Any]) -> None:
        self.loader.forget(message["job"])

    def on_drop(self, message: dict[str, Any]) -> None:
        for path in message["paths"]:
            self.slices.drop(path if type(path) is str else FileSlice.of(path))
            if type(path) is str:
                self.calls.drop(path)

    def on_run(self, message: dict[str, Any]) -> None:
        self._answer(message, self._map)

    def on_fold(self, message: dict[str, Any]) -> None:
        self._answer(message, self._fold)

    def on_calls(self, message: dict[str, Any]) -> None:
        """Run calls as long as there are any."""
        self.status[SLICE] = -1
        self.status[RUNNING] = self.seq
        try:
            fit = self.calls.serve(self.seq, message["pipe"], message["seconds"])
        except OSError as error:
            self._give_up(error)
        self._end({"op": "called"}, fit=fit and self.memory.come_back())

    # Running user code

    def _answer(self, message: dict[str, Any], work: Callable[[dict[str, Any], Job, Code], Results]) -> None:
        """Do the work and answer: done with the roots, cancelled, or the error that user code raised."""
        status, seq, number = self.status, self.seq, message["job"]
        status[SLICE] = -1
        status[RUNNING] = seq
        self.results.begin()
        job = self.loader.jobs[number]
        fit = job.function == self.state.function or self.state.enter(job.function)
        if self.memory.holds:
            self.memory.hold()
        try:
            self.interruptible = True
            if status[CANCELLED] == seq or not fit:
                raise KeyboardInterrupt
            code = self._code(number)
            roots = [self._root(span, value) for span, value in work(message, job, code)]
            self.interruptible = False
            answer: dict[str, Any] = {"op": "done", "roots": roots}
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001  whatever user code raises is the answer
            self.interruptible = False
            set_current(None)
            if os.getpid() != self.pid:
                end_as_a_fork(error)
            self.memory.relax()
            if status[CANCELLED] == seq or not fit:
                answer = {"op": "cancelled"}
            else:
                at = status[SLICE] if status[SLICE] >= 0 else None
                answer = {"op": "error", "slice": at, **describe(error, self.memory.limit)}
        if self.memory.holds:
            self.memory.relax()
        if answer["op"] != "done":
            self.results.discard()
        self._end(answer, fit=fit and (answer["op"] == "done" or self.memory.come_back()))

    def _end(self, answer: dict[str, Any], fit: bool) -> None:
        """Give the answer, and leave if this process is not fit for another task."""
        flush_streams()
        if not (fit and _sound()):
            answer["leaving"] = True
        try:
            restore_streams()
            self.status[RUNNING] = 0
            self._tell(answer)
        except OSError as error:  # user code has closed all descriptors
            self._give_up(error)
        if "leaving" in answer:
            raise SystemExit
        self._listen()

    def _code(self, number: int) -> Code:
        return self._loaded(lambda: self.loader.code(number)) if self.state.imports else self.loader.code(number)

    def _loaded(self, load: Callable[[], T]) -> T:
        """Load user code. What its modules set when they are first imported holds for all functions."""
        before = self.loader.epoch, len(sys.modules)
        try:
            code = load()
            self.state.imports = False
            return code
        finally:
            if before != (self.loader.epoch, len(sys.modules)):
                self.state.adopt()

    # For calls

    def load(self, entry: dict[str, Any], code: Optional[bytes]) -> tuple[Callable[..., Any], frozenset[str]]:
        """A function, and the keys of the classes that have come with it."""
        return self._loaded(lambda: self.loader.function(entry, code))

    def enter(self, function: Hashable) -> bool:
        """User code of this function, or group of functions, is about to run; False where that cannot be."""
        return function == self.state.function or self.state.enter(function)

    def hold_memory(self) -> None:
        if self.memory.holds:
            self.memory.hold()

    def relax_memory(self) -> None:
        if self.memory.holds:
            self.memory.relax()

    def wake_node(self) -> None:
        self.doorbell.answer()

    def _tell(self, answer: dict[str, Any]) -> None:
        """Answer the task: in the mailbox if the answer fits. The answer says whether user code keeps a part of large
        params; their file is then not used again.
        """
        if self.large_params is not None:
            if self.large_params() is not None or has_children():
                answer["keeps"] = True
            self.large_params = None
        if answer["op"] in _SHORT and "leaving" not in answer and self.mailbox.answer.write(answer):
            self.status[DONE] = self.seq
            try:
                self.doorbell.answer()
            except OSError:
                self.status[DONE] = 0
                raise
        else:
            self.channel.send({**answer, "seq": self.seq})

    def _listen(self) -> None:
        """Make the process interruptible again, whatever user code has done to the signal."""
        if bare_signal.getsignal(_SIGINT[0]) != self._on_interrupt:
            signal.signal(signal.SIGINT, self._on_interrupt)
        bare_signal.pthread_sigmask(bare_signal.SIG_UNBLOCK, _SIGINT)

    def _map(self, message: dict[str, Any], job: Job, code: Code) -> Results:
        self.results.reuse(message.get("reuse", ()))
        packed = self._params(*message["params"])
        slices, nslices = message["slices"], message["nslices"]
        if len(slices) == 1:
            return [self._map_one(slices[0], nslices, packed, job, code)]
        tree: Tree[Any] = Tree(nslices)
        for place in slices:
            span, result = self._map_one(place, nslices, packed, job, code)
            tree.add(span, detached(result))
            tree.fold_from(span, code.reduce)
        return sorted(tree.values.items(), key=lambda item: item[0])

    def _map_one(self, place: Sequence[Any], nslices: int, packed: Any, job: Job, code: Code) -> tuple[Span, Any]:
        index, path, size, attempt = place
        self.status[SLICE] = index
        # They are decoded anew for each slice, so that none sees what another has done to them.
        params = decoded(packed)
        part = None if path is None else self.slices.get(path, size)
        set_current(Task(index, nslices, self.index, job.host, attempt))
        result = code.mapfunc(params, part, index)
        set_current(None)
        return (index, index + 1), result

    def _fold(self, message: dict[str, Any], job: Job, code: Code) -> Results:
        if "part" in message:
            self._fold_part(message)
            return []
        tree: Tree[Any] = Tree(message["nslices"])
        for lo, hi, path, plain, size in message["items"]:
            self.status[SLICE] = lo
            # User code may change its operands: the + of a class, too.
            copy = not plain or code.reduce is not default_reduce
            tree.add((lo, hi), decoded(self._map_file(path, size), copy))
        tree.fold(code.reduce)
        return sorted(tree.values.items(), key=lambda item: item[0])

    def _fold_part(self, message: dict[str, Any]) -> None:
        flats = {(lo, hi): self._map_file(path, size) for lo, hi, path, _, size in message["items"]}
        self.status[SLICE] = min(flats)[0]
        out = self._map_file(message["out"], max(map(len, flats.values())), write=True)
        segmented_sum.add_up(flats, message["nslices"], out, *message["part"])

    def _params(self, path: str, size: int) -> Any:
        """The flat params: copied out of a slot, which the next round writes to, or mapped."""
        if size > SLOT:
            mapped = self._map_file(path, size)
            self.large_params = weakref.ref(mapped.obj)
            return mapped
        slot = self.slots.get(path)
        if slot is None:
            slot = self.slots[path] = self._map_file(path, SLOT)
        return memoryview(slot[:size].tobytes())

    def _root(self, span: Span, value: Any) -> tuple[int, int, bool, Where]:
        self.status[SLICE] = span[0]
        result = encoded(value)
        return span[0], span[1], result.plain, self.results.put(result)

    def _map_file(self, path: str, size: int, write: bool = False) -> memoryview:
        try:
            return map_file(path, size, write)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and os.path.exists(self.results.slot_path):
                raise  # it is gone for every process: the round is over, as this one is about to hear
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        """User code has spoilt this process (taken all file descriptors, say): another process takes its place."""
        if self.status[CANCELLED] == self.status[RUNNING] != 0:
            raise KeyboardInterrupt  # the files of this round are gone
        raise SystemExit(f"this worker process cannot go on, and another takes its place: {shortage.told(error)}")

    def ask(self, name: str) -> Optional[dict[str, Any]]:
        """Ask the master, through the node, for a module of the user's project; None where there is none.

        The answer comes through a pipe of its own, because a thread of user code may ask at any time, also between
        tasks. A child process of user code cannot ask: it would take its parent's answers.
        """
        if os.getpid() != self.pid:
            return None
        interruptible = self.interruptible and threading.current_thread() is threading.main_thread()
        if interruptible:
            self.interruptible = False
        with self.ask_lock:
            self.memory.relax()  # half an answer could not be given back
            self.channel.send({"op": "import", "name": name, "epoch": self.loader.epoch})
            message = self.answers.wait()
            while message.get("name", name) != name:  # the process before this one had asked for it
                message = self.answers.wait()
            if self.status[RUNNING]:
                self.memory.hold()
        if interruptible:
            self.interruptible = True
            if self._is_stopped():
                self._interrupt_later()
        found: Optional[dict[str, Any]] = message["module"]
        return found

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if not (self.interruptible and self._is_stopped()):
            return
        if importing.importing(frame) is None:
            raise KeyboardInterrupt
        self._interrupt_later()

    def _is_stopped(self) -> bool:
        return self.status[CANCELLED] == self.status[RUNNING] or self.calls.stopped

    def _interrupt_later(self) -> None:
        """An import goes on first: what python would leave of a package cannot be imported again. If that takes too
        long, the node kills this process.
        """

        def interrupt() -> None:
            time.sleep(IMPORT_PAUSE)
            os.kill(self.pid, signal.SIGINT)

        try:
            _thread.start_new_thread(interrupt, ())  # a Thread would take locks, and this is a signal handler
        except RuntimeError:
            pass  # no more threads


_this_module = sys.modules[__name__]


def _sound() -> bool:
    """Whether python itself is fit for another task."""
    return sys.modules.get(__name__) is _this_module and sys.getrecursionlimit() >= MIN_CALLS
