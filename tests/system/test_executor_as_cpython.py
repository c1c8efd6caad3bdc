"""Executor does what CPython's own tests ask of ProcessPoolExecutor.

Each test says which of CPython's it answers to: Lib/test/test_concurrent_futures of python 3.13, and of 3.14 for
`buffersize` and `terminate_workers`. These have no counterpart, because qjam has no such thing: the limits of Windows,
`_processes`, `_call_queue`, `mp_context`, processes that start when they are needed (test_idle_process_reuse_*) or end
after some calls (test_max_tasks_*), and test_python_finalization_error and test_gh105829_*, which patch the module.

Where qjam differs, the test has DIFFERS and says how.
"""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import pickle
import re
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool

import pytest

import jobcode
from gates import Gate
from qjam import Executor

SHORT = 0.05
LONG = 30.0


def ended(state, result=None, error=None):
    future = Future()
    future._state, future._result, future._exception = state, result, error
    return future


PENDING = ended("PENDING")
RUNNING = ended("RUNNING")
CANCELLED = ended("CANCELLED")
NOTIFIED = ended("CANCELLED_AND_NOTIFIED")
FAILED = ended("FINISHED", error=OSError())
SUCCESSFUL = ended("FINISHED", result=42)


def collected(reference):
    """Tells whether an object is let go without the garbage collector, by the thread that sets futures too."""
    until = time.monotonic() + LONG
    while reference() is not None and time.monotonic() < until:
        time.sleep(0.001)
    return reference() is None


@pytest.fixture(scope="module")
def shared():
    with Executor(2) as executor:
        concurrent.futures.wait([executor.submit(jobcode.square, 1)])  # its threads are there from now on
        yield executor


@pytest.fixture
def executor(shared):
    """Two workers; all calls of a test have ended when the next one begins."""
    yield shared
    concurrent.futures.wait(shared._calls._caller.outstanding, LONG)
    assert not shared._calls._caller.outstanding


@pytest.fixture
def own():
    """An executor of the test's own, which may shut it down."""
    with Executor(2) as executor:
        yield executor


@pytest.fixture
def gates(tmp_path):
    """Makes gates by name."""
    made = {}

    def gate(name):
        if name not in made:
            made[name] = Gate(tmp_path / name)
        return made[name]

    yield gate
    for one in made.values():
        one.open(100)
        one.close()


@pytest.fixture
def held(gates):
    """Submits a call that runs until `let_go`; returns when it has begun."""

    def hold(executor, value=None):
        future = executor.submit(jobcode.tell_and_wait, gates("told").path, gates("gate").path, value)
        gates("told").heard()
        while not future.running():
            time.sleep(0.001)
        return future

    return hold


# What all executors do (executor.py)


def test_submit(executor):  # test_submit
    assert executor.submit(pow, 2, 8).result() == 256


def test_submit_with_keywords(executor):  # test_submit_keyword
    assert executor.submit(jobcode.multiply, 2, y=8).result() == 16
    assert executor.submit(jobcode.give, 1, self=2, fn=3).result() == ((1,), {"self": 2, "fn": 3})
    with pytest.raises(TypeError):
        executor.submit(fn=jobcode.give, arg=1)
    with pytest.raises(TypeError):
        executor.submit(arg=1)


@pytest.mark.parametrize("chunksize", [1, 3])
def test_map(executor, chunksize):  # test_map
    results = executor.map(pow, range(10), range(10), chunksize=chunksize)
    assert list(results) == list(map(pow, range(10), range(10)))


def test_an_exception_is_raised_in_its_turn(executor):  # test_map_exception
    results = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert [next(results), next(results)] == [(0, 1), (0, 1)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_ends_with_its_timeout(executor, gates):  # test_map_timeout
    results = executor.map(jobcode.maybe_wait, [None, None, gates("gate").path], timeout=1)
    assert [next(results), next(results)] == [None, None]
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)


def test_shutdown_with_calls_under_way(own):  # test_shutdown_race_issue12456
    own.map(str, [2] * 3)
    own.shutdown()


def test_an_argument_is_not_kept(executor):  # test_no_stale_references
    thing = jobcode.Thing()
    collected = threading.Event()
    reference = weakref.ref(thing, lambda _: collected.set())
    executor.submit(thing.method)
    del thing
    assert collected.wait(LONG)
    assert reference() is None


@pytest.mark.parametrize("number", [0, -1])
def test_there_must_be_workers(number):  # test_max_workers_negative
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        Executor(max_workers=number)
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        Executor(number)


