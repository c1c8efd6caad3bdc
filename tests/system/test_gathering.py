"""What becomes of results: `run` adds or reduces them, `collect` and `map` list them; here, over ssh, and serially."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import logging
import operator
import sys

import numpy as np
import pandas
import pytest
import scipy.sparse

import gather
import gathercode
import pyzmq_garbage  # noqa: F401
import usercode
from qjam import DataSet, HostSpec, Master, TaskError
from qjam.outcome import _say_that_lists_are_added
from ssh_hosts import home  # noqa: F401
from sshd import private_sshd

SLICES = [1, 2, 5, 16]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory, home):
    with private_sshd(tmp_path_factory.mktemp("sshd"), home=home) as sshd:
        yield sshd


@pytest.fixture(scope="module", params=["local", "ssh", "two hosts", "serial"])
def master(request):
    hosts = {"local": ["local*2"], "serial": ["serial"], "ssh": [], "two hosts": ["local"]}[request.param]
    config = None
    if not hosts or request.param == "two hosts":
        sshd = request.getfixturevalue("sshd")
        hosts, config = [*hosts, HostSpec(sshd.name, workers=2 - len(hosts), python=sys.executable)], sshd.config
    with Master(hosts, ssh_config=config) as master:
        master.submit(usercode.forty_two).result()
        yield master


def slices(*values):
    """A data set with one value a slice."""
    return DataSet(list(values), slice_size=1)


# collect


def test_collect_lists_the_results_in_order_and_adds_nothing(master):
    results = [None, "text", {"a": 1}, True, [np.arange(3)], (1, 2.5)]
    came = master.collect(lambda params, part: params[part[0]], results, slices(*range(6)))
    assert [type(result) for result in came] == [type(result) for result in results]
    np.testing.assert_equal(came, results)
    assert master.collect(gathercode.first, None, slices(7)) == [7]


def test_collect_does_not_call_the_reduce_of_a_module(master):
    assert master.collect(gather, len, slices("a", "b")) == [[1], [1]]


def test_collect_without_data_has_a_result_of_each_worker(master):
    with Master("serial") as serial:
        calls = len(master.workers) if master.workers[0].host != "serial" else len(serial.collect(usercode.forty_two))
    assert master.collect(usercode.forty_two) == [42] * calls


def test_collect_of_many_results(master):
    data = slices(*range(3000))
    came = master.collect(lambda params, part: np.full(40, part[0]), None, data)
    assert [int(array[0]) for array in came] == list(range(3000))
    came[0][:] = 1  # the caller's own


def test_collect_of_large_results(master):
    came = master.collect(lambda params, part: np.full(1 << 17, part[0], float), None, slices(*range(8)))
    assert [(array[0], array[-1], len(array)) for array in came] == [(i, i, 1 << 17) for i in range(8)]


def test_collected_results_are_as_the_function_left_them(master):
    def reuse(params, part, buffer=bytearray(1)):  # noqa: B008  one for all calls
        buffer[0] = part[0]
        return buffer

    assert master.collect(reuse, None, slices(*range(16))) == [bytearray([i]) for i in range(16)]


# map


def test_map_calls_the_function_for_each_item(master):
    assert list(master.map(abs, range(-20, 20))) == [abs(i) for i in range(-20, 20)]
    assert list(master.map(gathercode.inverse, (x for x in (1, 2, 4)))) == [1, 0.5, 0.25]
    assert next(master.map(lambda row: row.sum(), np.eye(3))) == 1
    assert list(master.map(lambda item: item, [(1, 2), [3], None, "x"])) == [(1, 2), [3], None, "x"]


def test_map_of_several_iterables_ends_with_the_shortest(master):
    assert list(master.map(pow, [2, 3, 4], range(2))) == [1, 3]
    assert list(master.map(lambda a, b, c: (a, b, c), "ab", [1, 2], [None, 3])) == [("a", 1, None), ("b", 2, 3)]
    assert list(master.map(abs, [])) == []
    assert iter(results := master.map(abs, [1])) is results


@pytest.mark.parametrize("chunksize", [1, 7, 100, np.int64(3)])
def test_the_size_of_the_chunks_does_not_matter(master, chunksize):
    assert list(master.map(abs, range(50), chunksize=chunksize)) == list(range(50))


def test_mapped_results_are_as_the_function_left_them(master):
    def reuse(item, buffer=bytearray(1)):  # noqa: B008  one for all calls
        buffer[0] = item
        return buffer

    assert list(master.map(reuse, range(40), chunksize=20)) == [bytearray([i]) for i in range(40)]


@pytest.mark.parametrize("chunksize", [None, 1, 4, 100])
def test_the_error_of_an_item_names_the_item(master, chunksize):
    with pytest.raises(TaskError, match=r"ZeroDivisionError: division by zero \(item 9\)") as caught:
        master.map(gathercode.inverse, [1] * 9 + [0] + [2] * 9, chunksize=chunksize)
    assert type(caught.value.__cause__) is ZeroDivisionError
    assert "return 1 / item" in caught.value.remote_traceback
    assert "qjam_worker" not in caught.value.remote_traceback


def test_items_are_called_once_and_uneven_ones_do_not_hold_others_up(tmp_path):
    path = str(tmp_path / "done")
    with Master(2, speculation=False) as master:
        items = [(path, index, 15) for index in range(16)]
        assert list(master.map(gathercode.wait_for_the_others, items, chunksize=1)) == list(range(16))
    assert (tmp_path / "done").read_bytes() == b"." * 15


@pytest.mark.parametrize(
    ("arguments", "more", "error", "text"),
    [
        (([1], abs), {}, TypeError, r"function must be callable.*map\(function, \*iterables\)"),
        ((abs, slices(1)), {}, TypeError, r"a ListDataSet has slices: use collect\(function, params, dataset\)"),
        ((abs,), {}, TypeError, "at least one iterable"),
        ((abs, 3), {}, TypeError, r"3 \(int\) is not iterable"),
        ((abs, [1]), {"chunksize": 0}, ValueError, "chunksize must be an int of at least 1"),
        ((abs, [1]), {"chunksize": 1.5}, TypeError, "chunksize must be an int of at least 1"),
        ((abs, [1]), {"timeout": -1}, ValueError, "timeout"),
    ],
)
def test_wrong_arguments_of_map_are_told_at_the_call(master, arguments, more, error, text):
    with pytest.raises(error, match=text):
        master.map(*arguments, **more)


# reduce=


def test_reduce_is_for_functions_and_modules_and_wins(master):
    data = slices(3, 1, 2)
    assert master.run(gathercode.first, None, data, reduce=gathercode.largest) == 3
    assert master.run(gathercode.first, None, data, reduce=lambda a, b: f"({a} {b})") == "((3 1) 2)"
    assert master.run(gather, len, data, reduce=max) == [1]
    assert master.submit(gathercode.first, None, data, reduce=min).result() == 1
    assert master.run(gathercode.first, None, data) == 6
    assert master.run(gathercode.first, None, slices(None, None), reduce=operator.is_) is True


def test_what_is_no_reduce_is_told_at_the_call(master):
    for call in (master.run, master.submit):
        with pytest.raises(TypeError, match=r"reduce must be a function reduce\(a, b\), or None"):
            call(gathercode.first, None, slices(1), reduce=3)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_a_reduce_that_raises_is_a_task_error_with_its_traceback(master, count):
    with pytest.raises(TaskError, match="ArithmeticError: cannot reduce") as caught:
        master.run(gathercode.first, None, slices(*range(count)), reduce=gathercode.broken_reduce)
    assert type(caught.value.__cause__) is ArithmeticError
    assert 'raise ArithmeticError(f"cannot reduce' in caught.value.remote_traceback
    assert "pending.py" not in caught.value.remote_traceback


# What run adds


@pytest.mark.parametrize("count", SLICES)
@pytest.mark.parametrize(
    ("value", "total"),
    [
        (collections.Counter("aab"), lambda n: collections.Counter(a=2 * n, b=n)),
        (fractions.Fraction(1, 3), lambda n: fractions.Fraction(n, 3)),
        (decimal.Decimal("0.1"), lambda n: decimal.Decimal("0.1") * n),
        (datetime.timedelta(hours=1), lambda n: datetime.timedelta(hours=n)),
        ((collections.Counter("a"), 1), lambda n: (collections.Counter(a=n), n)),
    ],
    ids=["Counter", "Fraction", "Decimal", "timedelta", "inside a tuple"],
)
def test_what_knows_how_to_add_itself_is_added(master, value, total, count):
    came = master.run(lambda params, part: params, value, slices(*range(count)))
    assert came == total(count)
    assert type(came) is type(value)


@pytest.mark.parametrize("count", SLICES)
def test_pandas_and_scipy_add_by_their_own_rules(master, count):
    data = slices(*range(count))
    series = master.run(lambda params, part: pandas.Series([1.5, 2.0], ["a", "b"]), None, data)
    pandas.testing.assert_series_equal(series, pandas.Series([1.5 * count, 2.0 * count], ["a", "b"]))
    frame = master.run(lambda params, part: pandas.DataFrame({"x": [1, 2]}), None, data)
    pandas.testing.assert_frame_equal(frame, pandas.DataFrame({"x": [count, 2 * count]}))
    matrix = master.run(lambda params, part: scipy.sparse.eye(3, format="csr"), None, data)
    assert scipy.sparse.issparse(matrix)
    assert (matrix.toarray() == count * np.eye(3)).all()


@pytest.mark.parametrize("count", SLICES)
def test_own_classes_add_by_their_own_rules(master, count):
    data = slices(*range(count))
    assert master.run(gathercode.moments, None, data).sums.tolist() == [count, sum(range(count))]
    vector = master.run(gathercode.vector, None, data)
    assert vector == [sum(range(count))]
    assert type(vector) is gathercode.Vector


@pytest.mark.parametrize("count", SLICES)
@pytest.mark.parametrize(
    ("value", "total"),
    [
        (True, lambda n: n),
        (np.True_, np.int64),
        (np.array([True, False]), lambda n: np.array([n, 0])),
        (np.array(True), np.array),
        ([True, (np.True_, 1.5)], lambda n: [n, (np.int64(n), 1.5 * n)]),
        (np.ma.array([True, True], mask=[False, True]), lambda n: np.ma.array([n, 1], mask=[False, True])),
    ],
    ids=["bool", "bool_", "array", "0-d array", "inside lists", "masked array"],
)
def test_bools_are_counted_on_any_number_of_slices(master, value, total, count):
    came, expected = master.run(lambda params, part: params, value, slices(*range(count))), total(count)
    assert type(came) is type(expected)
    assert np.asarray(came if type(came) is not list else came[0]).dtype == np.int64
    np.testing.assert_equal(came, expected)


def test_small_integers_of_numpy_wrap_around_and_pythons_do_not(master):
    data = slices(0, 1)
    assert master.run(lambda params, part: np.array([200], np.uint8), None, data).tolist() == [144]
    assert master.run(lambda params, part: 2**70, None, data) == 2**71


@pytest.mark.parametrize("count", SLICES)
def test_none_is_an_error_at_the_first_result_and_collect_takes_it(master, count):
    with pytest.raises(TaskError, match="return a value, or use collect"):
        master.run(lambda params, part: None, None, slices(*range(count)))
    assert master.collect(lambda params, part: None, None, slices(*range(count))) == [None] * count


@pytest.mark.parametrize("value", ["text", b"bytes", bytearray(b"a"), {"a": 1}, collections.deque([1])], ids=repr)
def test_what_is_not_added_is_an_error_that_names_collect(master, value):
    with pytest.raises(TaskError, match=r"cannot add two results.*reduce\(a, b\).*collect"):
        master.run(lambda params, part: params, value, slices(0, 1))


def test_lists_of_different_lengths_are_an_error_that_names_collect(master):
    with pytest.raises(TaskError, match=r"their lengths differ.*collect"):
        master.run(lambda params, part: [np.zeros(2)] * part[0], None, slices(1, 2))


def test_that_lists_of_arrays_were_added_is_said_once(master, caplog):
    _say_that_lists_are_added.cache_clear()
    with caplog.at_level(logging.WARNING, "qjam"):
        for _ in range(2):
            assert master.run(lambda params, part: [np.ones(2)], None, slices(0, 1))[0].tolist() == [2, 2]
        master.run(lambda params, part: (np.ones(2),), None, slices(0, 1))
    assert [record.message for record in caplog.records if "use collect" in record.message] != []
    assert sum("use collect" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("call", ["run", "submit", "collect"])
def test_a_data_set_in_the_place_of_params_is_told(master, call):
    with pytest.raises(TypeError, match=r"params is a ListDataSet: the order is \w+\(module, params, dataset\)"):
        getattr(master, call)(gathercode.first, slices(1))
