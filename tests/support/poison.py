"""What no user code should do, but some does: the functions that tests hand to `run` by name."""

from __future__ import annotations

import atexit
import collections
import faulthandler
import gc
import itertools
import locale
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import numpy as np
from numpy.lib.stride_tricks import as_strided

# Ends of a worker


def end_by_faulthandler(params, part):
    faulthandler.dump_traceback_later(0.01, exit=True)
    signal.pause()


def become_another_program(params, part):
    os.execv("/bin/sh", ["sh", "-c", "exit 7"])


def kill_its_parent(params, part):
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()


def close_all_files(params, part):
    os.closerange(0, 65_536)


def close_all_files_but_its_streams(params, part):
    os.closerange(3, 65_536)


def limit_its_files_to_nothing(params, part):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return np.ones(100_000)


class ExitsWhilePickled:
    def __reduce__(self):
        sys.exit(4)


def give_what_exits_while_it_is_pickled(params, part):
    return ExitsWhilePickled()


def stop_its_parent_and_die(params, part):
    os.kill(os.getppid(), signal.SIGSTOP)
    os._exit(9)


# No end, and no ear for an interrupt


def count_in_c(params, part):
    collections.deque(itertools.repeat(1), maxlen=0)


def add_up_in_numpy(params, part):
    return as_strided(np.ones(1), (10**12,), (0,)).sum()


def block_interrupts(params, part):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    while True:
        signal.pause()


def stop_itself(params, part):
    os.kill(os.getpid(), signal.SIGSTOP)


STUBBORN = [count_in_c, add_up_in_numpy, block_interrupts, stop_itself]


def be_stubborn(params, part):
    return STUBBORN[part[0]](params, part)


# Results


def make_large(size, part):
    return np.full(size, part[0])


class Unpicklable:
    def __reduce__(self):
        raise ValueError("not to be pickled")


class InterruptsWhilePickled:
    def __reduce__(self):
        raise KeyboardInterrupt("while pickled")


class Endless:
    def __reduce__(self):
        return Endless, (self,)


def refuse(*arguments):
    raise ValueError("cannot be built")


class Unbuildable:
    def __reduce__(self):
        return refuse, ()


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class TwoItems(list):
    """A list that cannot be made from its items as one is."""

    def __init__(self, first, second):
        super().__init__([first, second])

    def __reduce__(self):
        return TwoItems, tuple(self)


# Exceptions


class ExitsWhenPickled(Exception):
    def __reduce__(self):
        sys.exit(5)


class ExitsWhenBuilt(Exception):
    def __reduce__(self):
        return sys.exit, (5,)


class ExitsWhenShown(Exception):
    def __str__(self):  # noqa: PLE0307
        sys.exit(6)


class TextThatIsNone(Exception):
    def __str__(self):
        return None  # noqa: PLE0307


class HasNothing(Exception):
    def __getattribute__(self, name):
        raise RuntimeError(name)


class CauseThatRaises(Exception):
    @property
    def __cause__(self):
        raise RuntimeError("no cause")


class OfNoKind(BaseException):
    pass


def raise_two_that_cause_each_other(params, part):
    first, second = ValueError("first"), TypeError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def raise_the_last_of_many(params, part):
    error = None
    for number in range(5000):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    raise error


def raise_one_that_holds_itself(params, part):
    error = ValueError("within")
    error.args = (error,)
    raise error


def raise_a_group(params, part):
    inner = ExceptionGroup("inner", [OSError(3)])  # noqa: F821  of python 3.11
    raise ExceptionGroup("outer", [ValueError("one of them"), inner])  # noqa: F821


def raise_a_group_of_ends(params, part):
    raise BaseExceptionGroup("ends", [KeyboardInterrupt(), SystemExit(3)])  # noqa: F821


def raise_a_syntax_error_of_no_line(params, part):
    raise SyntaxError("odd", ("file", "no line", None, 5))


# Children


def fork_and_return_twice(tally, part):
    with open(tally, "a") as file:
        file.write("x")
    os.fork()
    return sum(part)


