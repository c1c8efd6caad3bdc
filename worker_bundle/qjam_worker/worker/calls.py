"""Runs calls: takes one after the other from the host's queue, and leaves what they come to in the worker's ring."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Callable, NamedTuple, Optional, Protocol

import msgpack

from qjam_worker.ipc.arenas import MappedArenas
from qjam_worker.ipc.call_pipe import CallSource, Record
from qjam_worker.ipc.files import Files, map_file
from qjam_worker.ipc.mailbox import AWAKE
from qjam_worker.ipc.returns import CALL, IDLE, MAX_RECORD, RETURNS, STOP, YIELD, Ring, returns_name
from qjam_worker.ipc.slots import result_prefix
from qjam_worker.values import arguments, definitions
from qjam_worker.values.codec import CodecError
from qjam_worker.values.functions import names_of, sharing_globals
from qjam_worker.values.outcomes import AGAIN, BROKEN, IN_FILE, RAISED, STOPPED, VALUE

from .exceptions import describe
from .forks import end_as_a_fork
from .streams import flush_streams, out_of_the_way

# Seconds after which the node hears of what has been done meanwhile.
FLUSH = 0.002
# Seconds between two looks for room in a ring that the node has not read yet.
PAUSE = 0.0002
# Large parts of arguments that stay mapped.
MAX_MAPPED = 64
# Functions that are kept loaded.
MAX_FUNCTIONS = 256


Setup = tuple[dict[str, Any], Optional[bytes], bytes]


class Function(NamedTuple):
    """What a call calls, and the keys of the classes that have come with it."""

    call: Callable[..., Any]
    classes: frozenset[str]
    group: Group


class Group:
    """One submitter: its functions share the state of the process and, where there is a setup, which is called before
    the first of them, their globals. What the setup uses of these stays as the setup leaves it.
    """

    def __init__(self, number: int, has_setup: bool) -> None:
        self.key: Hashable = ("calls", number)
        self.globals: Optional[dict[str, dict[str, Any]]] = {} if has_setup else None
        self.kept: dict[str, dict[str, Any]] = {}  # of these, what the setup has set or uses
        self.ready = not has_setup

    def keep(self, before: dict[str, dict[str, Any]], names: set[str]) -> None:
        """The setup has been called, which uses these names."""
        for module, values in (self.globals or {}).items():
            had = before.get(module, {})
            self.kept[module] = {
                name: value
                for name, value in values.items()
                if name in names or name not in had or had[name] is not value
            }

    def restore(self) -> None:
        """Another function has brought its globals."""
        for module, values in self.kept.items():
            (self.globals or {})[module].update(values)


class Process(Protocol):
    """The worker, as far as calls need it."""

    pid: int
    interruptible: bool

    def load(self, entry: dict[str, Any], code: Optional[bytes]) -> tuple[Callable[..., Any], frozenset[str]]: ...
    def enter(self, function: Hashable) -> bool: ...
    def hold_memory(self) -> None: ...
    def relax_memory(self) -> None: ...
    def wake_node(self) -> None: ...


class SetupError(Exception):
    """The setup of a submitter has raised; the cause is what."""


class Calls:
    """The calls that this worker runs. `serve` runs them as long as there are any."""

    def __init__(self, index: int, files: Files, process: Process, memory_limit: int) -> None:
        self._index, self._files, self._process, self._memory_limit = index, files, process, memory_limit
        self._arenas = MappedArenas(files)
        self._functions: dict[int, Function] = {}
        self._groups: dict[int, Group] = {}
        self._large: OrderedDict[str, memoryview] = OrderedDict()  # parts of arguments, least recently used first
        self._source: Optional[CallSource] = None
        self._ring: Optional[Ring] = None
        self._made = 0
        self._emptied = 0.0  # when the queue was found to be empty, until another call comes
        self._gap = AWAKE  # seconds that passed then, the last time

    @property
    def stopped(self) -> bool:
        """Whether the call that runs is to be stopped."""
        return self._ring is not None and self._ring.words[CALL] == self._ring.words[STOP] != 0

    def serve(self, seq: int, pipe: str, seconds: Optional[float]) -> bool:
        """Run calls until there are none, for `seconds` at most, or until the node wants the worker for something else.
        False where this process cannot be put right for the next one.
        """
        ring, source = self._open(pipe)
        words = ring.words
        rung = time.monotonic()
        until = None if seconds is None else rung + seconds
        while (record := source.take() or self._await(seq, until)) is not None:
            words[CALL] = record.call
            began = time.monotonic() if self._emptied else 0.0
            how, data = self._run(record, words)
            words[CALL] = 0
            while not ring.put(record.call, how, data):
                self._process.wake_node()
                time.sleep(PAUSE)
            if how == AGAIN:
                return False
            now = time.monotonic()
            if self._emptied:
                self._gap, self._emptied = began - self._emptied, 0.0
            if words[YIELD] == seq or (until is not None and now >= until):
                break
            if now - rung >= FLUSH:
                rung = now
                flush_streams()
                self._process.wake_node()
        return True

    def _await(self, seq: int, until: Optional[float]) -> Optional[Record]:
        """The queue is empty: tell the node of what has returned, and wait for more for a moment, awake, if the last
        calls came close together. To end here and to be woken again takes longer than most calls.
        """
        assert self._ring is not None
        assert self._source is not None
        words, began = self._ring.words, time.monotonic()
        flush_streams()
        self._process.wake_node()
        end = began + AWAKE if self._gap < AWAKE else began
        record = None
        words[IDLE] = 1
        while record is None and words[YIELD] != seq and (now := time.monotonic()) < end:
            if until is not None and now >= until:
                break
            os.sched_yield()
            record = self._source.take()
        words[IDLE] = 0
        self._emptied = began
        return record

    def _open(self, pipe: str) -> tuple[Ring, CallSource]:
        if self._ring is None or self._source is None:
            self._ring = Ring(map_file(self._files.find(returns_name(self._index)), RETURNS, write=True))
            self._source = CallSource(out_of_the_way(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)))
        return self._ring, self._source

    def _run(self, record: Record, words: memoryview) -> tuple[int, bytes]:
        process = self._process
        try:
            function = self._functions.get(record.function) or self._load(record)
            if not process.enter(function.group.key):
                return AGAIN, b""
            process.hold_memory()
            process.interruptible = True
            if words[STOP] == record.call:
                raise KeyboardInterrupt
            args, kwargs = self._arguments(self._arenas.read(record.arena, record.offset, record.size))
            definitions.settle(function.classes)
            result = function.call(*args, **kwargs)
            if os.getpid() != process.pid:
                os._exit(0)  # a child of user code's has returned from it
            process.interruptible = False
            del args, kwargs
            process.relax_memory()
            return self._packed(result)
        except BaseException as error:  # noqa: BLE001  whatever user code raises is the answer
            process.interruptible = False
            if os.getpid() != process.pid:
                end_as_a_fork(error)
            process.relax_memory()
            if words[STOP] == record.call:
                return STOPPED, b""
            how = BROKEN if type(error) is SetupError else RAISED
            return how, self._described(error.__cause__ if how == BROKEN and error.__cause__ else error)

    def _load(self, record: Record) -> Function:
        size = int.from_bytes(self._arenas.read(record.function_arena, record.function_offset, 8), "little")
        packed = self._arenas.read(record.function_arena, record.function_offset + 8, size)
        entry, code, number, setup = msgpack.unpackb(packed, strict_map_key=False, unicode_errors="surrogatepass")
        group = self._groups.get(number)
        if group is None:
            group = self._groups[number] = Group(number, setup is not None)
        self._process.enter(group.key)
        with sharing_globals(group.globals):
            if not group.ready:
                self._prepare(group, *setup)
            call, classes = self._process.load(entry, code)
        group.restore()
        if len(self._functions) >= MAX_FUNCTIONS:
            self._functions.clear()
        function = self._functions[record.function] = Function(call, classes, group)
        return function

    def _arguments(self, packed: memoryview) -> Any:
        table, pickle = arguments.parts(packed)
        places = msgpack.unpackb(table) if table else ()
        return arguments.loads(pickle, [self._mapped(*place) for place in places])

    def _mapped(self, path: str, size: int) -> memoryview:
        view = self._large.get(path)
        if view is None:
            view = self._large[path] = map_file(path, size)
            if len(self._large) > MAX_MAPPED:
                self._large.popitem(last=False)
        else:
            self._large.move_to_end(path)
        return view

    def drop(self, path: str) -> None:
        """The file is gone."""
        self._large.pop(path, None)

    def _prepare(self, group: Group, entry: dict[str, Any], code: Optional[bytes], given: bytes) -> None:
        try:
            call, _ = self._process.load(entry, code)
            args, kwargs = self._arguments(memoryview(given))
            before = {module: dict(values) for module, values in (group.globals or {}).items()}
            call(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise SetupError from error
        group.keep(before, set(names_of(getattr(call, "__code__", None))))
        group.ready = True

    def _packed(self, result: Any) -> tuple[int, bytes]:
        try:
            data, buffers = arguments.dumps(result)
        except CodecError as error:
            if isinstance(error.__cause__, MemoryError):
                raise error.__cause__ from None
            raise arguments.NotPickled(f"the result of the call cannot be sent back: {error}") from error.__cause__
        if not buffers and len(data) < MAX_RECORD:
            return VALUE, data
        self._made += 1
        sizes = [len(data), *(buffer.nbytes for buffer in buffers)]
        mapped = self._files.create(f"{result_prefix(self._index, self._process.pid)}call{self._made}", sum(sizes))
        at = 0
        parts: list[Any] = [data, *buffers]
        for part, size in zip(parts, sizes):
            mapped.view[at : at + size] = part
            at += size
        packed: bytes = msgpack.packb([mapped.path, sizes])
        return IN_FILE, packed

    def _described(self, error: BaseException) -> bytes:
        told = describe(error, self._memory_limit)
        packed: bytes = msgpack.packb([told["text"], told["summary"], told["pickled"]], unicode_errors="surrogatepass")
        if len(packed) >= MAX_RECORD:  # a ring has no room for more
            short = told["text"][-MAX_RECORD // 8 :]
            packed = msgpack.packb([short, told["summary"], None], unicode_errors="surrogatepass")
        return packed
