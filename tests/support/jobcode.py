"""What tests of executors, pools and joblib have workers call."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import warnings

import numpy as np

from gates import announce, wait_at


def multiply(x, y):
    return x * y


def give(*args, **kwargs):
    return args, kwargs


class Thing:
    def method(self):
        return "done"


def make_thing(_):
    return Thing()


def fail():
    raise RuntimeError(123)  # as it stands here


def fail_with(kind):
    raise kind("failed")


def fail_at(index, wrong):
    if index == wrong:
        raise ValueError(f"item {index}")
    return index


def tell_and_wait(told, gate, value=None):
    announce(told, value)
    wait_at(gate)
    return value


def maybe_wait(gate):
    if gate is not None:
        wait_at(gate)


def tell(path, value):
    announce(path, value)
    return value


# State of a worker process

state = "none"


def set_state(value):
    global state
    state = value


def get_state():
    return state


def fail_to_start():
    raise ValueError("cannot start here")


# Ends of a worker


def crash(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_and_crash(gate):
    wait_at(gate)
    crash()


def leave():
    sys.exit(1)


def make(kind):
    return kind()


class CrashesWhenPickled:
    def __reduce__(self):
        crash()


class CrashesWhenLoaded:
    def __reduce__(self):
        return crash, ()


class LeavesWhenPickled:
    def __reduce__(self):
        leave()


class LeavesWhenLoaded:
    def __reduce__(self):
        return leave, ()


class FailsWhenPickled:
    def __reduce__(self):
        raise pickle.PicklingError("cannot be pickled")


class FailsWhenLoaded:
    def __reduce__(self):
        return fail_with, (pickle.UnpicklingError,)


class TellsItsEnd:
    def __init__(self, path):
        self.path = path

    def __del__(self):
        if self.path:
            announce(self.path, os.getpid())


# joblib


def square(x):
    return x * x


def total_and_writable(array):
    return float(np.sum(array)), bool(array.flags.writeable)


def active_backend():
    from joblib.parallel import get_active_backend

    backend, n_jobs = get_active_backend()
    return type(backend).__name__, n_jobs


def nested(depth, n_jobs):
    """The names of the back-ends at each depth, and the processes and threads that the innermost calls ran in."""
    import joblib

    here = [active_backend()[0]]
    if not depth:
        return here, {(os.getpid(), threading.get_ident())}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = joblib.Parallel(n_jobs=n_jobs)(joblib.delayed(nested)(depth - 1, n_jobs) for _ in range(4))
    return here + results[0][0], set.union(*(places for _, places in results))


def thread_limits():
    import threadpoolctl

    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()], [os.environ.get(name) for name in names]


def add_in_threads(n_jobs):
    import joblib

    return joblib.effective_n_jobs(n_jobs)


def fail_in_nested(wrong):
    import joblib

    joblib.Parallel(n_jobs=2)(joblib.delayed(fail_at)(i, wrong) for i in range(5))


def with_qjam():
    import joblib

    import qjam.joblib

    qjam.joblib.register()
    return joblib.Parallel(n_jobs=2, backend="qjam")(joblib.delayed(square)(i) for i in range(10))
