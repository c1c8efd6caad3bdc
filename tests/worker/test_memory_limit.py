"""`memory_limit`: user code that wants too much gets a MemoryError, which is an answer; the pool and the host go on.

What the system's own killer does to a worker that takes too much is a SIGKILL from outside: test_failures.
"""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
import types

import numpy as np
import pytest

import gather
import poison
import pyzmq_garbage  # noqa: F401
import qjam_worker.worker.memory_limit
import usercode
from qjam import DataSet, Master, TaskError, WorkerLost
from qjam.arguments import memory_limit_bytes
from qjam_worker.worker.memory_limit import MemoryLimit

LIMIT = 100_000_000


def is_right(master):
    """An ordinary run on every worker, one that takes a good part of the limit there, and one over many slices."""
    assert master.run(usercode.forty_two, timeout=20) == 84
    assert master.run(lambda params, part: len(bytearray(40_000_000)), timeout=20) == 80_000_000
    assert master.run(usercode.add_up, 2, DataSet(list(range(10)), slice_size=1), timeout=20) == 90
    return True


@pytest.fixture
def master():
    with Master(2, memory_limit=LIMIT) as master:
        yield master
        assert is_right(master)


# Too much


GREEDY = [
    poison.a_list,
    poison.texts,
    poison.a_dict,
    poison.cycles,
    poison.a_bytearray,
    poison.one_array,
    poison.many_arrays,
    poison.what_it_keeps,
]
if sys.version_info >= (3, 11):  # before, calls take the stack of C, and its end is a SIGSEGV
    GREEDY.append(poison.calls_within_calls)


@pytest.mark.parametrize("function", GREEDY, ids=lambda function: function.__name__)
def test_too_much_is_a_memory_error_that_names_the_limit_and_the_place(master, function):
    with pytest.raises(TaskError) as caught:
        master.run(function, None, [1, 2], timeout=20)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert "memory_limit is 100,000,000 bytes" in caught.value.what
    assert caught.value.slice in (0, 1)


def test_a_worker_that_has_given_its_memory_back_lives_on(master):
    before = {worker.pid for worker in master.workers}
    for greedy in (poison.one_array, poison.a_list, poison.one_array):
        with pytest.raises(TaskError, match="MemoryError"):
            master.run(greedy, timeout=20)
        assert master.run(usercode.forty_two) == 84
    assert {worker.pid for worker in master.workers} == before


def test_too_much_in_reduce_is_a_memory_error(master):
    module = types.ModuleType("greedy_reduce")
    module.mapfunc, module.reduce = usercode.forty_two, poison.a_list
    for data in (None, DataSet(list(range(8)), slice_size=1)):
        with pytest.raises(TaskError) as caught:
            master.run(module, None, data, timeout=20)
        assert isinstance(caught.value.__cause__, MemoryError)


def test_user_code_may_catch_the_memory_error(master):
    def work(params, part):
        try:
            return poison.one_array(params, part)
        except MemoryError:
            return 21

    assert master.run(work) == 42


def test_results_that_do_not_fit_beside_one_another_are_a_memory_error_and_no_other(master):
    def work(params, part):
        return list(range(part[0], 1_500_000 + part[0]))

    with pytest.raises(TaskError) as caught:
        master.run(work, None, DataSet([400, 401, 402, 403], slice_size=1), timeout=20)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_params_that_do_not_fit_once_they_are_decoded_are_a_memory_error(master):
    with pytest.raises(TaskError) as caught:
        master.run(usercode.forty_two, list(range(10**6, 4 * 10**6)), [1], timeout=20)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_an_exception_whose_text_takes_all_the_memory_is_told_in_short(master):
    def work(size, part):
        raise ValueError("x" * size)

    with pytest.raises(TaskError) as caught:
        master.run(work, 70_000_000, [1], timeout=20)
    assert caught.value.what.startswith("ValueError: xxx")
    assert "in work" in caught.value.remote_traceback
    assert len(str(caught.value)) < 1_000_000


def test_code_in_c_that_does_not_ask_whether_there_was_memory_ends_its_worker(master):
    def work(params, part):
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        ctypes.memset(libc.malloc(ctypes.c_size_t(10**9)), 0, 10**9)

    with pytest.raises(WorkerLost, match="SIGSEGV"):
        master.run(work, None, [1], timeout=20)


# What counts