@pytest.mark.parametrize("chunksize", [1, 3])
def test_a_result_is_not_kept(executor, chunksize):  # test_free_reference
    for thing in executor.map(jobcode.make_thing, range(6), chunksize=chunksize):
        reference = weakref.ref(thing)
        del thing
        assert collected(reference)


# The buffer of map (executor.py of 3.14)


def test_buffersize_is_checked(executor):  # test_map_buffersize_type_validation, test_map_buffersize_value_validation
    for wrong in ("foo", 2.0):
        with pytest.raises(TypeError, match="buffersize must be an integer or None"):
            executor.map(str, range(4), buffersize=wrong)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="buffersize must be greater than 0"):
            executor.map(str, range(4), buffersize=wrong)


@pytest.mark.parametrize("buffersize", [1, 2, 4, 5])
@pytest.mark.parametrize("chunksize", [1, 3])
def test_a_buffer_changes_no_result(executor, buffersize, chunksize):  # test_map_buffersize
    results = executor.map(str, range(4), buffersize=buffersize, chunksize=chunksize)
    assert list(results) == ["0", "1", "2", "3"]


def test_an_iterable_may_have_no_end(executor):  # test_map_buffersize_on_infinite_iterable
    results = executor.map(str, itertools.count(), buffersize=2)
    assert [next(results) for _ in range(5)] == ["0", "1", "2", "3", "4"]


def test_one_of_several_iterables_may_have_an_end(executor):  # test_map_buffersize_on_multiple_infinite_iterables
    results = executor.map(jobcode.multiply, itertools.count(), [1, 2, 3], buffersize=2)
    assert list(results) == [0, 2, 6]


def test_an_empty_iterable_gives_nothing(executor):  # test_map_buffersize_on_empty_iterable
    assert list(executor.map(str, [], buffersize=2)) == list(executor.map(str, [])) == list(executor.map(str)) == []


def test_an_iterable_is_taken_from_as_results_are(executor):  # test_map_buffersize_when_buffer_is_full
    items = iter(range(10))
    results = executor.map(str, items, buffersize=4)
    assert next(items) == 4
    assert next(results) == "0"
    assert next(items) == 6
    assert list(results) == ["1", "2", "3", "5", "7", "8", "9"]