def fork_and_raise_in_the_child(params, part):
    pid = os.fork()
    if pid == 0:
        raise ValueError("in the child")
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def fork_and_exit_in_the_child(params, part):
    pid = os.fork()
    if pid == 0:
        sys.exit("enough" if params is None else params)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def leave_children(part):
    """Gives the pids of children that stay, one of them in a session of its own whose parent has ended."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        pid = os.fork()
        if pid:
            os.write(write, str(pid).encode())
            os._exit(0)
        time.sleep(1000)
    forked = os.fork()
    if forked == 0:
        time.sleep(1000)
    return [int(os.read(read, 100)), forked, subprocess.Popen(["sleep", "1000"]).pid]


# Output


def print_in_mapfunc(size, part):
    for _ in range(size // 100_000):
        sys.stdout.write(("x" * 99 + "\n") * 1000)
    return 1


def print_in_a_child(size, part):
    command = f"import sys\nfor _ in range({size} // 100_000): sys.stdout.write(('x' * 99 + chr(10)) * 1000)"
    os.posix_spawn(sys.executable, [sys.executable, "-c", command], os.environ)
    return 1


def print_in_a_thread(size, part):
    threading.Thread(target=print_in_mapfunc, args=(size, part)).start()
    return 1


# Too much memory


def a_list(params, part):
    grown = []
    while True:
        grown.append(len(grown) + 1_000_000)


def texts(params, part):
    grown = []
    while True:
        grown.append("x" * (len(grown) % 300) + str(len(grown)))


def a_dict(params, part):
    grown = {}
    while True:
        grown[len(grown)] = str(len(grown))


def cycles(params, part):
    last = None
    while True:
        ring = [last]
        ring.append(ring)
        last = ring


def a_bytearray(params, part):
    grown = bytearray()
    while True:
        grown += b"x" * 1000


def one_array(params, part):
    return np.ones(10**9)


def many_arrays(params, part):
    grown = []
    while True:
        grown.append(np.ones(1000))


def what_it_keeps(params, part):
    kept = vars(sys).setdefault("kept", [])
    while True:
        kept.append("x" * 100_000)


def calls_within_calls(params, part):
    sys.setrecursionlimit(10**9)

    def call(depth):
        return call(depth + 1) + 1

    return call(0)


# What is left behind in the process


def leave(function, part):
    function()
    return 1


def stand_where_nothing_is():
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def ignore_children():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    subprocess.run(["true"], check=True)


def allow_no_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))


def allow_no_files_for_now():
    resource.setrlimit(resource.RLIMIT_NOFILE, (5, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def allow_no_long_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def become_another_user():
    try:
        os.setuid(12_345)
    except PermissionError:
        pass  # who is not root cannot


def have_no_path():
    sys.path[:] = []


def have_no_modules():
    sys.modules.clear()


def have_no_modules_of_ours():
    for name in [name for name in sys.modules if name.startswith(("qjam", "numpy"))]:
        del sys.modules[name]


def allow_few_calls():
    depth = len(traceback.extract_stack())
    sys.setrecursionlimit(depth + 20)


def hook_into_its_end():
    sys.excepthook = None
    atexit.register(time.sleep, 1000)


def be_woken_while_idle():
    signal.setitimer(signal.ITIMER_REAL, 0.02)


def be_nice():
    os.nice(19)
    gc.disable()
    os.umask(0o777)
    locale.setlocale(locale.LC_ALL, "C")
    faulthandler.enable()


def raise_in_a_thread():
    threading.Thread(target=lambda: 1 / 0).start()


def keep_a_thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()


def exit_in_a_thread():
    def end():
        time.sleep(0.02)
        os._exit(3)

    threading.Thread(target=end).start()


def stop_its_parent():
    os.kill(os.getppid(), signal.SIGSTOP)


def own_folders():
    with open("/proc/self/maps") as maps:
        return sorted(set(re.findall(r"(/\S*/qjam-[^/\s]+)/\S", maps.read())))


def remove_its_files():
    for folder in own_folders():
        for name in os.listdir(folder):
            if name.startswith(("result", "mailbox", "slots", "ref")):
                try:
                    os.unlink(os.path.join(folder, name))
                except FileNotFoundError:
                    pass  # another worker was faster


def leave_interrupts_blocked():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def alter_its_libraries():
    np.seterr(all="raise")
    os.environ.clear()


LEFT_BEHIND = [
    stand_where_nothing_is,
    ignore_children,
    allow_no_files,
    allow_no_files_for_now,
    allow_no_long_files,
    become_another_user,
    have_no_path,
    have_no_modules,
    have_no_modules_of_ours,
    allow_few_calls,
    hook_into_its_end,
    be_woken_while_idle,
    be_nice,
    raise_in_a_thread,
    keep_a_thread,
    exit_in_a_thread,
    stop_its_parent,
    remove_its_files,
    leave_interrupts_blocked,
    alter_its_libraries,
]
