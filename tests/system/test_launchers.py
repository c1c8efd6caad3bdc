"""The same behaviour, whichever way a host is reached: this machine, or ssh with each of the three ways back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import gather
import pyzmq_garbage  # noqa: F401
import usercode
from gates import Gate
from needs import need
from processes import all_end
from qjam import DataSet, Master, MasterClosed, RoundTimeout, TaskError, WorkerLost
from qjam_worker.values import flat
from ssh_hosts import home  # noqa: F401
from sshd import private_sshd, sshd_works

ROUTES = ("local", "direct", "tunnel", "stdio")


Launch = Callable[[], Master]


@pytest.fixture(scope="module", params=ROUTES)
def launch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Launch]:
    """Makes masters of two workers."""
    if request.param == "local":
        yield lambda: Master(2)
        return
    need(sshd_works())
    with private_sshd(tmp_path_factory.mktemp("sshd"), home=home) as sshd:
        yield lambda: Master("testhost*2", ssh_config=sshd.config, route=request.param)


@pytest.fixture(scope="module")
def master(launch: Launch) -> Iterator[Master]:
    """What starts only when it is first needed is started here, so no test leaves it behind."""
    with launch() as made:
        warm_up(made)
        yield made


@pytest.fixture
def mortal(launch: Launch) -> Iterator[Master]:
    """One for the test alone, in which workers die and others take their places."""
    with launch() as made:
        yield made


def warm_up(master: Master) -> None:
    master.submit(lambda params, part: (print(), 1)[1]).result()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


def test_workers_tell_their_host_route_and_state(master, request):
    route = request.node.callspec.params["launch"]
    assert [(worker.index, worker.route, worker.state) for worker in master.workers] == [
        (0, route, "ready"),
        (1, route, "ready"),
    ]
    assert {worker.host for worker in master.workers} == {"local" if route == "local" else "testhost"}


def test_pids_are_those_of_the_workers(master):
    assert sorted(master.run(gather, lambda part: os.getpid())) == sorted(worker.pid for worker in master.workers)


def test_a_ping_comes_back(master):
    assert 0 < master.workers[0].ping() < 5


def test_results_are_added_up(master):
    assert master.run(usercode.add_up, 2, [1, 2, 3, 4]) == 20


def test_two_workers_that_return_42_give_84(master):
    assert master.run(usercode.forty_two) == 84


def test_a_closure_of_this_test_is_run(master):
    factor = 3
    assert master.run(lambda params, part: factor * params, 2) == 12


def test_params_of_all_kinds_arrive_as_they_are(master):
    value = {"a": (1, 2.5, None, b"x"), "b": np.arange(5, dtype="<i2"), 3: 2**80, "d": {1, 2}}
    assert master.run(gather, lambda part: True) == [True, True]
    back = master.run(usercode.give_params, value, [[1]])
    assert repr(back) == repr(value)


def test_a_second_run_sends_no_data_set(master):
    data = DataSet(np.random.default_rng(1).standard_normal((1000, 100)), slice_size=300)
    before = master.stats().dataset_sent
    sums = [master.run(lambda factor, part: factor * part.sum(axis=0), 2.0, data)]
    sent = master.stats().dataset_sent - before
    sums.append(master.run(lambda factor, part: factor * part.sum(axis=0), 2.0, data))
    assert sent == sum(flat.size(data.slice_data(index)) for index in range(len(data)))
    assert master.stats().dataset_sent == before + sent
    assert sums[0].tobytes() == sums[1].tobytes()


def test_the_result_is_bitwise_that_of_the_fixed_tree(master):
    values = np.random.default_rng(2).standard_normal(1000) * 10.0 ** np.arange(1000).clip(0, 12)
    sums = [np.sum(values[start : start + 91]) for start in range(0, 1000, 91)]
    while len(sums) > 1:  # (0,1)(2,3)..., an odd one moves up
        pairs = [a + b for a, b in zip(sums[::2], sums[1::2])]
        sums = pairs + sums[len(pairs) * 2 :]
    result = master.run(lambda params, part: np.sum(part), None, DataSet(values, slice_size=91))
    assert result.tobytes() == sums[0].tobytes()


def test_megabytes_go_and_come(master):
    params = np.random.default_rng(3).integers(0, 256, 24_000_000, dtype=np.uint8)
    back = master.run(lambda params, part: params[::-1].copy(), params, [[1]])
    assert np.array_equal(back, params[::-1])


def test_slices_of_megabytes_arrive_whole(master):
    data = np.random.default_rng(4).integers(0, 2**40, (3, 1_500_000))
    assert master.run(lambda params, part: int(part.sum()), None, DataSet(data, slice_size=1)) == data.sum()


def test_an_exception_tells_where(master):
    with pytest.raises(TaskError, match="ZeroDivisionError") as caught:
        master.run(usercode.divide, 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.host == master.workers[0].host
    assert "return 1 / params" in caught.value.remote_traceback
    assert master.run(usercode.forty_two) == 84


def test_what_user_code_prints_is_shown_here(master, capsys):
    master.collect(lambda params, part: print("hello", params), "there", [[1]])
    host = master.workers[0].host
    assert capsys.readouterr().out.strip() in (f"[{host} 0] hello there", f"[{host} 1] hello there")


def test_a_worker_that_is_killed_is_replaced_and_its_slice_done_again(mortal, tmp_path):
    assert mortal.run(usercode.die_the_first_time, str(tmp_path / "flag"), [1, 2, 3]) == 6
    assert mortal.run(usercode.forty_two) == 84


def test_a_slice_that_always_kills_its_worker_is_named(mortal):
    with pytest.raises(WorkerLost, match="SIGKILL") as caught:
        mortal.run(usercode.kill_itself, None, DataSet([1], slice_size=1))
    assert caught.value.slice == 0
    assert mortal.run(usercode.forty_two) == 84


def test_a_round_that_takes_too_long_is_cancelled(master, gate):
    with pytest.raises(RoundTimeout):
        master.run(usercode.linger, gate.path, timeout=0.5)
    assert master.run(usercode.forty_two) == 84


def test_a_future_can_be_cancelled(master, gate):
    future = master.submit(usercode.linger, gate.path)
    for _ in range(2):
        gate.heard()
    assert future.cancel()
    assert master.run(usercode.forty_two) == 84


def test_a_module_of_this_folder_that_is_imported_late_is_shipped(master):
    def work(params, part):
        import gates

        return gates.__name__

    assert master.run(gather, lambda part: work(None, part)) == ["gates"] * 2


def test_a_worker_killed_from_outside_is_replaced(mortal):
    worker = mortal.workers[0]
    pid = worker.pid
    os.kill(pid, signal.SIGKILL)
    assert all_end([pid])
    assert mortal.run(usercode.forty_two) == 84


def test_a_thousand_rounds_in_a_row(master):
    params = np.arange(500.0)
    for number in range(1000):
        assert master.run(lambda params, part: params[-1], params + number) == 2 * (499.0 + number)


def test_rounds_from_several_threads(master):
    futures = [master.submit(usercode.add_up, number, [1, 2]) for number in range(50)]
    assert [future.result() for future in futures] == [3 * number for number in range(50)]


def test_close_ends_rounds_and_leaves_nothing(launch, gate):
    master = launch()
    future = master.submit(usercode.linger, gate.path)
    pids = {int(gate.heard()) for _ in range(2)}
    master.close()
    assert all_end(pids)
    with pytest.raises(MasterClosed):
        future.result()
    with pytest.raises(MasterClosed):
        master.run(usercode.forty_two)
