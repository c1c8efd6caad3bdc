"""One worker process: wait for the bell, map, reduce, answer. User code runs here and only here."""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import os
import pickle
import random
import resource
import signal
import sys
import threading
import weakref
from collections import OrderedDict
from typing import Any, Callable, NamedTuple, NoReturn, Optional

import numpy as np

from qjam_worker.ipc import file_slices
from qjam_worker.ipc.files import Files, NoRoom, map_file, remove
from qjam_worker.ipc.mailbox import CANCELLED, DONE, MAILBOX, RUNNING, SENT, SLICE, TASK, Mailbox, mailbox_name
from qjam_worker.ipc.pipes import Channel
from qjam_worker.ipc.slots import SLOT, SLOTS, out_slot, result_prefix
from qjam_worker.values import codec, flat, segmented_sum
from qjam_worker.values.reduction import Span, Tree, default_reduce

from .doorbell import Doorbell
from .exceptions import describe, print_exception
from .memory_limit import MemoryLimit
from .streams import flush_streams, open_streams, out_of_the_way, restore_streams
from .user_modules import ShippedModules

# Slices that a worker keeps mapped: each map takes a file descriptor, of which there may be 1,024.
SLICES_MAPPED = 128

# Calls within calls, without which python's own libraries are of no use.
MIN_CALLS = 200

# What `signal` wraps in a search for the names of signals, which takes 2 us each time.
_bare_signal = importlib.import_module("_signal")
_SIGINT = (int(signal.SIGINT),)

Where = tuple[str, int, int]  # path, offset, size of a flat value
Results = list[tuple[Span, Any]]
MapFunction = Callable[[Any, Any], Any]
Reduce = Callable[[Any, Any], Any]


def main(index: int, fds: list[int], files: Files, memory_limit: Optional[int] = None) -> int:
    """Serve one node until it closes its end of the pipe; returns the exit status.

    `fds`: messages to this worker, the broadcast that wakes all workers at once, messages from it, the wake-up for
    answers in the mailbox, answers to imports, stdout, stderr.
    """
    _settle(*fds[5:])
    bell, broadcast, answer, answered, modules = map(out_of_the_way, fds[:5])
    doorbell = Doorbell(bell, broadcast, answered)
    return Worker(index, Channel(bell, answer), Channel(modules, -1), files, doorbell, memory_limit).serve()


def _settle(out: int, err: int) -> None:
    open_streams(out, err)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the warm parent
    # All workers were forked with one state of the generators; the same "random" numbers in each would be a trap.
    random.seed()
    np.random.seed()  # noqa: NPY002  user code may use the old generator


class Job(NamedTuple):
    """What to map with: the entry that names the code, and over how many slices."""

    entry: dict[str, Any]
    code: Optional[tuple[str, int]]
    nslices: int


class Code(NamedTuple):
    mapfunc: MapFunction
    reduce: Reduce