def test_an_exception_ends_the_taking(executor):  # test_map_buffersize_when_error
    taken = []
    items = (taken.append(item) or item for item in [1, 2, 0, 3, 4, 5, 6, 7])
    results = executor.map(lambda x: 1 // x, items, buffersize=2)
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert taken == [1, 2, 0, 3, 4]


# Of processes, as in test_process_pool.py


def test_a_worker_that_dies_ends_its_call(executor):  # test_killed_child
    # DIFFERS: the executor goes on. PPE is broken from then on.
    with pytest.raises(BrokenProcessPool):
        executor.submit(jobcode.crash).result(LONG)
    assert executor.submit(pow, 2, 8).result(LONG) == 256


@pytest.mark.parametrize("chunksize", [6, 40, 50])
def test_chunks_of_any_size(executor, chunksize):  # test_map_chunksize
    results = executor.map(pow, range(40), range(40), chunksize=chunksize)
    assert list(results) == list(map(pow, range(40), range(40)))


def test_a_chunk_has_items(executor):  # test_map_chunksize
    with pytest.raises(ValueError, match=r"chunksize must be >= 1\."):
        executor.map(pow, range(40), range(40), chunksize=-1)


def test_the_traceback_of_the_worker_is_the_cause(executor, capsys):  # test_traceback
    with pytest.raises(RuntimeError) as raised:
        executor.submit(jobcode.fail).result()
    error = raised.value
    assert type(error) is RuntimeError
    assert error.args == (123,)
    assert "raise RuntimeError(123)  # as it stands here" in str(error.__cause__)
    sys.excepthook(type(error), error, error.__traceback__)
    assert "raise RuntimeError(123)  # as it stands here" in capsys.readouterr().err


def test_a_worker_does_not_keep_an_argument(executor, gates):  # test_ressources_gced_in_workers
    thing = jobcode.TellsItsEnd(gates("end").path)
    executor.submit(id, thing).result()
    assert int(gates("end").heard())
    thing.path = ""


def test_many_calls_that_wait(own, gates):  # test_saturation
    assert own._max_workers == 2
    futures = [own.submit(jobcode.maybe_wait, gates("gate").path) for _ in range(30)]
    gates("gate").open(30)
    assert [future.result(LONG) for future in futures] == [None] * 30


@pytest.mark.parametrize("end", ["terminate_workers", "kill_workers"])
def test_running_calls_are_dropped(held, end):  # test_force_shutdown_workers, of 3.14
    executor = Executor(1)
    running, waiting = held(executor), executor.submit(pow, 2, 8)
    getattr(executor, end)()
    assert running.cancelled()
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(pow, 2, 8)
    getattr(executor, end)()


# The end (test_shutdown.py)


def test_no_call_after_shutdown(own):  # test_run_after_shutdown
    own.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        own.submit(pow, 2, 5)


def program(tmp_path, text):
    (tmp_path / "program.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
    )


SLOW = """
from qjam import Executor
import time
def work():
    time.sleep(0.5)
    print("apple", flush=True)
if __name__ == "__main__":
    executor = Executor(2)
"""


def test_the_program_ends_after_its_calls(tmp_path):  # test_interpreter_shutdown
    # DIFFERS: what a call prints has the worker's name before it; with Executor(echo=False) nothing is printed.
    done = program(tmp_path, SLOW + "    executor.submit(work)\n")
    assert re.fullmatch(r"\[local [01]\] apple\n", done.stdout)
    assert (done.stderr, done.returncode) == ("", 0)


def test_the_program_ends_after_the_calls_that_were_left(tmp_path):  # test_hang_gh83386
    done = program(tmp_path, SLOW + "    executor.submit(work)\n    executor.shutdown(wait=False)\n")
    assert re.fullmatch(r"\[local [01]\] apple\n", done.stdout)
    assert (done.stderr, done.returncode) == ("", 0)


def test_no_call_while_the_program_ends(tmp_path):  # test_submit_after_interpreter_shutdown
    text = """
import atexit
@atexit.register
def run_last():
    try:
        executor.submit(id, None)
    except RuntimeError:
        print("runtime-error")
        raise
from qjam import Executor
if __name__ == "__main__":
    executor = Executor(1)
    executor.submit(id, 42).result()
"""
    done = program(tmp_path, text)
    assert "RuntimeError: cannot schedule new futures" in done.stderr
    assert done.stdout.strip() == "runtime-error"


def test_shutdown_waits_for_all_calls(own):  # test_hang_issue12364
    futures = [own.submit(pow, 2, 8) for _ in range(50)]
    own.shutdown()
    assert all(future.done() for future in futures)
    assert {future.result() for future in futures} == {256}


def test_shutdown_cancels_what_has_not_begun(own, held, gates):  # test_cancel_futures
    running = [held(own), held(own)]
    futures = [own.submit(pow, 2, 8) for _ in range(50)]
    own.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in futures[10:])
    gates("gate").open(2)
    assert [future.result(LONG) for future in running] == [None, None]
    own.shutdown()
    assert all(future.done() for future in futures)


def test_a_cancelled_call_does_not_hold_shutdown_up():  # test_hang_gh94440
    executor = Executor(1)
    executor.submit(int).result()
    executor.submit(int).cancel()
    executor.shutdown(wait=True)


def test_the_block_ends_the_workers():  # test_context_manager_shutdown, test_processes_terminate
    with Executor(3) as executor:
        assert list(executor.map(abs, range(-5, 5))) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]
        master = executor._calls.master
    assert {worker.state for worker in master.workers} <= {"closed"}


@pytest.mark.parametrize("end", ["collected", "shut down"])
def test_calls_outlive_their_executor(end):  # test_del_shutdown, test_shutdown_no_wait
    executor = Executor(2)
    results = executor.map(abs, range(-5, 5))
    if end == "shut down":
        executor.shutdown(wait=False)
    del executor
    gc.collect()
    assert list(results) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]


# Of initializers, as in test_init.py


def test_the_initializer_runs_in_each_worker():  # InitializerMixin.test_initializer
    with Executor(2, initializer=jobcode.set_state, initargs=("begun",)) as executor:
        assert {future.result() for future in [executor.submit(jobcode.get_state) for _ in range(4)]} == {"begun"}


def test_an_initializer_that_fails_breaks_the_executor():  # FailingInitializerMixin.test_initializer
    # DIFFERS: the text of the exception says why; PPE logs it.
    with Executor(2, initializer=jobcode.fail_to_start) as executor:
        with pytest.raises(BrokenProcessPool, match="cannot start here"):
            executor.submit(jobcode.get_state).result(LONG)
        with pytest.raises(BrokenProcessPool, match="cannot start here"):
            executor.submit(jobcode.get_state)


