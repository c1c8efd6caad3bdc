"""`Master("serial")`: all of it in the calling process, with the slices and the result of workers, bit for bit."""

from __future__ import annotations

import cProfile
import os
import pstats
import sys
import threading
import types

import numpy as np
import pytest

import gather
import pyzmq_garbage  # noqa: F401
import usercode
from processes import descendants
from qjam import (
    BaseDataSet,
    DataSet,
    HostSpec,
    Master,
    MasterClosed,
    RoundTimeout,
    TaskError,
    current_task,
)

ROWS = np.random.default_rng(0).standard_normal((1000, 7)) * 10.0 ** np.arange(-3, 4)


@pytest.fixture
def master():
    with Master("serial") as master:
        yield master


def slices(*values):
    """A data set with one value a slice."""
    return DataSet(list(values), slice_size=1)


def same(a, b):
    return [np.asarray(x).tobytes() for x in a] == [np.asarray(x).tobytes() for x in b]


def test_user_code_runs_in_the_calling_thread_and_no_process_is_started(master):
    before = descendants(os.getpid())
    here = {(os.getpid(), threading.get_ident())}
    seen = lambda params, part: (os.getpid(), threading.get_ident())  # noqa: E731
    assert set(master.collect(seen, None, slices(1, 2, 3))) == here
    assert set(master.map(lambda item: seen(None, item), range(3))) == here
    assert set(master.submit(seen, None, slices(1, 2), reduce=lambda a, b: a).result()) == set(*here)
    assert descendants(os.getpid()) == before


@pytest.fixture(scope="module")
def pools():
    with Master() as auto, Master("local*3") as three:
        yield {None: auto, "local*3": three}


@pytest.mark.parametrize("slice_size", [None, 1, 17, 1000])
def test_the_result_is_that_of_workers_bit_for_bit(master, pools, slice_size):
    theta = np.linspace(0.1, 1.0, 7)
    results = []
    for hosts, its in {"serial": master, **pools}.items():
        if hosts == "local*3" and slice_size is None:
            continue
        data = DataSet(ROWS, slice_size=slice_size)
        results.append(its.run(usercode.sums, theta, data))
        results.append(its.submit(usercode.sums, theta, data).result())
        assert [len(part) for part in its.collect(lambda params, part: part, None, data)] == [
            len(part) for part in data.bind(len(os.sched_getaffinity(0)))
        ]
    assert all(same(results[0], result) for result in results)
    assert type(results[0]) is type(results[-1])


def test_the_reduce_of_a_module_folds_along_the_fixed_tree(master):
    module = types.ModuleType("made_here")
    module.mapfunc, module.reduce = lambda params, part: str(part[0]), lambda a, b: f"({a} {b})"
    assert master.run(module, None, slices(*range(5))) == "(((0 1) (2 3)) 4)"
    assert master.run(gather, len, slices(*range(5))) == [1] * 5


def test_params_and_slices_are_read_only_and_results_are_the_callers(master):
    def write(params, part):
        params[0] = 1

    def write_slice(params, part):
        part[0] = 1

    for function in (write, write_slice):
        with pytest.raises(TaskError, match="read-only"):
            master.run(function, np.zeros(3), DataSet(np.zeros((2, 2))))
    params, data = [1], slices([1])
    assert master.run(lambda params, part: params.append(2) or part[0].append(2) or 1, params, data) == 1
    assert params == [1]
    assert data.raw_data() == [[1]]
    (came,) = master.collect(lambda params, part: part, None, DataSet(np.zeros((2, 2)), slice_size=2))
    came[0] = 1


def test_breakpoint_stops_in_user_code(master, monkeypatch):
    stopped = []

    def work(params, part):
        breakpoint()  # noqa: T100
        return part[0]

    monkeypatch.setattr(sys, "breakpointhook", lambda: stopped.append(sys._getframe(1).f_locals["part"]))
    assert master.run(work, None, slices(1, 2)) == 3
    assert stopped == [[1], [2]]


