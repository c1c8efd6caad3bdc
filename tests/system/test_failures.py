"""What goes wrong in user code and its processes: what the caller is told, and that the pool goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

import gather
import pyzmq_garbage  # noqa: F401
import usercode
from gates import Gate
from processes import all_end, finish, parent, start
from qjam import DataSet, Master, QjamError, RoundTimeout, TaskError, WorkerLost

SUPPORT = str(Path(usercode.__file__).parent)  # where a program of a test finds gates


@pytest.fixture(scope="module")
def master():
    """For failures that cost no process."""
    with Master(2) as master:
        yield master
        assert master.run(usercode.forty_two) == 84


@pytest.fixture
def pool():
    """Two workers of the test's own, which may lose their processes, and which can be used afterwards."""
    with Master(2) as pool:
        yield pool
        assert pool.run(usercode.forty_two) == 84
        assert len(pool.workers) == 2


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


def pids(pool):
    return {worker.pid for worker in pool.workers}


# Exceptions


def test_an_exception_comes_as_a_task_error_that_tells_all(master):
    with pytest.raises(TaskError) as caught:
        master.run(usercode.divide, 0, DataSet([1, 2, 3], slice_size=3))
    error = caught.value
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert error.host == "local"
    assert error.worker in (0, 1)
    assert error.slice == 0
    assert error.remote_traceback.startswith("Traceback")
    assert "return 1 / params" in error.remote_traceback
    assert "qjam_worker" not in error.remote_traceback
    assert str(error).startswith("ZeroDivisionError: division by zero (in worker")


def test_the_slice_that_raised_is_named(master):
    data = DataSet(list(range(20)), slice_size=1)
    with pytest.raises(TaskError) as caught:
        master.run(lambda params, part: 1 / (part[0] - 13), None, data)
    assert caught.value.slice == 13


def test_an_exception_without_a_data_set_comes_from_a_worker(master):
    with pytest.raises(TaskError) as caught:
        master.run(usercode.divide, 0)
    assert caught.value.worker in (0, 1)


def test_the_other_slices_are_cancelled(master, gate):
    def work(path, part):
        if part == [1]:
            return 1 / 0
        return usercode.linger(path, part)

    with pytest.raises(TaskError, match="ZeroDivisionError"):
        master.run(work, gate.path, [0, 1])
    assert master.run(usercode.forty_two) == 84


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (usercode.raise_fussy, "Fussy: fussy"),
        (usercode.raise_with_a_lambda, "holds a lambda"),
        (usercode.raise_mute, "Mute"),
        (usercode.raise_one_of_its_own, "made in the worker"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_exception_that_cannot_be_pickled_comes_as_text(master, function, text):
    with pytest.raises(TaskError) as caught:
        master.run(function)
    assert text in str(caught.value)
    assert f"in {function.__name__}" in caught.value.remote_traceback


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, MemoryError, StopIteration])
def test_whatever_is_raised_is_an_answer(master, error):
    def work(params, part):
        raise error("from user code")

    with pytest.raises(TaskError, match="from user code") as caught:
        master.run(work)
    assert type(caught.value.__cause__) is error
    assert master.run(usercode.forty_two) == 84


def test_endless_recursion_is_a_task_error(master):
    with pytest.raises(TaskError, match="RecursionError"):
        master.run(usercode.recurse)


def test_an_exception_in_reduce_is_a_task_error(master):
    module = type(gather)("bad_reduce")
    module.mapfunc = lambda params, part: 1
    module.reduce = lambda a, b: 1 / 0
    for data in (None, DataSet([1, 2], slice_size=1), DataSet(list(range(50)), slice_size=1)):
        with pytest.raises(TaskError, match="ZeroDivisionError"):
            master.run(module, None, data)


def test_a_result_that_cannot_be_sent_is_a_task_error_that_names_its_type(master):
    with pytest.raises(TaskError, match="lock"):
        master.run(lambda params, part: threading.Lock())
    assert master.run(usercode.forty_two) == 84


# Ends of a process


ENDS = [
    (usercode.sys_exit, 3, "exited with status 3"),
    (usercode.sys_exit, None, "exited with status 0"),
    (usercode.sys_exit, "because", "exited with status 1"),
    (usercode.os_exit, None, "exited with status 9"),
    (usercode.segfault, None, "signal 11 (SIGSEGV)"),
    (usercode.kill_itself, None, "signal 9 (SIGKILL)"),
    (usercode.abort, None, "signal 6 (SIGABRT)"),
]
END_NAMES = [f"{function.__name__} {params or ''}".strip() for function, params, _ in ENDS]


