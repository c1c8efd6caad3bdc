"""Calls of functions in the workers, as Executor, Pool and the joblib back-end make them."""

from __future__ import annotations

import operator
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import pytest

import callcode
import pyzmq_garbage  # noqa: F401
from qjam import Master, MasterClosed, WorkerLost
from qjam.calls import Caller, CallFuture, CallLost
from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import write_config


@pytest.fixture(scope="module")
def pool() -> Iterator[Master]:
    with Master(2) as master:
        wait([master._caller().submit(callcode.add, (1,), {})])  # its threads are there from now on
        yield master


@pytest.fixture
def caller(pool: Master) -> Iterator[Caller]:
    made = pool._caller()
    yield made
    made.close(cancel=True)


def call(caller: Caller, function: Any, *args: Any, **kwargs: Any) -> CallFuture:
    return caller.submit(function, args, kwargs)


def eventually(told: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < until
        time.sleep(0.005)


# Values


def test_functions_of_all_kinds_are_called(caller):
    y = 5
    assert call(caller, callcode.add, 2, b=3).result() == 5
    assert call(caller, operator.neg, 3).result() == -3
    assert call(caller, lambda x: x + y, 1).result() == 6
    assert call(caller, int, "7").result() == 7
    assert call(caller, [3, 1, 2].index, 2).result() == 2


def test_many_calls_come_back_each_to_its_own_future(caller):
    futures = [call(caller, callcode.add, i, 1) for i in range(5000)]
    assert [future.result() for future in futures] == list(range(1, 5001))
    assert caller.outstanding == []


def test_results_of_the_callers_own(caller):
    array = call(caller, callcode.ones, 1_000_000).result()  # beyond what rides in a ring
    array += 1
    assert array.sum() == 2_000_000
    small = call(caller, callcode.ones, 10).result()
    small += 1
    assert small.sum() == 20


@pytest.mark.parametrize("change", ["cell", "global", "default", "list", "attribute of its module"])
def test_a_function_that_has_changed_is_sent_again(caller, change):
    scale = [2]
    factor = 2

    def by_cell(x):
        return x * factor

    def by_list(x):
        return x * scale[0]

    def by_default(x, by=2):
        return x * by

    space = {"SCALE": 2}
    exec("def by_global(x): return x * SCALE", space)
    function = {
        "cell": by_cell, "list": by_list, "default": by_default, "global": space["by_global"],
        "attribute of its module": callcode.scaled,
    }[change]  # fmt: skip
    callcode.SCALE = 2
    assert call(caller, function, 10).result() == 20
    assert call(caller, function, 10).result() == 20
    scale[0] = factor = space["SCALE"] = callcode.SCALE = 3
    by_default.__defaults__ = (3,)
    assert call(caller, function, 10).result() == 30
    callcode.SCALE = 1


def test_arguments_are_as_they_were_when_the_call_was_submitted(caller):
    held = call(caller, callcode.nap, 0.2), call(caller, callcode.nap, 0.2)
    for size in (3, 300_000):
        array = np.ones(size)
        future = call(caller, callcode.total, array)
        array[:] = 7
        assert future.result()[0] == size
    wait(held)


def test_a_large_argument_travels_once(pool, caller):
    array = np.random.default_rng(3).random(500_000)
    before = pool.stats().params_sent
    futures = [call(caller, callcode.total, array) for _ in range(20)]
    assert {future.result() for future in futures} == {(float(array.sum()), False)}
    assert pool.stats().params_sent - before == array.nbytes
    equal = array.copy()
    assert call(caller, callcode.total, equal).result()[0] == array.sum()
    assert pool.stats().params_sent - before == array.nbytes


# Errors


def test_an_exception_comes_with_its_remote_traceback(caller):
    error = call(caller, callcode.fail, "k").exception()
    assert type(error) is KeyError
    assert error.args == ("k",)
    assert "callcode.py" in str(error.__cause__)
    assert "raise KeyError(text)" in str(error.__cause__)


def test_what_cannot_be_sent_is_an_error_of_that_call_alone(caller):
    lock = threading.Lock()
    there = call(caller, callcode.add, lock)
    with pytest.raises(TypeError, match=r"the arguments of a call cannot be sent to workers: .*lock"):
        there.result()
    back = call(caller, lambda: threading.Lock())
    with pytest.raises(TypeError, match=r"the result of the call cannot be sent back: .*lock"):
        back.result()
    with pytest.raises(TypeError, match="not callable"):
        call(caller, 7).result()
    assert call(caller, callcode.add, 1).result() == 1


def test_whatever_is_raised_is_an_answer(caller):
    import sys

    assert type(call(caller, sys.exit, 3).exception()) is SystemExit
    assert call(caller, callcode.add, 1).result() == 1


def test_a_call_that_ends_three_workers_is_lost_alone(caller):
    others = [call(caller, callcode.nap, 0.01) for _ in range(40)]
    lost = call(caller, callcode.die)
    more = [call(caller, callcode.nap, 0.01) for _ in range(40)]
    error = lost.exception()
    assert type(error) is CallLost
    assert isinstance(error, WorkerLost)
    assert isinstance(error, BrokenProcessPool)
    assert "exited with status 3" in str(error)
    assert [future.result() for future in others + more] == [0.01] * 80


def test_a_call_whose_worker_was_lost_is_called_again(caller, tmp_path):
    assert call(caller, callcode.die_the_first_times, str(tmp_path / "begun"), 2).result() == 2


def test_a_worker_that_somebody_kills_loses_nothing(caller, pool):
    futures = [call(caller, callcode.nap, 0.002) for _ in range(300)]
    eventually(lambda: sum(future.done() for future in futures) > 50)
    os.kill(pool.workers[0].pid, signal.SIGKILL)
    assert [future.result() for future in futures] == [0.002] * 300


# The states of a future


def test_a_call_runs_once_it_has_begun(caller):
    future = call(caller, callcode.nap, 0.3)
    waiting = [call(caller, callcode.nap, 0.3) for _ in range(5)]
    eventually(future.running)
    assert not waiting[-1].running()
    assert future.result() == 0.3
    assert not future.running()


def test_what_has_not_begun_is_cancelled_and_never_called(caller, tmp_path):
    path = tmp_path / "called"
    held = [call(caller, callcode.nap, 0.2) for _ in range(2)]
    futures = [call(caller, callcode.touch_and_nap, str(path), 0) for _ in range(50)]
    assert all(future.cancel() for future in futures)
    assert all(future.cancelled() for future in futures)
    assert [future.result() for future in held] == [0.2, 0.2]
    with pytest.raises(CancelledError):
        futures[0].result()
    assert call(caller, callcode.add, 1).result() == 1
    assert not path.exists()


def test_a_call_that_runs_is_interrupted(caller):
    future = call(caller, callcode.nap, 30)
    eventually(future.running)
    began = time.monotonic()
    assert future.cancel()
    done = [call(caller, callcode.add, i).result() for i in range(10)]
    assert done == list(range(10))
    assert time.monotonic() - began < 10


def test_a_call_that_has_ended_is_not_cancelled(caller):
    future = call(caller, callcode.add, 1)
    assert future.result() == 1
    assert not future.cancel()


def test_callbacks_that_block_keep_nobody_waiting(caller):
    gate = threading.Event()
    first = call(caller, callcode.add, 1)
    first.add_done_callback(lambda future: gate.wait(20))
    others = [call(caller, callcode.add, i) for i in range(20)]
    for other in others:
        other.add_done_callback(lambda future: None)
    assert {future.result(10) for future in as_completed(others, 10)} == set(range(20))
    gate.set()


# Fairness


def test_a_long_call_holds_no_short_ones_back(caller):
    long = call(caller, callcode.nap, 1.0)
    short = [call(caller, callcode.nap, 0.001) for _ in range(100)]
    wait(short, 0.9)
    assert all(future.done() for future in short)
    assert not long.done()
    assert long.result() == 1.0


def test_rounds_and_calls_take_turns(pool, caller):
    futures = [call(caller, callcode.nap, 0.005) for _ in range(200)]
    assert pool.run(callcode.mapped, 2.0, [np.ones(10)] * 8) == 160.0
    assert sum(future.done() for future in futures) < 190  # the round did not wait for all of them
    rounds = [pool.submit(callcode.mapped, 2.0, [np.ones(10)] * 8) for _ in range(30)]
    wait(futures, 20)
    assert all(future.done() for future in futures)
    assert [one.result() for one in rounds] == [160.0] * 30


def test_each_submitter_has_its_turn(pool, caller):
    other = pool._caller()
    mine = [call(caller, callcode.nap, 0.002) for _ in range(1000)]
    its = [call(other, callcode.nap, 0.002) for _ in range(20)]
    wait(its, 20)
    assert all(future.done() for future in its)
    assert sum(future.done() for future in mine) < 900
    wait(mine)
    other.close()


# Setup


def test_the_setup_is_called_once_in_each_process(pool):
    caller = pool._caller(callcode.prepare, (7,))
    found = [call(caller, callcode.prepared) for _ in range(40)]
    assert {tuple(future.result()[1]) for future in found} == {(7,)}
    caller.close()


def test_a_setup_of_the_scripts_shares_its_globals_with_the_functions(pool):
    space: dict[str, Any] = {"__name__": "__main__", "model": None, "seen": []}
    exec("def setup(x):\n global model\n model = x\n seen.append(x)\ndef use(y): return model + y, seen", space)
    exec("def other(): return model", space)
    caller = pool._caller(space["setup"], (5,))
    assert [call(caller, space["use"], 1).result() for _ in range(5)] == [(6, [5])] * 5
    assert call(caller, space["other"]).result() == 5
    caller.close()


def test_a_setup_that_raises_breaks_its_submitter_alone(pool, caller):
    broken = pool._caller(callcode.fail, ("no",))
    held = [call(caller, callcode.nap, 0.3) for _ in range(2)]  # meanwhile all are submitted
    futures = [call(broken, callcode.add, 1) for _ in range(20)]
    wait(held)
    for future in futures:
        with pytest.raises(BrokenProcessPool, match="initializer"):
            future.result()
    assert "KeyError" in broken.broken
    with pytest.raises(BrokenProcessPool):
        call(broken, callcode.add, 1)
    assert call(caller, callcode.add, 1).result() == 1


# The end


def test_a_master_that_closes_ends_all_calls(tmp_path):
    with Master(1) as master:
        caller = master._caller()
        futures = [call(caller, callcode.nap, 0.5) for _ in range(4)]
    for future in futures:
        with pytest.raises(MasterClosed, match="closed before the call had ended"):
            future.result()
    with pytest.raises(MasterClosed):
        call(caller, callcode.add, 1).result()


def test_over_ssh(ssh_host, tmp_path):
    sshds = [ssh_host("one"), ssh_host("two")]
    config = write_config(tmp_path / "config", sshds)
    with Master(["one*1", "two*1"], ssh_config=config) as master:
        caller = master._caller()
        factor = 3
        assert call(caller, callcode.add, 2, b=3).result() == 5
        assert call(caller, lambda x: x * factor, 2).result() == 6
        futures = [call(caller, callcode.add, i, 1) for i in range(3000)]
        assert [future.result() for future in futures] == list(range(1, 3001))
        naps = [call(caller, callcode.touch_and_nap, str(tmp_path / "pids"), 0.05) for _ in range(10)]
        wait(naps)
        assert len(set((tmp_path / "pids").read_text().split())) == 2  # both hosts took some
        array = np.ones(500_000)
        assert {call(caller, callcode.total, array).result() for _ in range(6)} == {(500_000.0, False)}
        assert master.stats().params_sent <= 2 * array.nbytes
        assert call(caller, callcode.ones, 500_000).result().sum() == 500_000
        assert type(call(caller, callcode.fail, "k").exception()) is KeyError
        futures = [call(caller, callcode.nap, 0.005) for _ in range(200)]
        eventually(lambda: sum(future.done() for future in futures) > 20)
        os.kill(master.workers[0].pid, signal.SIGKILL)
        assert [future.result() for future in futures] == [0.005] * 200
        long = call(caller, callcode.nap, 30)
        eventually(long.running)
        assert long.cancel()
        assert call(caller, callcode.add, 1).result() == 1