def test_an_initializer_can_be_called():  # of test_thread_pool.py and of ProcessPoolExecutor.__init__
    with pytest.raises(TypeError, match="initializer must be a callable"):
        Executor(1, initializer=5)


# Each error is that of its call, and the executor is of use afterwards (test_deadlock.py)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (pickle.PicklingError, (id, jobcode.FailsWhenPickled())),  # test_error_at_task_pickle
        # DIFFERS in the next two: an exception while arguments are loaded is that of the call. PPE is broken by it.
        (SystemExit, (id, jobcode.LeavesWhenLoaded())),  # test_exit_at_task_unpickle
        (pickle.UnpicklingError, (id, jobcode.FailsWhenLoaded())),  # test_error_at_task_unpickle
        (BrokenProcessPool, (id, jobcode.CrashesWhenLoaded())),  # test_crash_at_task_unpickle
        (BrokenProcessPool, (jobcode.crash,)),  # test_crash_during_func_exec_on_worker
        (SystemExit, (jobcode.leave,)),  # test_exit_during_func_exec_on_worker
        (RuntimeError, (jobcode.fail_with, RuntimeError)),  # test_error_during_func_exec_on_worker
        (BrokenProcessPool, (jobcode.make, jobcode.CrashesWhenPickled)),  # test_crash_during_result_pickle_on_worker
        (SystemExit, (jobcode.make, jobcode.LeavesWhenPickled)),  # test_exit_during_result_pickle_on_worker
        (pickle.PicklingError, (jobcode.make, jobcode.FailsWhenPickled)),  # test_error_during_result_pickle_on_worker
        # DIFFERS: an exception while the result is loaded here is that of the call. PPE is broken by it.
        (pickle.UnpicklingError, (jobcode.make, jobcode.FailsWhenLoaded)),  # test_error_during_result_unpickle_in_...
        (SystemExit, (jobcode.make, jobcode.LeavesWhenLoaded)),  # test_exit_during_result_unpickle_in_result_handler
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_error_blocks_the_executor(executor, error, call):
    with pytest.raises(error):
        executor.submit(*call).result(LONG)
    assert executor.submit(pow, 2, 8).result(LONG) == 256


def test_a_worker_that_dies_after_shutdown(own, gates):  # test_shutdown_deadlock
    future = own.submit(jobcode.wait_and_crash, gates("gate").path)
    gates("gate").open(3)
    own.shutdown()
    with pytest.raises(BrokenProcessPool):
        future.result(LONG)


def test_what_cannot_be_pickled_does_not_hold_shutdown_up(own):  # test_shutdown_deadlock_pickle
    own.submit(id, 42).result()
    future = own.submit(id, jobcode.FailsWhenPickled())
    own.shutdown(wait=False)
    with pytest.raises(pickle.PicklingError):
        future.result(LONG)


def test_workers_die_while_large_arguments_come(own):  # test_crash_big_data
    with pytest.raises(BrokenProcessPool):
        list(own.map(jobcode.crash, ["a" * (4 << 20)] * 4))


# Of concurrent.futures.wait, as in test_wait.py


def test_wait_for_one_future_twice(executor):  # test_20369
    future = executor.submit(pow, 2, 8)
    assert concurrent.futures.wait([future, future]) == ({future}, set())


def test_wait_for_the_first(executor, held, gates):  # test_first_completed, test_first_completed_some_already_completed
    slow = held(executor)
    quick = executor.submit(pow, 2, 8)
    done, others = concurrent.futures.wait([CANCELLED, quick, slow], return_when="FIRST_COMPLETED")
    assert (done, others) == ({quick}, {CANCELLED, slow})
    done, others = concurrent.futures.wait([NOTIFIED, SUCCESSFUL, slow], return_when="FIRST_COMPLETED")
    assert (done, others) == ({NOTIFIED, SUCCESSFUL}, {slow})
    gates("gate").open()


def test_wait_for_the_first_exception(executor, held, gates):  # test_first_exception, ..._some_already_complete
    slow = held(executor)
    good, bad = executor.submit(pow, 2, 8), executor.submit(divmod, 21, 0)
    done, others = concurrent.futures.wait(
        [SUCCESSFUL, CANCELLED, NOTIFIED, good, bad, slow], return_when="FIRST_EXCEPTION"
    )
    assert done | {good} == {SUCCESSFUL, NOTIFIED, good, bad}
    assert others - {good} == {CANCELLED, slow}
    done, others = concurrent.futures.wait([FAILED, slow], return_when="FIRST_EXCEPTION")
    assert (done, others) == ({FAILED}, {slow})  # test_first_exception_one_already_failed
    gates("gate").open()