@pytest.mark.parametrize(("function", "params", "how"), ENDS, ids=END_NAMES)
def test_the_end_of_a_worker_in_user_code_is_told_with_how_it_died(pool, function, params, how):
    before = pids(pool)
    with pytest.raises(WorkerLost) as caught:
        pool.run(function, params, [1, 2])
    assert how in str(caught.value)
    assert how in caught.value.how
    assert caught.value.host == "local"
    assert caught.value.worker in (0, 1)
    assert caught.value.slice in (0, 1)
    assert pool.run(usercode.forty_two) == 84
    assert len(pids(pool)) == 2
    assert pids(pool) != before
    assert [worker.state for worker in pool.workers] == ["ready", "ready"]


def test_the_end_of_a_worker_without_a_data_set_is_told_too(pool):
    with pytest.raises(WorkerLost, match="status 9"):
        pool.run(usercode.os_exit)


def test_what_sys_exit_says_is_shown(pool, capsys):
    with pytest.raises(WorkerLost):
        pool.run(usercode.sys_exit, "because", [1])
    assert "because" in capsys.readouterr().err


def test_a_slice_whose_worker_dies_once_is_mapped_again_and_counts_once(pool, tmp_path):
    data = DataSet([1, 2, 3, 4, 5], slice_size=1)
    assert pool.run(usercode.die_the_first_time, str(tmp_path / "flag"), data) == 15
    assert pool.stats().resent_slices >= 1


def test_a_worker_that_dies_once_without_a_data_set_runs_again(pool, tmp_path):
    def work(flag, part):
        return usercode.die_the_first_time(flag, [3])

    assert pool.run(work, str(tmp_path / "flag")) == 6


def test_a_death_sends_no_data_again(pool, tmp_path):
    data = DataSet(list(range(1, 6)), slice_size=1)
    assert pool.run(usercode.add_up, 1, data) == 15
    sent = pool.stats().dataset_sent
    assert pool.run(usercode.die_the_first_time, str(tmp_path / "flag"), data) == 15
    assert pool.stats().dataset_sent == sent


def test_a_slice_that_kills_three_workers_is_named_and_not_tried_again(pool, tmp_path):
    tally = tmp_path / "tally"
    with pytest.raises(WorkerLost) as caught:
        pool.run(usercode.die_at_three, str(tally), DataSet(list(range(8)), slice_size=1))
    assert caught.value.slice == 3
    assert "slice 3" in str(caught.value)
    assert tally.read_text() == "xxx"


def test_a_worker_that_dies_while_it_reduces_is_replaced_and_the_result_is_right(pool, tmp_path):
    flag = str(tmp_path / "flag")

    def reduce(a, b):
        usercode.die_the_first_time(flag, [3])
        return a + b

    module = type(gather)("dies_in_reduce")
    module.mapfunc, module.reduce = (lambda params, part: sum(part)), reduce
    assert pool.run(module, None, DataSet(list(range(20)), slice_size=1)) == 190


def test_a_worker_that_is_killed_from_outside_in_user_code_is_replaced(pool, gate, tmp_path):
    flag = str(tmp_path / "flag")

    def work(params, part):
        path, flag = params
        if part == [1] and not os.path.exists(flag):
            open(flag, "w").close()
            usercode.linger(path, part)
        return 1

    future = pool.submit(work, (gate.path, flag), [0, 1])
    os.kill(int(gate.heard()), signal.SIGKILL)
    assert future.result() == 2


def test_an_idle_worker_that_is_killed_is_replaced(pool):
    victim = pool.workers[0].pid
    os.kill(victim, signal.SIGKILL)
    assert all_end([victim])
    assert pool.run(usercode.forty_two) == 84
    assert victim not in pids(pool)


def test_all_workers_may_be_killed_again_and_again(pool):
    for _ in range(3):
        for victim in pids(pool):
            with contextlib.suppress(ProcessLookupError):  # one whose successor has not been told yet
                os.kill(victim, signal.SIGKILL)
        assert pool.run(usercode.add_up, 1, DataSet(list(range(10)), slice_size=1)) == 45


def kill_the_fork_server(pool):
    workers = pids(pool)
    (fork_server,) = {parent(pid) for pid in workers}
    os.kill(fork_server, signal.SIGKILL)
    assert all_end({fork_server, *workers})
    return fork_server, workers