def test_a_profiler_sees_user_code(master):
    profile = cProfile.Profile()
    profile.runcall(master.run, usercode.forty_two, None, slices(1, 2))
    calls = {name: counts[0] for (_, _, name), counts in pstats.Stats(profile).stats.items()}
    assert calls["forty_two"] == 2


def test_an_exception_is_a_task_error_whose_cause_is_itself(master):
    error = ValueError("mine")

    def work(params, part):
        if part == [1]:
            raise error
        return 1

    with pytest.raises(TaskError, match=r"ValueError: mine \(in worker 0 on serial, slice 1\)") as caught:
        master.run(work, None, slices(0, 1, 2))
    assert caught.value.__cause__ is error
    assert (caught.value.host, caught.value.worker, caught.value.slice) == ("serial", 0, 1)
    assert "raise error" in caught.value.remote_traceback
    assert "carry_out" not in caught.value.remote_traceback
    with pytest.raises(TaskError, match="item 1"):
        master.map(lambda item: 1 / item, [1, 0])
    with pytest.raises(TaskError, match="cannot be sent back"):
        master.run(lambda params, part: threading.Lock(), None, slices(0))
    future = master.submit(work, None, slices(1))
    assert future.exception().__cause__ is error
    assert master.run(usercode.forty_two, None, slices(1)) == 42


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_and_sys_exit_come_through(master, error):
    def work(params, part):
        raise error

    for call in (master.run, master.collect, master.submit):
        with pytest.raises(error):
            call(work, None, slices(0, 1))
    assert master.stats().failed_rounds == 3
    assert master.run(usercode.forty_two, None, slices(1)) == 42


def test_a_timeout_is_noticed_between_slices(master):
    called = []
    with pytest.raises(RoundTimeout, match="0 of 2 slices were done"):
        master.run(lambda params, part: called.append(part), None, slices(0, 1), timeout=1e-9)
    assert called == []


def test_what_the_slice_of_a_data_set_raises_reaches_the_caller(master):
    class Broken(BaseDataSet):
        broken = False

        def chunks(self):
            return 2

        def slice(self, index):
            if self.broken:
                raise OSError("the disk is gone")
            return index

    data = Broken()
    assert master.run(lambda params, part: part, None, data) == 1
    data.broken = True
    with pytest.raises(OSError, match="the disk is gone"):
        master.run(lambda params, part: part, None, data)


def test_current_task_tells_the_slice(master):
    told = master.collect(lambda params, part: tuple(current_task()), None, slices("a", "b"))
    assert told == [(0, 2, 0, "serial", 1), (1, 2, 0, "serial", 1)]
    with pytest.raises(RuntimeError):
        current_task()


def test_what_a_master_has_besides(master):
    (worker,) = master.workers
    assert (worker.host, worker.index, worker.state, worker.pid, worker.route) == (
        "serial", 0, "ready", os.getpid(), "serial",
    )  # fmt: skip
    assert worker.ping() >= 0
    assert [report.host for report in master.start_reports] == ["serial"]
    assert "serial" in repr(master)
    assert master.run(usercode.forty_two) == 42 * len(os.sched_getaffinity(0))
    assert master.stats().rounds == 1
    for change in (master.add_hosts, master.remove_hosts):
        with pytest.raises(ValueError, match="the calling process"):
            change("local")
    master.close()
    assert worker.state == "closed"
    with pytest.raises(MasterClosed):
        master.run(usercode.forty_two)


@pytest.mark.parametrize(
    "hosts", ["serial local", ["local*2", "serial"], "serial*2", "serial*auto", "me@serial", ["serial", "serial"]]
)
def test_serial_is_alone_and_is_one(hosts):
    with pytest.raises(ValueError, match="serial"):
        Master(hosts)
    with pytest.raises(ValueError, match="python, env and setup"):
        HostSpec("serial", python="python3")


def test_serial_is_no_host_to_add():
    with Master(1) as master:
        with pytest.raises(ValueError, match="serial"):
            master.add_hosts("serial")
        assert master.run(usercode.forty_two) == 42
