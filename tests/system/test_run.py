"""`run` and `submit`: results, slicing, what is sent again and what is not, reduction, threads, figures."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest

import gather
import pyzmq_garbage  # noqa: F401
import usercode
from gates import Gate
from qjam import BaseDataSet, DataSet, HostSpec, Master, MasterClosed, RemoteWorker, TaskError


@pytest.fixture(scope="module")
def master():
    """Two workers; what starts only when it is first needed is started here, so no test leaves it behind."""
    with Master(2) as master:
        master.submit(lambda params, part: print()).cancel()
        master.submit(lambda params, part: (print(), 1)[1]).result()
        yield master


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


def tree_of(values, combine):
    """The fixed tree of DESIGN.md section 5, level by level: (0,1)(2,3)..., an odd one moves up."""
    while len(values) > 1:
        pairs = [combine(a, b) for a, b in zip(values[::2], values[1::2])]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


# Results


def test_results_of_the_slices_are_added_up(master):
    assert master.run(usercode.add_up, 2, [1, 2, 3, 4]) == 20


def test_two_workers_that_return_42_without_a_data_set_give_84(master):
    assert master.run(usercode.forty_two) == 84


def test_a_module_is_run_by_its_mapfunc(master):
    assert master.run(gather, len, [[1], [2]]) == [1, 1]


def test_without_a_data_set_mapfunc_runs_once_on_each_worker(master):
    pids = master.run(gather, lambda part: (part, os.getpid()))
    assert sorted(pids) == sorted((None, worker.pid) for worker in master.workers)


@pytest.mark.parametrize(
    "params",
    [
        None,
        (1, [2.5, "three"], {("a", 4): {5}}),
        np.float32(1.5),
        np.arange(6, dtype=">i2").reshape(2, 3).T,
        {"nested": [np.zeros(3), (np.ones((2, 2)),)]},
        10**60,
    ],
    ids=["None", "nested", "float32", "big-endian", "arrays inside", "int of 200 bits"],
)
def test_params_and_results_arrive_as_they_were(master, params):
    (came,) = master.run(gather, lambda part: params, [0])
    assert type(came) is type(params)
    np.testing.assert_equal(came, params)
    (given,) = master.collect(usercode.give_params, params, [0])
    assert type(given) is type(params)
    np.testing.assert_equal(given, params)


def test_arrays_of_megabytes_go_both_ways(master):
    params = np.random.default_rng(1).normal(size=700_000)
    result = master.run(lambda params, part: (params * part[0], len(part)), params, [3, 4])
    assert result[1] == 2
    assert np.array_equal(result[0], params * 3 + params * 4)


def test_an_array_in_the_result_is_the_callers_own(master):
    for size in (3, 300_000):
        result = master.run(lambda params, part: np.ones(params), size, [1, 2])
        result += 1
        assert result.sum() == 3 * size


def test_a_result_is_not_changed_by_later_rounds(master):
    data = DataSet([1, 2])
    first = master.run(lambda params, part: np.full(1000, params), 1.0, data)
    master.run(lambda params, part: np.full(1000, params), 5.0, data)
    assert np.array_equal(first, np.full(1000, 2.0))


def test_one_slice_may_give_anything(master):
    assert master.run(lambda params, part: "text", None, [1]) == "text"
    assert master.run(lambda params, part: {"a": None}, None, [1]) == {"a": None}


def test_mapfunc_may_give_its_slice_or_its_params_back(master):
    data = np.arange(80_000.0).reshape(8, 10_000)
    assert np.array_equal(master.run(lambda params, part: part, None, DataSet(data, slice_size=8)), data)
    assert np.array_equal(master.run(lambda params, part: params, data, DataSet([1, 2, 3], slice_size=1)), 3 * data)


def test_mapfunc_may_write_to_one_array_again_and_again(master):
    def fill(params, part):
        out = vars(os).setdefault("its_array", np.empty(100))
        out[:] = part[0]
        return out

    data = DataSet(list(range(40)), slice_size=1)
    assert np.array_equal(master.run(fill, None, data), np.full(100, sum(range(40))))


# Slicing


def test_without_slice_size_there_are_as_many_slices_as_workers_of_nearly_one_size(master):
    assert sorted(master.run(gather, len, [1, 2, 3, 4, 5])) == [2, 3]


def test_fewer_elements_than_workers_make_fewer_slices(master):
    assert master.run(gather, list, [7]) == [[7]]


def test_slice_size_is_kept(master):
    assert master.run(gather, list, DataSet([1, 2, 3, 4, 5], slice_size=2)) == [[1, 2], [3, 4], [5]]


def test_slices_of_an_array_are_its_rows(master):
    data = np.arange(12, dtype=np.float32).reshape(6, 2)
    parts = master.run(gather, lambda part: part, DataSet(data, slice_size=4))
    assert [part.dtype for part in parts] == [np.float32] * 2
    assert np.array_equal(parts[0], data[:4])
    assert np.array_equal(parts[1], data[4:])


def test_a_thousand_slices_each_count_once_and_in_order(master):
    data = DataSet(list(range(1000)), slice_size=1)
    assert master.run(gather, lambda part: part[0], data) == list(range(1000))


def test_a_data_set_of_the_users_own_class_is_mapped(master):
    class Squares(BaseDataSet):
        def chunks(self):
            return 5

        def slice(self, index):
            return index**2

    assert master.run(gather, lambda part: part, Squares()) == [0, 1, 4, 9, 16]


def test_an_exception_of_a_data_set_reaches_the_caller(master):
    class Broken(BaseDataSet):
        def chunks(self):
            return 2

        def slice(self, index):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        master.run(usercode.forty_two, None, Broken())
    assert master.run(usercode.forty_two) == 84


# What is sent


def sent(master, *arguments):
    """The bytes of params, data set and code that one more run sends."""
    before = master.stats()
    master.run(*arguments)
    after = master.stats()
    return tuple(getattr(after, name) - getattr(before, name) for name in ("params_sent", "dataset_sent", "code_sent"))


def test_a_second_run_with_the_same_data_set_sends_no_byte_of_it():
    data = DataSet(np.random.default_rng(2).normal(size=(1000, 10)))
    with Master(2) as master:
        assert sent(master, lambda params, part: part.sum(), None, data)[1] >= data.raw_data().nbytes
        assert sent(master, lambda params, part: part.sum(), None, data)[1] == 0


def test_neither_other_params_nor_another_function_make_the_data_set_travel_again(master):
    data = DataSet(np.random.default_rng(3).normal(size=(100, 10)))
    master.run(lambda params, part: part.sum() * params, 1, data)
    assert sent(master, lambda params, part: part.sum() * params, 2, data)[1] == 0
    assert sent(master, lambda params, part: part.max() * params, 3, data)[1] == 0


def test_equal_data_in_another_object_is_not_sent_again(master):
    values = np.random.default_rng(4).normal(size=(100, 10))
    master.run(lambda params, part: part.sum(), None, DataSet(values))
    assert sent(master, lambda params, part: part.sum(), None, values.copy())[1] == 0


def test_only_the_slice_that_differs_is_sent(master):
    values = np.random.default_rng(5).normal(size=(100, 100))
    master.run(lambda params, part: part.sum(), None, DataSet(values, slice_size=10))
    values[55] = 0
    _, dataset_sent, _ = sent(master, lambda params, part: part.sum(), None, DataSet(values, slice_size=10))
    assert 8000 <= dataset_sent < 9000


def test_a_later_round_carries_the_params_alone(master):
    data = DataSet([1, 2, 3])
    master.run(usercode.give_params, np.zeros(100), data)
    params_sent, dataset_sent, code_sent = sent(master, usercode.give_params, np.ones(100), data)
    assert 800 <= params_sent < 1000
    assert (dataset_sent, code_sent) == (0, 0)


# Reduction


def test_with_slice_size_the_result_is_bitwise_the_same_on_1_2_3_and_8_workers():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(370, 5)) * 10.0 ** rng.integers(-3, 3, size=(370, 1))
    data = DataSet(values, slice_size=10)

    def total(params, part):
        return float(part.sum()), part.sum(axis=0)

    results = []
    for workers in (1, 2, 3, 8):
        with Master(workers) as master:
            results += [master.run(total, None, data) for _ in range(3)]
    assert {(result[0].hex(), result[1].tobytes()) for result in results} == {
        (results[0][0].hex(), results[0][1].tobytes())
    }
    # Were the order of no consequence here, this would prove nothing.
    assert results[0][0] != sum(float(part.sum()) for part in data)


def test_the_users_reduce_combines_neighbours_along_the_fixed_tree():
    def name(params, part):
        return str(part[0])

    def pair(a, b):
        return f"({a} {b})"

    module = type(gather)("pairs")
    module.mapfunc, module.reduce = name, pair
    for slices in (1, 2, 7, 13):
        expected = tree_of([str(index) for index in range(slices)], pair)
        data = DataSet(list(range(slices)), slice_size=1)
        for workers in (1, 3):
            with Master(workers) as master:
                assert master.run(module, None, data) == expected


def test_the_users_reduce_runs_in_worker_processes_and_not_in_the_node(master):
    module = type(gather)("where")
    module.mapfunc = lambda params, part: set()
    module.reduce = lambda a, b: a | b | {os.getpid()}
    assert master.run(module, None, DataSet(list(range(64)), slice_size=1)) <= {worker.pid for worker in master.workers}
    assert master.run(module, None, DataSet([1, 2], slice_size=1)) <= {worker.pid for worker in master.workers}


def test_functools_reduce_in_a_module_is_not_taken_for_its_reduce(master):
    import functools

    module = type(gather)("with_functools")
    module.mapfunc, module.reduce = (lambda params, part: 1), functools.reduce
    assert master.run(module) == 2


@pytest.mark.parametrize("slices", [2, 16], ids=["on two workers", "in one worker"])
@pytest.mark.parametrize(
    ("one", "total"),
    [
        (1.5, 3.0),
        (True, 2),
        ([1, 2.0], [2, 4.0]),
        ((1, [2, (3,)]), (2, [4, (6,)])),
        (np.float32(2), np.float32(4)),
        (np.array([[1, 2]]), np.array([[2, 4]])),
        ((0.5, np.ones(3)), (1.0, np.full(3, 2.0))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_default_reduce_adds_numbers_arrays_lists_and_tuples(master, one, total, slices):
    result = master.run(usercode.give_params, one, DataSet(list(range(slices)), slice_size=1))
    np.testing.assert_equal(result, scaled(total, slices // 2))
    assert type(result) is type(total)


def scaled(value, factor):
    if isinstance(value, (list, tuple)):
        return type(value)(scaled(item, factor) for item in value)
    return value * factor


@pytest.mark.parametrize("slices", [2, 16], ids=["on two workers", "in one worker"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "b"),
        (None, None),
        ({"a": 1}, {"a": 1}),
        ([1], [1, 2]),
        ([1], (1,)),
        (np.zeros(2), np.zeros(3)),
        ((1, "a"), (1, "b")),
    ],
    ids=["str", "None", "dict", "lengths", "list and tuple", "shapes", "inside a tuple"],
)
def test_what_default_reduce_cannot_add_is_an_error_that_names_the_way_out(master, first, second, slices):
    with pytest.raises(TaskError, match=r"TypeError.*reduce\(a, b\)") as caught:
        master.run(
            lambda params, part: params[part[0] % 2],
            [first, second],
            DataSet(list(range(slices)), slice_size=1),
        )
    assert isinstance(caught.value.__cause__, TypeError)
    assert master.run(usercode.forty_two) == 84


# Futures


def test_submit_gives_a_future_of_the_result(master):
    assert master.submit(usercode.add_up, 2, [1, 2, 3]).result() == 12


def test_a_future_has_the_exception_of_its_round(master):
    error = master.submit(usercode.divide, 0).exception()
    assert isinstance(error, TaskError)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_many_futures_at_once_have_each_their_own_result(master):
    futures = [master.submit(usercode.add_up, factor, [1, 2, 3]) for factor in range(50)]
    wait(futures)
    assert [future.result() for future in futures] == [6 * factor for factor in range(50)]


def test_params_may_change_as_soon_as_submit_has_returned(master, gate):
    blocked = master.submit(usercode.linger, gate.path)  # so that the next round cannot have begun
    assert gate.heard()
    assert gate.heard()
    params = np.ones(1_000_000)
    future = master.submit(lambda params, part: float(params.sum()), params, [1])
    params[:] = 7
    blocked.cancel()
    assert future.result() == 1_000_000


def test_a_cancelled_future_frees_its_workers(master, gate):
    future = master.submit(usercode.linger, gate.path)
    lingering = {int(gate.heard()), int(gate.heard())}
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    assert master.run(usercode.forty_two) == 84
    assert lingering == {worker.pid for worker in master.workers}  # interrupted, not killed


def test_rounds_share_the_workers_while_one_of_them_lasts(master, gate):
    long = master.submit(usercode.linger, gate.path, [1])
    assert gate.heard()
    assert master.run(usercode.add_up, 1, [1, 2, 3]) == 6
    long.cancel()


# Threads


def test_several_threads_run_at_once_and_each_gets_its_own_results(master):
    wrong = []
    barrier = threading.Barrier(6)

    def calls(number):
        barrier.wait()
        data = DataSet(list(range(number + 2)))
        for factor in range(20):
            result = master.run(usercode.add_up, factor, data)
            if result != factor * sum(range(number + 2)):
                wrong.append((number, factor, result))

    threads = [threading.Thread(target=calls, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Figures and handles


def test_stats_count_rounds_and_bytes_each_way():
    with Master(2) as master:
        assert master.stats() == type(master.stats())()
        master.run(lambda params, part: params * len(part), np.ones(1000), np.arange(1000.0).reshape(10, 100))
        with pytest.raises(TaskError):
            master.run(usercode.divide, 0)
        stats = master.stats()
    assert (stats.rounds, stats.failed_rounds, stats.resent_slices) == (1, 1, 0)
    assert 8000 <= stats.params_sent < 8500
    assert 8000 <= stats.dataset_sent < 9000
    assert 8000 <= stats.results_received < 17000
    assert stats.code_sent > 0
    assert stats.output_received == 0


def test_stats_are_a_copy(master):
    before = master.stats()
    rounds = before.rounds
    master.run(usercode.forty_two)
    assert before.rounds == rounds
    assert master.stats().rounds == rounds + 1


@pytest.mark.parametrize(
    ("hosts", "workers"),
    [
        (None, len(os.sched_getaffinity(0))),
        (3, 3),
        ("local*3", 3),
        (["local", "local"], 2),
        ([RemoteWorker("local"), HostSpec("local", None, None, 2)], 3),
    ],
    ids=["None", "int", "text", "list", "objects"],
)
def test_hosts_say_how_many_workers_this_machine_starts(hosts, workers):
    with Master(hosts) as master:
        assert master.run(lambda params, part: 1) == workers
        assert [(worker.host, worker.index, worker.state) for worker in master.workers] == [
            ("local", index, "ready") for index in range(workers)
        ]
        assert len({worker.pid for worker in master.workers}) == workers


# Arguments that cannot be right


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3,), TypeError, "module"),
        ((os,), TypeError, "mapfunc"),
        ((usercode.forty_two, None, "abc"), TypeError, "data"),
        ((usercode.forty_two, None, []), ValueError, "data is empty"),
        ((usercode.forty_two, threading.Lock()), TypeError, "params"),
        ((usercode.forty_two, DataSet([1, 2])), TypeError, r"params is a ListDataSet.*run\(module, None, dataset\)"),
        ((usercode.forty_two, DataSet(np.eye(2)), [1]), TypeError, "params is a NumpyMatrixDataSet"),
    ],
    ids=["no code", "no mapfunc", "a string as data", "no data", "a lock in the params", "data as params", "both"],
)
def test_an_argument_that_cannot_be_right_is_told_at_the_call(master, arguments, error, text):
    for call in (master.run, master.submit):
        with pytest.raises(error, match=text):
            call(*arguments)
    assert master.run(usercode.forty_two) == 84


@pytest.mark.parametrize("timeout", [0, -1, "1"])
def test_a_timeout_is_a_positive_number_of_seconds(master, timeout):
    with pytest.raises((TypeError, ValueError), match="timeout"):
        master.run(usercode.forty_two, timeout=timeout)


def test_a_closed_master_says_so():
    with Master(1) as master:
        pass
    for call in (master.run, master.submit):
        with pytest.raises(MasterClosed):
            call(usercode.forty_two)
