"""What user code changes in its process and nobody puts back: read and written when another function's turn comes.

A function finds on its next slices what it has set itself. What a module sets while a job's code is imported holds for
all functions, as in one program. Everything else is as it was when the worker began.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Hashable
from functools import partial
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

# Without what `signal` and `locale` wrap around them: a search for the names of signals takes 2 us.
bare_signal: Any = importlib.import_module("_signal")
_locale: Any = importlib.import_module("_locale")

KEPT = 16  # functions whose state is kept for their next turn

# SIGKILL and SIGSTOP cannot be handled, SIGINT is the worker's own.
_SIGNALS = sorted({int(number) for number in signal.valid_signals()} - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT})
_TIMERS = signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF
_LIMITS = [
    getattr(resource, f"RLIMIT_{name}")
    for name in ("AS", "CORE", "CPU", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC", "STACK")
    if hasattr(resource, f"RLIMIT_{name}")
]
_HOOKS = "stdin", "stdout", "stderr", "excepthook", "displayhook", "unraisablehook", "breakpointhook"


class Part(NamedTuple):
    """One kind of state. `write` raises where it cannot be put back; None: it never can."""

    name: str
    read: Callable[[], Any]
    write: Optional[Callable[[Any], Any]]


def _directory() -> Optional[str]:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _stack_size() -> int:
    size = threading.stack_size()  # which sets it to 0
    threading.stack_size(size)
    return size


def _set_handlers(handlers: tuple[Any, ...]) -> None:
    for number, handler in zip(_SIGNALS, handlers):
        if bare_signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _environment() -> dict[bytes, bytes]:
    data: dict[bytes, bytes] = os.environb._data.copy()  # type: ignore[attr-defined]  # noqa: SLF001  dict() takes 90 us
    return data


def _set_environment(wanted: dict[bytes, bytes]) -> None:
    for name in _environment().keys() - wanted.keys():
        del os.environb[name]
    os.environb.update(wanted)


def _set_import_system(wanted: tuple[Any, ...]) -> None:
    sys.path[:], sys.meta_path[:], sys.path_hooks[:] = wanted
    sys.path_importer_cache.clear()


def _set_arguments(wanted: tuple[str, ...]) -> None:
    sys.argv[:] = wanted


def _set_hooks(wanted: tuple[Any, ...]) -> None:
    for name, hook in zip(_HOOKS, wanted):
        setattr(sys, name, hook)
    threading.excepthook = wanted[-1]


def _set_trace(wanted: tuple[Any, Any]) -> None:
    sys.settrace(wanted[0])
    sys.setprofile(wanted[1])


def _set_collector(wanted: tuple[bool, Any, int]) -> None:
    (gc.enable if wanted[0] else gc.disable)()
    gc.set_threshold(*wanted[1])
    gc.set_debug(wanted[2])


def _set_builtins(wanted: dict[str, Any]) -> None:
    for name in vars(builtins).keys() - wanted.keys():
        delattr(builtins, name)
    vars(builtins).update(wanted)


def _set_warnings(wanted: tuple[Any, Any]) -> None:
    warnings.resetwarnings()
    warnings.filters.extend(wanted[0])  # type: ignore[attr-defined]
    warnings.showwarning = wanted[1]


def _set_numpy_errors(wanted: tuple[dict[str, Any], Any]) -> None:
    np.seterr(**wanted[0])
    np.seterrcall(wanted[1])


def _set_mask(wanted: set[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, wanted)


def _set_limits(wanted: tuple[tuple[int, int], ...]) -> None:
    for limit, value in zip(_LIMITS, wanted):
        if resource.getrlimit(limit) != value:
            resource.setrlimit(limit, value)


# Modules that a worker may never load: None is what they are as new.


def _decimal() -> Optional[tuple[Any, ...]]:
    decimal = sys.modules.get("decimal")
    if decimal is None:
        return None
    here, new = _of_context(decimal.getcontext()), _of_context(decimal.DefaultContext)
    return None if here == new else here


def _of_context(context: Any) -> tuple[Any, ...]:
    state = context.__reduce__()[1]
    return (*state[:6], [], *state[7:])  # without the flags, which any computation sets


def _set_decimal(wanted: Optional[tuple[Any, ...]]) -> None:
    import decimal

    decimal.setcontext(decimal.DefaultContext.copy() if wanted is None else decimal.Context(*wanted))


def _logging() -> Optional[tuple[Any, ...]]:
    root = getattr(sys.modules.get("logging"), "root", None)
    state = None if root is None else (tuple(root.handlers), root.level, root.manager.disable)
    return None if state == ((), 30, 0) else state


def _set_logging(wanted: Optional[tuple[Any, ...]]) -> None:
    import logging

    logging.root.handlers[:], level, disabled = wanted or ((), logging.WARNING, 0)
    logging.root.setLevel(level)
    logging.disable(disabled)


def _start_method() -> Optional[str]:
    multiprocessing = sys.modules.get("multiprocessing")
    return None if multiprocessing is None else multiprocessing.get_start_method(allow_none=True)


def _set_start_method(wanted: Optional[str]) -> None:
    import multiprocessing

    multiprocessing.set_start_method(wanted, force=True)


def _parts() -> list[Part]:
    """What is put back, in this order."""
    streams = sys.stdin, sys.stdout, sys.stderr
    return [
        Part("directory", _directory, os.chdir),
        Part("umask", _umask, os.umask),
        Part("environment", _environment, _set_environment),
        Part("time zone", lambda: (time.timezone, time.tzname), lambda wanted: time.tzset()),
        Part("locale", lambda: _locale.setlocale(_locale.LC_ALL, None), partial(_locale.setlocale, _locale.LC_ALL)),
        Part(
            "import system",
            lambda: (tuple(sys.path), tuple(sys.meta_path), tuple(sys.path_hooks)),
            _set_import_system,
        ),
        Part("arguments", lambda: tuple(sys.argv), _set_arguments),
        Part(
            "streams and hooks",
            lambda: (*[getattr(sys, name) for name in _HOOKS], threading.excepthook),
            _set_hooks,
        ),
        Part("closed streams", lambda: [stream.closed for stream in streams], None),
        Part("trace functions", lambda: (sys.gettrace(), sys.getprofile()), _set_trace),
        Part("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        Part("switch interval", sys.getswitchinterval, sys.setswitchinterval),
        Part("garbage collector", lambda: (gc.isenabled(), gc.get_threshold(), gc.get_debug()), _set_collector),
        Part("builtins", lambda: vars(builtins).copy(), _set_builtins),
        Part("warnings", lambda: (tuple(warnings.filters), warnings.showwarning), _set_warnings),
        Part("decimal context", _decimal, _set_decimal),
        Part("logging", _logging, _set_logging),
        Part("start method", _start_method, _set_start_method),
        Part("socket timeout", socket.getdefaulttimeout, socket.setdefaulttimeout),
        Part("thread stack size", _stack_size, threading.stack_size),
        Part("numpy errors", lambda: (np.geterr(), np.geterrcall()), _set_numpy_errors),
        Part("numpy print options", np.get_printoptions, lambda wanted: np.set_printoptions(**wanted)),
        Part("signal handlers", lambda: tuple(map(bare_signal.getsignal, _SIGNALS)), _set_handlers),
        Part("signal mask", partial(bare_signal.pthread_sigmask, signal.SIG_BLOCK, ()), _set_mask),
        Part("limits", lambda: tuple(map(resource.getrlimit, _LIMITS)), _set_limits),
        Part("cores", lambda: os.sched_getaffinity(0), lambda wanted: os.sched_setaffinity(0, wanted)),
        Part("priority", lambda: os.getpriority(os.PRIO_PROCESS, 0), partial(os.setpriority, os.PRIO_PROCESS, 0)),
        Part("user and group", lambda: (os.getuid(), os.geteuid(), os.getgid(), os.getegid()), None),
    ]


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  an object of the user's may compare as it likes
        return False


class _Generators:
    """The global generators of random and of numpy.random: what one function seeds decides nothing for another."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Any, Any]] = {}
        self._exchangeable = hasattr(np.random, "set_bit_generator")  # from numpy 1.24 on
        self._common: Any = None  # numpy's, of all functions that do not seed it
        if self._exchangeable:
            self._renew()

    def _renew(self) -> None:
        self._common = np.random.MT19937()
        np.random.set_bit_generator(self._common)  # type: ignore[attr-defined]

    def turn(self, before: Hashable, function: Hashable) -> None:
        """It is another function's turn."""
        _keep(self._kept, before, (random.getstate(), self._seeded()))
        state, bits = self._kept.pop(function, (None, None))
        if state is None:
            random.seed()
        else:
            random.setstate(state)
        if not self._exchangeable:
            np.random.seed()  # noqa: NPY002  user code may use the old generator
        elif bits is not None:
            np.random.set_bit_generator(bits)  # type: ignore[attr-defined]
        elif np.random.get_bit_generator() is not self._common:  # type: ignore[attr-defined]
            np.random.set_bit_generator(self._common)  # type: ignore[attr-defined]

    def _seeded(self) -> Any:
        """Numpy's generator if user code has seeded or exchanged it; then it is that function's own."""
        if not self._exchangeable:
            return None
        bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if bits is self._common:
            if bits._seed_seq is not None:  # noqa: SLF001  np.random.seed sets it to None
                return None
            self._renew()
        return bits