class Worker:
    def __init__(
        self,
        index: int,
        channel: Channel,
        answers: Channel,
        files: Files,
        doorbell: Doorbell,
        memory_limit: Optional[int] = None,
    ) -> None:
        self.channel = channel
        self.answers = answers
        self.pid = os.getpid()
        self.files = files
        self.index = index
        page = next(path for path in self._paths(mailbox_name(index)) if os.path.exists(path))
        self.mailbox = Mailbox(map_file(page, MAILBOX, write=True))
        self.status = self.mailbox.words
        self.doorbell = doorbell
        self.heard = 0  # messages
        self.seq = 0  # of the task in the page that was done last
        self.slot_path, self.slot = self._find_slot()
        self.slot_used = 0
        self.jobs: dict[int, Job] = {}
        self.codes: dict[int, Code] = {}
        self.slots: dict[str, memoryview] = {}
        self.slices: OrderedDict[Any, Any] = OrderedDict()  # by path: arrays, or maps of what is decoded anew
        self.modules = ShippedModules(self.ask)
        self.modules.install()
        self.memory = MemoryLimit(memory_limit)
        self.longest_file = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.epoch = 0
        self.made = 0
        self.written: dict[str, memoryview] = {}  # files with results of this task or of the last one
        self.reusable_files: dict[str, memoryview] = {}  # of these, those that may be written to again
        self.untold: list[str] = []  # names of the files with results of this task
        self.large_params: Optional[weakref.ref[Any]] = None  # the map of this task's
        self.interruptible = False
        self.ask_lock = threading.Lock()
        self.operations: dict[str, Callable[[dict[str, Any]], None]] = {
            "job": self.on_job,
            "run": self.on_run,
            "fold": self.on_fold,
            "drop": self.on_drop,
            "forget": self.on_forget,
        }

    def _find_slot(self) -> tuple[str, memoryview]:
        """A slot of its own, where there is one; else its part of the file that has all of them."""
        for name, first in ((out_slot(self.index), 0), (SLOTS, self.index * SLOT)):
            for path in self._paths(name):
                if os.path.exists(path):
                    return path, map_file(path, first + SLOT, write=True)[first:]
        raise FileNotFoundError(f"there is no slot for worker {self.index}")

    def _paths(self, name: str) -> list[str]:
        return [os.path.join(directory, name) for directory in self.files.directories]

    def serve(self) -> int:
        signal.signal(signal.SIGINT, self._on_interrupt)
        self.channel.send({"op": "ready", "pid": self.pid})
        words, task = self.mailbox.words, self.mailbox.task
        try:
            while True:
                seq = words[TASK]
                if seq <= self.seq:  # lower, when the last one came through the pipe
                    if self.doorbell.wait():
                        self._hear()
                    continue
                while self.heard < words[SENT]:
                    self._hear()
                self.seq = seq
                self._do(task.read())
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
        self.jobs[message["job"]] = Job(message["entry"], message["code"], message["nslices"])

    def on_forget(self, message: dict[str, Any]) -> None:
        self.jobs.pop(message["job"], None)
        self.codes.pop(message["job"], None)

    def on_drop(self, message: dict[str, Any]) -> None:
        for path in message["paths"]:
            self.slices.pop(path, None)

    def on_run(self, message: dict[str, Any]) -> None:
        self._answer(message, self._map)

    def on_fold(self, message: dict[str, Any]) -> None:
        self._answer(message, self._fold)

    # Running user code

    def _answer(self, message: dict[str, Any], work: Callable[[dict[str, Any], Job, Code], Results]) -> None:
        """Do the work and ring: done with the roots, cancelled, or the error that user code raised."""
        status, seq, number = self.status, self.seq, message["job"]
        status[SLICE] = -1
        status[RUNNING] = seq
        self.slot_used = 0
        self.untold.clear()
        if self.memory.holds:
            self.memory.hold()
        try:
            self.interruptible = True
            if status[CANCELLED] == seq:
                raise KeyboardInterrupt
            job = self.jobs[number]
            code = self.codes.get(number) or self._code(number, job)
            roots = [self._root(span, value) for span, value in work(message, job, code)]
            self.interruptible = False
            answer: dict[str, Any] = {"op": "done", "roots": roots}
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001  whatever user code raises is the answer
            self.interruptible = False
            if os.getpid() != self.pid:
                _end_as_a_fork(error)
            self.memory.relax()
            if status[CANCELLED] == seq:
                answer = {"op": "cancelled"}
            else:
                at = status[SLICE] if status[SLICE] >= 0 else None
                answer = {"op": "error", "slice": at, **describe(error, self.memory.limit)}
        if self.memory.holds:
            self.memory.relax()
        if answer["op"] != "done":
            self._remove_results()
        flush_streams()
        if not _sound() or (answer["op"] != "done" and not self.memory.come_back()):
            answer["leaving"] = True
        try:
            restore_streams()
            status[RUNNING] = 0
            self._tell(answer)
        except OSError as error:  # user code has closed all files
            self._give_up(error)
        if "leaving" in answer:
            raise SystemExit
        self._listen()

    def _tell(self, answer: dict[str, Any]) -> None:
        """Give the answer to the task: in the page, if it is like most. It tells whether user code keeps a part of
        large params, whose file is then left alone.
        """
        if self.large_params is not None:
            if self.large_params() is not None or _has_children():
                answer["keeps"] = True
            self.large_params = None
        if answer["op"] == "done" and "leaving" not in answer and self.mailbox.answer.write(answer):
            self.status[DONE] = self.seq
            try:
                self.doorbell.answer()
            except OSError:
                self.status[DONE] = 0
                raise
        else:
            self.channel.send({**answer, "seq": self.seq})

    def _listen(self) -> None:
        """Be interruptible again, whatever user code has done to the signal."""
        if _bare_signal.getsignal(_SIGINT[0]) != self._on_interrupt:
            signal.signal(signal.SIGINT, self._on_interrupt)
        _bare_signal.pthread_sigmask(_bare_signal.SIG_UNBLOCK, _SIGINT)

    def _map(self, message: dict[str, Any], job: Job, code: Code) -> Results:
        self.reusable_files = {path: self.written[path] for path in message.get("reuse", ()) if path in self.written}
        self.written = {}
        packed = self._params(*message["params"])
        slices = message["slices"]
        if len(slices) == 1:
            index, path, size = slices[0]
            return [self._map_one(index, path, size, packed, code)]
        tree: Tree[Any] = Tree(job.nslices)
        for index, path, size in slices:
            span, result = self._map_one(index, path, size, packed, code)
            tree.add(span, _kept(result))
            tree.fold_from(span, code.reduce)
        return sorted(tree.values.items(), key=lambda item: item[0])

    def _map_one(self, index: int, path: Any, size: int, packed: Any, code: Code) -> tuple[Span, Any]:
        self.status[SLICE] = index
        # Decoded anew for each slice, so that none sees what another has done to the params.
        params = _decoded(packed)
        return (index, index + 1), code.mapfunc(params, None if path is None else self._slice(path, size))

    def _fold(self, message: dict[str, Any], job: Job, code: Code) -> Results:
        if "part" in message:
            self._fold_part(message, job)
            return []
        tree: Tree[Any] = Tree(job.nslices)
        for lo, hi, path, offset, size in message["items"]:
            self.status[SLICE] = lo
            packed = self._map_file(path, offset + size)[offset:]
            tree.add((lo, hi), _decoded(packed, copy=code.reduce is not default_reduce))
        tree.fold(code.reduce)
        return sorted(tree.values.items(), key=lambda item: item[0])

    def _fold_part(self, message: dict[str, Any], job: Job) -> None:
        flats = {(lo, hi): self._map_file(path, size) for lo, hi, path, _, size in message["items"]}
        self.status[SLICE] = min(flats)[0]
        size = max(map(len, flats.values()))
        segmented_sum.add_up(flats, job.nslices, self._map_file(message["out"], size, write=True), *message["part"])

    def _params(self, path: str, size: int) -> Any:
        """The flat params: a copy where they lie in a slot, which the next round writes to."""
        if size > SLOT:
            mapped = self._map_file(path, size)
            self.large_params = weakref.ref(mapped.obj)
            return mapped
        slot = self.slots.get(path)
        if slot is None:
            slot = self.slots[path] = self._map_file(path, SLOT)
        return memoryview(slot[:size].tobytes())

    def _slice(self, path: Any, size: int) -> Any:
        """A slice; of an array a new view each time, because even a read-only one can be given another shape. `path` is
        that of its flat form, or a place in a file that is not of the node's making.
        """
        if type(path) is not str:
            path = file_slices.FileSlice.of(path)
            file_slices.check(path)
        known = self.slices.get(path)
        if known is None:
            load = self._loader(path, size)
            value = load()
            # What holds objects or named fields can be altered through any view of it.
            lasting = type(value) is np.ndarray and not value.dtype.hasobject and value.dtype.names is None
            known = self.slices[path] = value if lasting else load
            if len(self.slices) > SLICES_MAPPED:
                self.slices.popitem(last=False)
        else:
            self.slices.move_to_end(path)
        return known.view() if isinstance(known, np.ndarray) else known()

    def _loader(self, path: Any, size: int) -> Callable[[], Any]:
        """What gives a slice whenever it is called."""
        if isinstance(path, file_slices.FileSlice):
            try:
                return file_slices.loader(path)
            except OSError as error:
                self._give_up(error)
        return functools.partial(_decoded, self._map_file(path, size))

    def _root(self, span: Span, value: Any) -> tuple[int, int, bool, Where]:
        self.status[SLICE] = span[0]
        try:
            encoded = codec.encode(value)
        except codec.CodecError as error:
            if isinstance(error.__cause__, MemoryError):
                raise error.__cause__ from None
            raise TypeError(f"mapfunc or reduce gave a result that cannot be sent back: {error}") from None
        return span[0], span[1], encoded.plain, self._put(encoded)

    def _put(self, encoded: codec.Encoded) -> Where:
        offset = self.slot_used
        size = flat.put(encoded, self.slot[offset:])
        if size is not None:
            self.slot_used += (size + 63) & ~63
            return self.slot_path, offset, size
        size = flat.size(encoded)
        for path, view in self.reusable_files.items():
            if len(view) == size:
                self.written[path] = self.reusable_files.pop(path)
                flat.write(encoded, view)
                return path, 0, size
        self.made += 1
        self.untold.append(f"{result_prefix(self.index, self.pid)}{self.made}")
        try:
            mapped = self.files.create(self.untold[-1], size)
        except OSError as error:
            if isinstance(error, NoRoom) and resource.getrlimit(resource.RLIMIT_FSIZE) == self.longest_file:
                raise
            self._give_up(error)
        flat.write(encoded, mapped.view)
        self.written[mapped.path] = mapped.view
        return mapped.path, 0, size

    def _remove_results(self) -> None:
        """Those that were written before an error or an interrupt came."""
        for path in [path for name in self.untold for path in self._paths(name)]:
            remove(path)

    def _map_file(self, path: str, size: int, write: bool = False) -> memoryview:
        try:
            return map_file(path, size, write)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and os.path.exists(self.slot_path):
                raise  # it is gone for every process: the round is over, and this one is about to hear of it
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        """User code has spoilt this process, taken all file descriptors, say. One that is started anew is whole."""
        if self.status[CANCELLED] == self.status[RUNNING] != 0:
            raise KeyboardInterrupt  # the files of this round are gone
        raise SystemExit(f"this worker process cannot go on, and another takes its place: {error}")

    # Code

    def _code(self, number: int, job: Job) -> Code:
        if job.entry["epoch"] != self.epoch:
            self.modules.forget(job.entry["shadows"])
            self.epoch = job.entry["epoch"]
        mapfunc, reduce = self._load(job)
        self._stay_the_worker()
        own = reduce is default_reduce
        code = self.codes[number] = Code(self._guarded(mapfunc), reduce if own else self._guarded(reduce))
        return code

    def _guarded(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """A child process that user code has forked may return from it, but not answer in its parent's place."""

        def call(first: Any, second: Any) -> Any:
            result = function(first, second)
            self._stay_the_worker()
            return result

        return call

    def _stay_the_worker(self) -> None:
        if os.getpid() != self.pid:
            os._exit(0)

    def _load(self, job: Job) -> Code:
        entry = job.entry
        if job.code is not None:
            here = ".".join(map(str, sys.version_info[:2]))
            if entry["python"] not in (None, here):
                raise RuntimeError(
                    f"this function travels as byte code of python {entry['python']}, and this host has python {here}: "
                    "put it into a module, which travels as source"
                )
            mapfunc, reduce = pickle.loads(self._map_file(*job.code))
            _adopt(mapfunc)
            return Code(mapfunc, reduce or default_reduce)
        load: Callable[[str], Any] = self.modules.load if entry["shipped"] else importlib.import_module
        module = load(entry["module"])
        if entry["function"] is not None:
            return Code(functools.reduce(getattr, entry["function"].split("."), module), default_reduce)
        return Code(module.mapfunc, getattr(module, "reduce", default_reduce) if entry["reduce"] else default_reduce)

    def ask(self, name: str) -> Optional[dict[str, Any]]:
        """Ask the master, through the node, for a module of the user's project.

        The answer has a pipe of its own, because a thread of user code may ask at any time, also between tasks. A
        child that user code has forked cannot: it would take its parent's answers.
        """
        if os.getpid() != self.pid:
            return None
        interruptible = self.interruptible and threading.current_thread() is threading.main_thread()
        if interruptible:
            self.interruptible = False
        with self.ask_lock:
            self.memory.relax()  # half an answer cannot be given back
            self.channel.send({"op": "import", "name": name, "epoch": self.epoch})
            message = self.answers.wait()
            while message.get("name", name) != name:  # what the process before this one had asked for
                message = self.answers.wait()
            if self.status[RUNNING]:
                self.memory.hold()
        if interruptible:
            self.interruptible = True
            if self.status[CANCELLED] == self.status[RUNNING]:
                raise KeyboardInterrupt
        found: Optional[dict[str, Any]] = message["module"]
        return found

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if self.interruptible and self.status[CANCELLED] == self.status[RUNNING]:
            raise KeyboardInterrupt


def _has_children() -> bool:
    """Whether user code has forked, as far as the system tells: a child process has maps of its own."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def _adopt(mapfunc: MapFunction) -> None:
    """Let classes of the user's `__main__` be pickled by name, so that the master gets its own classes back."""
    main = vars(sys.modules["__main__"])
    for name, value in getattr(mapfunc, "__globals__", {}).items():
        if isinstance(value, type) and value.__module__ == "__main__":
            main[name] = value


_this_module = sys.modules[__name__]


def _sound() -> bool:
    """Whether python itself is as it should be for another task."""
    return sys.modules.get(__name__) is _this_module and sys.getrecursionlimit() >= MIN_CALLS


def _end_as_a_fork(error: BaseException) -> NoReturn:
    """As python ends: a child process that user code has forked did not catch this."""
    try:
        print_exception(error)
    finally:
        os._exit(1)


def _decoded(packed: memoryview, copy: bool = False) -> Any:
    try:
        return flat.load(packed, copy=copy)
    except codec.CodecError as error:
        if isinstance(error.__cause__, MemoryError):  # the value is whole, but too large for what is left
            raise error.__cause__ from None
        raise


def _kept(value: Any) -> Any:
    """A result that is kept while mapfunc is called again."""
    try:
        return detached(value)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  it holds itself, is nested beyond measure, or of a list's subclass of the user's
        return value


def detached(value: Any) -> Any:
    """The result with arrays of its own: the next call of mapfunc may write to the memory that this one gave."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        own = copy.copy(value)
        own.update((key, detached(item)) for key, item in value.items())
        return own
    if isinstance(value, (list, tuple)):
        make = getattr(type(value), "_make", type(value))  # a namedtuple takes its fields one by one
        return make([detached(item) for item in value])
    return value