def test_a_fork_server_that_is_killed_is_replaced_with_its_workers(pool):
    for _ in range(3):
        fork_server, workers = kill_the_fork_server(pool)
        assert pool.run(usercode.forty_two) == 84
        assert not workers & pids(pool)
        assert {parent(pid) for pid in pids(pool)} != {fork_server}


def test_a_round_outlives_the_fork_server(pool, gate, tmp_path):
    def work(params, part):
        path, flag = params
        try:
            os.close(os.open(f"{flag}{part[0]}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return part[0]
        return usercode.linger(path, part)

    future = pool.submit(work, (gate.path, str(tmp_path / "flag")), [10, 20])
    gate.heard()
    gate.heard()
    kill_the_fork_server(pool)
    assert future.result() == 30


# Time


def test_a_round_beyond_its_timeout_says_so_and_frees_the_workers(pool, gate):
    before = pids(pool)
    with pytest.raises(RoundTimeout, match=r"0\.2 s") as caught:
        pool.run(usercode.linger, gate.path, timeout=0.2)
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, QjamError)
    assert pool.run(usercode.forty_two) == 84
    assert pids(pool) == before  # interrupted, not killed


def test_a_round_within_its_timeout_is_not_disturbed(master):
    assert master.run(usercode.add_up, 1, [1, 2], timeout=50) == 3


def test_a_future_has_the_timeout_of_its_round(pool, gate):
    future = pool.submit(usercode.linger, gate.path, [1], timeout=0.2)
    assert isinstance(future.exception(), RoundTimeout)


def test_interrupted_user_code_runs_its_finally_blocks(pool, gate, tmp_path):
    other = Gate(tmp_path / "other")
    future = pool.submit(usercode.linger_and_tidy_up, (gate.path, other.path), [1])
    gate.heard()
    future.cancel()
    assert other.heard() == "tidied up"
    other.close()


@pytest.mark.parametrize("function", [usercode.deaf, usercode.swallow], ids=["ignores", "swallows"])
def test_a_worker_that_cannot_be_interrupted_is_killed_after_two_seconds_and_replaced(pool, gate, function):
    future = pool.submit(function, gate.path)
    stubborn = {int(gate.heard()), int(gate.heard())}
    future.cancel()
    assert pool.run(usercode.forty_two) == 84
    assert all_end(stubborn)
    assert not stubborn & pids(pool)


def test_a_late_result_of_a_cancelled_round_does_not_count_in_the_next(pool, gate):
    def stubborn(path, part):
        try:
            usercode.linger(path, part)
        except KeyboardInterrupt:
            return 1000

    future = pool.submit(stubborn, gate.path)
    assert gate.heard()
    assert gate.heard()
    future.cancel()
    assert pool.run(usercode.forty_two) == 84


# Ctrl-C

INTERRUPTED = """
    import os, sys
    sys.path.insert(0, {tests!r})
    import usercode
    from qjam import Master

    with Master(2) as master:
        try:
            master.run(usercode.{function}, {gate!r})
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(master.run(usercode.forty_two))
        print(*[worker.pid for worker in master.workers])
    """


def interrupt(folder: Path, function: str, gate: Gate) -> tuple[set[int], list[str]]:
    """The workers that a script's Ctrl-C has found in user code, and what the script prints."""
    source = INTERRUPTED.format(tests=SUPPORT, function=function, gate=gate.path)
    program = start(folder, source)
    found = {int(gate.heard()), int(gate.heard())}
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to the script's whole process group
    return found, finish(program).splitlines()


def test_ctrl_c_ends_the_round_and_leaves_the_pool_usable(tmp_path, gate):
    workers, printed = interrupt(tmp_path, "linger", gate)
    assert printed[:2] == ["interrupted", "84"]
    assert set(map(int, printed[2].split())) == workers  # user code was interrupted, no process lost


@pytest.mark.parametrize("function", ["deaf", "swallow"])
def test_after_ctrl_c_a_worker_that_does_not_react_is_killed_and_replaced(tmp_path, gate, function):
    workers, printed = interrupt(tmp_path, function, gate)
    assert printed[:2] == ["interrupted", "84"]
    assert not set(map(int, printed[2].split())) & workers


def test_ctrl_c_that_nobody_catches_ends_the_script_as_it_does_without_qjam(tmp_path, gate):
    source = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import usercode
        from qjam import Master
        with Master(2) as master:
            master.run(usercode.linger, sys.argv[2])
        """
    program = start(tmp_path, source, SUPPORT, gate.path)
    workers = {int(gate.heard()), int(gate.heard())}
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate()
    assert program.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert all_end(workers)