class ProcessState:
    """Gives each function the state that it had at the end of its last turn; to a new one, that of a new worker."""

    def __init__(self) -> None:
        self.function: Hashable = None  # whose turn it is
        self.imports = False  # whether its code is still to be loaded
        self._parts = _parts()
        self._new = self._read()
        self._kept: dict[Hashable, dict[int, Any]] = {}  # by function: what differs from a new worker, by part
        self._own: dict[int, Any] = {}  # the same of the one whose turn it is, when it began
        self._generators = _Generators()

    def _read(self) -> list[Any]:
        return [part.read() for part in self._parts]

    def enter(self, function: Hashable) -> bool:
        """It is this function's turn. False where the process cannot be put right."""
        for timer in _TIMERS:
            signal.setitimer(timer, 0)
        found, changed = self._read(), {}
        if not _same(found, self._new):
            changed = {at: value for at, value in enumerate(found) if not _same(value, self._new[at])}
        _keep(self._kept, self.function, changed)
        self._generators.turn(self.function, function)
        self.function, self.imports = function, function not in self._kept
        self._own = self._kept.pop(function, {})
        return not (changed or self._own) or self._put_back(found)

    def _put_back(self, found: list[Any]) -> bool:
        """Write what differs from what the function is to find; False where that cannot be done."""
        try:
            for at, part in enumerate(self._parts):
                wanted = self._own.get(at, self._new[at])
                if not _same(found[at], wanted):
                    if part.write is not None:
                        part.write(wanted)
                    if not _same(part.read(), wanted):
                        return False
        except Exception:  # noqa: BLE001  whatever the reason
            return False
        return True

    def adopt(self) -> None:
        """The function's code has been loaded: what has been set meanwhile, by its modules perhaps, holds for all."""
        for at, value in enumerate(self._read()):
            if not _same(value, self._own.get(at, self._new[at])):
                self._new[at] = value


def _keep(kept: dict[Hashable, Any], function: Hashable, what: Any) -> None:
    kept[function] = what
    if len(kept) > KEPT:
        del kept[next(iter(kept))]
