"""Pool does what multiprocessing.Pool does, as Lib/test/_test_multiprocessing.py asks of it (class _TestPool)."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import threading
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool

import pytest

import jobcode
from gates import Gate
from qjam import Master, Pool

LONG = 30.0


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as pool:
        pool.map(jobcode.square, range(4))
        yield pool


@pytest.fixture
def own():
    with Pool(2) as pool:
        yield pool


@pytest.fixture
def gates(tmp_path):
    made = [Gate(tmp_path / name) for name in ("told", "gate")]
    yield made
    for gate in made:
        gate.open(100)
        gate.close()


def test_apply(pool):  # test_apply
    assert pool.apply(jobcode.multiply, (5,), {"y": 3}) == 15
    assert pool.apply(jobcode.give) == ((), {})


@pytest.mark.parametrize("chunksize", [None, 1, 20])
@pytest.mark.parametrize("count", [0, 1, 10])
def test_map_and_starmap(pool, count, chunksize):  # test_map, test_starmap
    assert pool.map(jobcode.square, range(count), chunksize) == [i * i for i in range(count)]
    pairs = list(zip(range(count), reversed(range(count))))
    assert pool.starmap(jobcode.multiply, pairs, chunksize) == [a * b for a, b in pairs]
    assert pool.starmap_async(jobcode.multiply, iter(pairs), chunksize).get(LONG) == [a * b for a, b in pairs]


def test_an_exception_comes_back(pool):  # test_map_handle_iterable_exception, test_traceback
    with pytest.raises(ValueError, match="item 3") as raised:
        pool.starmap(jobcode.fail_at, [(i, 3) for i in range(10)])
    assert 'raise ValueError(f"item {index}")' in str(raised.value.__cause__)
    with pytest.raises(ZeroDivisionError):
        pool.map(jobcode.square, (1 // i for i in (1, 0)))


def test_callbacks(pool):  # test_map_async_callbacks, test_async
    called = []
    pool.map_async(jobcode.square, [1, 2], callback=called.append).wait(LONG)
    pool.apply_async(jobcode.fail, error_callback=called.append, callback=called.append).wait(LONG)
    pool.map_async(jobcode.square, [], callback=called.append).wait(LONG)
    assert called[0] == [1, 4]
    assert called[1].args == (123,)
    assert called[2] == []


def test_a_callback_that_raises_holds_nobody_up(pool, caplog):
    result = pool.apply_async(jobcode.square, (3,), callback=lambda value: 1 / 0)
    assert result.get(LONG) == 9


def test_a_result_that_is_not_here_yet(pool, gates):  # test_async_timeout
    told, gate = gates
    result = pool.apply_async(jobcode.tell_and_wait, (told.path, gate.path, 5))
    told.heard()
    for kind in (multiprocessing.TimeoutError, TimeoutError):
        with pytest.raises(kind):
            result.get(timeout=0.01)
    result.wait(0.01)
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    gate.open()
    assert result.get(LONG) == 5
    assert result.ready()
    assert result.successful()
    failed = pool.apply_async(jobcode.fail)
    failed.wait(LONG)
    assert not failed.successful()


@pytest.mark.parametrize("chunksize", [1, 3, 100])
@pytest.mark.parametrize("kind", [list, iter])
def test_imap(pool, kind, chunksize):  # test_imap, test_imap_unordered
    items = list(range(20))
    assert list(pool.imap(jobcode.square, kind(items), chunksize)) == [i * i for i in items]
    assert sorted(pool.imap_unordered(jobcode.square, kind(items), chunksize)) == [i * i for i in items]


def test_imap_of_what_has_no_end(pool):
    results = pool.imap(jobcode.square, itertools.count())
    assert list(itertools.islice(results, 300)) == [i * i for i in range(300)]


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_imap_goes_on_after_an_exception(pool, name):  # test_imap_handle_iterable_exception
    results = getattr(pool, name)(lambda x: 6 // x, [1, 0, 2, 3])
    seen = []
    for _ in range(4):
        try:
            seen.append(next(results))
        except ZeroDivisionError:
            seen.append(0)
    assert sorted(seen) == [0, 2, 3, 6]
    assert list(results) == []


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_the_next_result_has_a_timeout(pool, gates, name):
    _, gate = gates
    results = getattr(pool, name)(jobcode.maybe_wait, [gate.path])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    gate.open()
    assert results.next(LONG) is None
    with pytest.raises(StopIteration):
        results.next(0)


def test_imap_unordered_gives_the_fastest(pool, gates):
    _, gate = gates
    results = pool.imap_unordered(jobcode.maybe_wait, [gate.path, None, None])
    assert [next(results), next(results)] == [None, None]
    gate.open()
    assert list(results) == [None]


def test_lambdas(pool):
    offset = 4
    assert pool.map(lambda x: x + offset, range(3)) == [4, 5, 6]


def test_a_worker_that_dies_ends_its_call(pool):
    # Not so with multiprocessing.Pool, which waits for ever.
    with pytest.raises(BrokenProcessPool):
        pool.apply(jobcode.crash)
    assert pool.apply(jobcode.square, (3,)) == 9


def test_an_initializer():  # test_pool_initializer_is_called..., test_initializer
    with Pool(2, jobcode.set_state, ["begun"]) as pool:
        assert pool.starmap(jobcode.get_state, [()] * 4) == ["begun"] * 4
    with pytest.raises(TypeError, match="initializer must be a callable"):
        Pool(1, initializer=5)


def test_the_number_of_processes():  # test_pool_worker_lifetime..., test_invalid processes
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_workers must be greater than 0"):
            Pool(wrong)
    with Master(2) as master:
        with Pool(master=master) as pool:
            assert pool._processes == 2
            assert pool.map(jobcode.square, [3]) == [9]
        assert master.run(lambda params, part: 1) == 2


def test_after_close_the_calls_end(own, gates):  # test_close, test_wait...
    _, gate = gates
    result = own.map_async(jobcode.maybe_wait, [gate.path] * 4)
    lazy = own.imap(jobcode.square, iter(range(500)))
    own.close()
    for call in (own.map, own.imap, own.map_async, own.starmap, own.apply_async):
        with pytest.raises(ValueError, match="Pool not running"):
            call(jobcode.square, [3])
    gate.open(4)
    own.join()
    assert result.get(0) == [None] * 4
    assert list(lazy) == [i * i for i in range(500)]


def test_results_are_taken_after_close(own):
    results = own.imap(jobcode.square, iter(range(500)))
    own.close()
    assert list(results) == [i * i for i in range(500)]
    own.join()


def test_join_comes_after_close(own):
    with pytest.raises(ValueError, match="Pool is still running"):
        own.join()


def test_terminate_drops_the_calls(own, gates):  # test_terminate
    _, gate = gates
    result = own.map_async(jobcode.maybe_wait, [gate.path] * 10)
    own.terminate()
    own.join()
    with pytest.raises(CancelledError):
        result.get(LONG)
    with pytest.raises(ValueError, match="Pool not running"), own:
        pass


def test_the_block_terminates(gates):  # test_context
    told, gate = gates
    with Pool(1) as pool:
        result = pool.apply_async(jobcode.tell_and_wait, (told.path, gate.path))
        told.heard()
    with pytest.raises(CancelledError):
        result.get(LONG)


def test_it_is_not_pickled(pool):  # test_pickle of the docs
    with pytest.raises(NotImplementedError, match="cannot be passed between processes or pickled"):
        pickle.dumps(pool)
    assert repr(pool).startswith("<Pool: open, of <Executor")


def test_threads_share_a_pool(pool):
    found = []
    threads = [threading.Thread(target=lambda: found.append(pool.map(jobcode.square, range(50)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[i * i for i in range(50)]] * 3
