"""What a function may leave behind in its process: a change of each kind, and what shows it."""

from __future__ import annotations

import builtins
import decimal
import gc
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import warnings

import numpy as np


def _change_warnings():
    warnings.simplefilter("error")


def _replace_stdout():
    sys.stdout = open(os.devnull, "w")


def _shift_time():
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()


def _lower_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))


def _warned():
    try:
        warnings.warn("as an error?", stacklevel=1)
    except UserWarning:
        return True
    return False


def _of_one_core():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _umask():
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _stack_size():
    size = threading.stack_size()
    threading.stack_size(size)
    return size


def _with_profile():
    sys.setprofile(lambda frame, event, argument: None)


def _with_trace():
    sys.settrace(lambda frame, event, argument: None)


# By name: what changes it, and what shows it.
PUT_BACK = {
    "cwd": (lambda: os.chdir("/"), os.getcwd),
    "umask": (lambda: os.umask(0o077), _umask),
    "environ": (lambda: os.environ.update(LEAKED="1"), lambda: os.environ.get("LEAKED")),
    "environ, less": (lambda: os.environ.pop("PATH"), lambda: os.environ.get("PATH")),
    "time zone": (_shift_time, lambda: (time.tzname, os.environ.get("TZ"))),
    "locale": (lambda: locale.setlocale(locale.LC_ALL, "C"), lambda: locale.setlocale(locale.LC_CTYPE)),
    "sys.path": (lambda: sys.path.insert(0, "/nowhere"), lambda: list(sys.path)),
    "sys.meta_path": (lambda: sys.meta_path.append(None), lambda: len(sys.meta_path)),
    "sys.argv": (lambda: sys.argv.append("--leaked"), lambda: list(sys.argv)),
    "stdout": (_replace_stdout, lambda: sys.stdout.name),
    "stdin": (lambda: setattr(sys, "stdin", None), lambda: sys.stdin is None),
    "excepthook": (lambda: setattr(sys, "excepthook", print), lambda: sys.excepthook is print),
    "trace": (_with_trace, lambda: sys.gettrace() is None),
    "profile": (_with_profile, lambda: sys.getprofile() is None),
    "recursion limit": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "switch interval": (lambda: sys.setswitchinterval(0.5), sys.getswitchinterval),
    "gc": (gc.disable, gc.isenabled),
    "gc threshold": (lambda: gc.set_threshold(7), gc.get_threshold),
    "builtins": (lambda: setattr(builtins, "sum", len), lambda: sum([4, 5])),
    "builtins, more": (lambda: setattr(builtins, "leaked", 1), lambda: hasattr(builtins, "leaked")),
    "warnings": (_change_warnings, _warned),
    "decimal": (lambda: setattr(decimal.getcontext(), "prec", 3), lambda: str(decimal.Decimal(1) / 3)),
    "decimal traps": (
        lambda: decimal.getcontext().traps.update({decimal.Inexact: True}),
        lambda: decimal.getcontext().traps[decimal.Inexact],
    ),
    "logging": (lambda: logging.basicConfig(level=10), lambda: (len(logging.root.handlers), logging.root.level)),
    "logging, off": (lambda: logging.disable(50), lambda: logging.root.isEnabledFor(50)),
    "start method": (
        lambda: multiprocessing.set_start_method("spawn"),
        lambda: multiprocessing.get_start_method(allow_none=True),
    ),
    "socket timeout": (lambda: socket.setdefaulttimeout(3), socket.getdefaulttimeout),
    "thread stack size": (lambda: threading.stack_size(1 << 20), _stack_size),
    "numpy errors": (lambda: np.seterr(all="raise"), np.geterr),
    "numpy error callback": (lambda: np.seterrcall(print), lambda: np.geterrcall() is None),
    "numpy print options": (lambda: np.set_printoptions(precision=2), lambda: repr(np.array(1 / 3))),
    "signal handler": (
        lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        lambda: str(signal.getsignal(signal.SIGUSR1)),
    ),
    "signal handler of its own": (
        lambda: signal.signal(signal.SIGTERM, lambda number, frame: None),
        lambda: str(signal.getsignal(signal.SIGTERM)),
    ),
    "signal mask": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGALRM]),
        lambda: sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    ),
    "limit": (_lower_limit, lambda: resource.getrlimit(resource.RLIMIT_NOFILE)),
    "cores": (_of_one_core, lambda: sorted(os.sched_getaffinity(0))),
    "nice": (lambda: os.setpriority(os.PRIO_PROCESS, 0, 5), lambda: os.getpriority(os.PRIO_PROCESS, 0)),
}

# After these nobody can put the process right, or only root can.
REPLACED = {
    "closed stdout": (lambda: sys.stdout.close(), lambda: sys.stdout.closed),
    "deleted cwd": (lambda: None, os.getcwd),
    "user": (lambda: os.setuid(65534), os.getuid),
}


def change(name, part):
    (PUT_BACK | REPLACED)[name][0]()
    return os.getpid()


def look(name, part):
    return os.getpid(), repr((PUT_BACK | REPLACED)[name][1]())


def change_once(name, part):
    """Shows what it finds; the first time it changes it then."""
    found = look(name, part)
    if not hasattr(change_once, "done"):
        change_once.done = True
        change(name, part)
    return found


def start_a_timer(seconds, part):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def outlive(seconds, part):
    time.sleep(seconds)
    return os.getpid()


def seed(number, part):
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def draw(params, part):
    return random.random(), np.random.random()  # noqa: NPY002


def seed_once_and_draw(number, part):
    if not hasattr(seed_once_and_draw, "seeded"):
        seed_once_and_draw.seeded = True
        seed(number, part)
    return draw(number, part)


class Unloadable:
    """A function that cannot be loaded where it is sent."""

    def __call__(self, params, part):
        return None

    def __reduce__(self):
        return divmod, (1, 0)