def test_without_a_limit_user_code_takes_what_it_likes():
    with Master(1) as master:
        assert master.run(lambda params, part: len(bytearray(3 * LIMIT))) == 3 * LIMIT
        assert master.run(gather, lambda part: resource.getrlimit(resource.RLIMIT_DATA)[0]) == [resource.RLIM_INFINITY]


def test_params_slices_and_results_of_arrays_do_not_count(master):
    params, data = np.ones(20_000_000), np.ones((2, 18_000_000))
    assert master.run(lambda params, part: params[:2] * part.sum(), params, data, timeout=20).tolist() == [36e6, 36e6]
    assert len(master.run(lambda params, part: np.ones(8_000_000), None, [1, 2], timeout=20)) == 8_000_000


def test_a_child_process_of_user_code_has_the_same_limit(master):
    child = f"""if True:
        bytearray({LIMIT // 2})
        try:
            bytearray({3 * LIMIT})
        except MemoryError:
            print("none left")
        """

    def run(part):
        return subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout

    assert master.run(gather, run) == ["none left\n"] * 2


def test_a_limit_that_user_code_has_lifted_holds_again_for_the_next_task(master):
    def lift(params, part):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return len(bytearray(2 * LIMIT))

    assert master.run(lift) == 4 * LIMIT
    with pytest.raises(TaskError, match="MemoryError"):
        master.run(poison.one_array)


def test_products_of_matrices_need_no_memory_beyond_their_own():
    # BLAS takes 30 MB for each thread when it is first used, and where it cannot have them it waits for ever.
    def work(params, part):
        square = np.ones((500, 500))
        return float((square @ square)[0, 0] + np.linalg.solve(np.eye(200), np.ones(200))[0])

    with Master(1, memory_limit="20MB") as master:
        assert master.run(work, timeout=20) == 501


def test_the_smallest_limit_is_enough_for_small_work():
    with Master(2, memory_limit="1MB") as master:
        assert master.run(usercode.forty_two, timeout=20) == 84
        assert master.run(usercode.add_up, 1, [1, 2, 3], timeout=20) == 6
        assert master.run(lambda params, part: float(params.sum()), np.ones(10**6), timeout=20) == 2 * 10**6


# What may be passed


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (None, None),
        (10**9, 10**9),
        (np.int64(10**9), 10**9),
        ("1000000", 10**6),
        ("500MB", 500 * 10**6),
        ("2000 k", 2 * 10**6),
        (" 1.5 gb ", 1_500_000_000),
        ("2G", 2 * 10**9),
        ("1GiB", 2**30),
        ("0.5TiB", 2**39),
    ],
)
def test_a_limit_is_a_number_of_bytes_or_a_text_with_a_unit(given, size):
    found = memory_limit_bytes(given)
    assert found == size
    assert given is None or type(found) is int


@pytest.mark.parametrize("given", [0, -1, 2, "2", "0GB", "0.5 kB"])
def test_a_limit_too_small_for_anything_is_a_value_error_that_says_what_is_least(given):
    with pytest.raises(ValueError, match=r"memory_limit must be at least 1,000,000 bytes"):
        memory_limit_bytes(given)


@pytest.mark.parametrize("given", ["", "GB", "-1GB", "1e9", "1PB", "1 iB", "1GB/s", "1,000MB", "two GB"])
def test_a_text_that_is_no_amount_is_a_value_error_that_shows_how_to_write_it(given):
    with pytest.raises(ValueError, match=r'memory_limit must be .* as "500MB"'):
        memory_limit_bytes(given)


@pytest.mark.parametrize("given", [2e9, True, b"1GB", [10**9]])
def test_a_limit_of_another_type_is_a_type_error_that_names_it(given):
    with pytest.raises(TypeError, match=rf"memory_limit must be .*\({type(given).__name__}\)"):
        Master(1, memory_limit=given)


# Where it cannot be kept


@pytest.fixture
def no_limits(monkeypatch):
    """This process keeps the limits that it has."""
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)


def test_a_limit_that_the_system_does_not_know_of_is_told(no_limits, monkeypatch, capsys):
    monkeypatch.setattr(qjam_worker.worker.memory_limit, "_taken", lambda: 0)
    allowance = MemoryLimit(10**9)
    assert "memory_limit is not kept on" in capsys.readouterr().err
    assert not allowance.holds
    assert allowance.come_back()


def test_a_limit_that_the_system_does_not_keep_is_told(no_limits, capsys):
    MemoryLimit(10**6)
    assert "memory_limit is not kept here" in capsys.readouterr().err
