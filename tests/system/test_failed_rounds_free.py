"""A round that has failed keeps nothing of its params alive: no cycle of error, traceback and frame, here or there."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from gates import Gate
from qjam import BaseDataSet, DataSet, Master, QjamError
from ssh_hosts import home, ssh_host  # noqa: F401


class Unmakeable(BaseDataSet):
    """Its second slice cannot be made when it is wanted."""

    def __init__(self):
        self.made = 0

    def chunks(self):
        return 2

    def slice(self, index):
        self.made += 1
        if self.made > 2:
            raise ValueError("the disk is gone")
        return [index]


FAILURES = {
    "raises": (usercode.raise_no, [1]),
    "raises in one of two": (usercode.raise_no, [1, 2]),
    "exits": (usercode.die_always, [1]),
    "gives what cannot be sent": (usercode.give_what_cannot_be_added, [1, 2]),
    "takes too long": (usercode.linger_forever, [1]),
    "has no data": (usercode.give_params, Unmakeable),
}


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def master():
    with Master(2) as master:
        master.run(usercode.forty_two)
        yield master


def dataset(made):
    return made() if callable(made) else DataSet(made, slice_size=1)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("how", ["run", "submit"])
@pytest.mark.parametrize("name", FAILURES)
def test_params_are_freed_here(master, name, how):
    function, data = FAILURES[name]
    timeout = 0.3 if name == "takes too long" else None
    params = np.zeros(1 << 20)
    gone = weakref.ref(params)
    try:
        if how == "run":
            master.run(function, params, dataset(data), timeout=timeout)
        else:
            master.submit(function, params, dataset(data), timeout=timeout).result()
    except (QjamError, ValueError):
        pass
    else:
        pytest.fail("it has not failed")
    del params
    assert_freed(master, gone)


@pytest.mark.usefixtures("no_collector")
def test_params_of_a_cancelled_round_are_freed_here(master, tmp_path):
    gate = Gate(tmp_path / "gate")
    params = [gate.path, Watched()]
    gone = weakref.ref(params[1])
    future = master.submit(lambda params, part: usercode.linger(params[0], part), params)
    gate.heard()
    future.cancel()
    with contextlib.suppress(CancelledError):
        future.result()
    gate.close()
    del params, future
    assert_freed(master, gone)


class Watched:
    """A part of params that shows when it is gone."""

    def __reduce__(self):
        return int, ()


def assert_freed(master, gone):
    """At once, or when the threads that have reported the failure have moved on."""
    master.run(usercode.forty_two)
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone() is None


@pytest.mark.parametrize("host", ["local", "testhost"])
def test_params_are_freed_in_the_worker(ssh_host, host):
    options = {} if host == "local" else {"ssh_config": ssh_host().config}
    with Master(f"{host}*1", **options) as master:
        for params in (usercode.Weak("params"), {"array": np.zeros(1 << 20)}):
            with contextlib.suppress(QjamError):
                master.run(usercode.watch_params_and_raise, params)
            assert master.run(usercode.watch_params_and_raise, None) == 1