def test_wait_for_all(executor):  # test_all_completed
    futures = {SUCCESSFUL, NOTIFIED, FAILED, executor.submit(divmod, 2, 0), executor.submit(pow, 2, 8)}
    assert concurrent.futures.wait(futures) == (futures, set())


def test_wait_for_a_while(executor, held, gates):  # test_timeout
    slow = held(executor)
    done, others = concurrent.futures.wait([NOTIFIED, FAILED, SUCCESSFUL, slow], timeout=SHORT)
    assert (done, others) == ({NOTIFIED, FAILED, SUCCESSFUL}, {slow})
    gates("gate").open()


def test_many_that_are_waited_for(executor):  # test_pending_calls_race
    futures = {executor.submit(pow, 2, 8) for _ in range(100)}
    assert concurrent.futures.wait(futures) == (futures, set())


# Of concurrent.futures.as_completed, as in test_as_completed.py


def test_as_completed(executor):  # test_no_timeout
    futures = {NOTIFIED, FAILED, SUCCESSFUL, executor.submit(pow, 2, 21), executor.submit(pow, 7, 6)}
    assert set(concurrent.futures.as_completed(futures)) == futures


@pytest.mark.parametrize("timeout", [0, SHORT])
def test_as_completed_for_a_while(executor, held, gates, timeout):  # test_future_times_out
    ready = {NOTIFIED, FAILED, SUCCESSFUL}
    slow = held(executor)
    seen = concurrent.futures.as_completed(ready | {slow}, timeout)
    assert {next(seen) for _ in range(3)} == ready
    with pytest.raises(concurrent.futures.TimeoutError):
        next(seen)
    gates("gate").open()


def test_as_completed_gives_a_future_once(executor):  # test_duplicate_futures
    future = executor.submit(pow, 2, 8)
    assert list(concurrent.futures.as_completed(itertools.repeat(future, 3))) == [future]


def test_a_future_is_not_kept(executor):  # test_free_reference_yielded_future
    futures = [executor.submit(pow, 2, 8) for _ in range(8)]
    for future in concurrent.futures.as_completed(futures):
        futures.remove(future)
        reference = weakref.ref(future)
        del future
        assert collected(reference)


# Futures (test_future.py), as far as a future of ours is not python's own


def test_the_states_of_a_future(executor, held, gates):  # test_repr, test_running, test_done, test_cancelled
    first, second = held(executor), held(executor)
    waiting = executor.submit(pow, 2, 8)
    assert first.running()
    assert not first.done()
    assert not waiting.running()
    assert "state=running" in repr(first)
    assert "state=pending" in repr(waiting)
    assert waiting.cancel()
    assert waiting.cancelled()
    assert waiting.done()
    gates("gate").open(2)
    concurrent.futures.wait([first, second])
    assert first.done()
    assert not first.cancel()  # test_cancel
    assert "state=finished" in repr(first)


def test_a_running_call_is_interrupted(executor, held):  # test_cancel
    # DIFFERS: a future of PPE that runs cannot be cancelled.
    future = held(executor)
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(CancelledError):  # test_result_with_cancel
        future.result(LONG)
    assert executor.submit(pow, 2, 8).result(LONG) == 256


def test_callbacks(executor, held, gates):  # test_done_callback_with_result, ..._exception, ..._already_*
    called = []
    future = held(executor, 5)
    future.add_done_callback(lambda done: called.append(done.result()))
    gates("gate").open()
    assert future.result(LONG) == 5
    future = executor.submit(jobcode.fail)
    concurrent.futures.wait([future])
    future.add_done_callback(lambda done: called.append(done.exception().args))
    future = held(executor)
    future.add_done_callback(lambda done: called.append(done.cancelled()))  # test_done_callback_with_cancel
    future.cancel()
    assert called == [5, (123,), True]


def test_a_callback_that_raises_is_logged(executor, held, gates, caplog):  # test_done_callback_raises
    called = threading.Event()
    future = held(executor)
    future.add_done_callback(lambda done: 1 / 0)
    future.add_done_callback(lambda done: called.set())
    gates("gate").open()
    assert called.wait(LONG)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_result_is_waited_for_a_while(
    executor, held, gates, ask
):  # test_result_with_timeout, test_exception_with_...
    future = held(executor)
    with pytest.raises(concurrent.futures.TimeoutError):
        getattr(future, ask)(timeout=0)
    gates("gate").open()
