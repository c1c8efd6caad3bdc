"""joblib and scikit-learn on the workers of a Master: what joblib's own tests ask of back-ends with processes.

Each test says which of joblib's it answers to: joblib/test/test_parallel.py of joblib 1.6, and test_dask.py. Not
adapted: those of the class Parallel, of temp_folder, max_nbytes and mmap_mode (arrays of more than 1 MiB are mapped
always, without files of joblib's), of loky's own executor, and of memmaps that are written in workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings
from concurrent.futures.process import BrokenProcessPool

import joblib
import numpy as np
import pytest
from joblib import Parallel, delayed, parallel_backend, parallel_config
from joblib.parallel import TimeoutError as JoblibTimeout

import jobcode
import qjam.joblib
from gates import Gate
from qjam import Master
from qjam.joblib import QjamBackend
from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import write_config

CONTEXTS = [parallel_config, parallel_backend]
GENERATORS = ["generator", "generator_unordered"]


@pytest.fixture(scope="module", autouse=True)
def _two_workers():
    """Those of n_jobs=2 stay for the whole module."""
    qjam.joblib.register()
    wanted = {"hosts": 2, "master": None}
    used = qjam.joblib._workers.take(wanted)
    list(used.executor.map(jobcode.square, range(4)))
    yield
    qjam.joblib._workers.leave(used)
    qjam.joblib.shutdown()


@pytest.fixture(autouse=True)
def _no_others():
    yield
    qjam.joblib.shutdown()


@pytest.fixture
def gates(tmp_path):
    made = [Gate(tmp_path / name) for name in ("told", "gate")]
    yield made
    for gate in made:
        gate.open(100)
        gate.close()


def squares(n_jobs=2, count=10, **options):
    return Parallel(n_jobs=n_jobs, backend="qjam", **options)(delayed(jobcode.square)(i) for i in range(count))


EXPECTED = [i * i for i in range(10)]


# Results


@pytest.mark.parametrize("verbose", [0, 100])
@pytest.mark.parametrize("n_jobs", [1, 2, -1])
def test_results_are_in_order(n_jobs, verbose, capsys):  # test_simple_parallel
    assert squares(n_jobs, verbose=verbose) == EXPECTED


def test_keywords():  # test_parallel_kwargs
    results = Parallel(2, backend="qjam")(delayed(jobcode.multiply)(x, y=3) for x in range(4))
    assert results == [0, 3, 6, 9]


def test_lambdas_and_closures():  # test_lambda_expression, test_parallel_with_interactively_defined_functions
    offset = 5
    assert Parallel(2, backend="qjam")(delayed(lambda x: x + offset)(i) for i in range(3)) == [5, 6, 7]


def test_a_closure_is_taken_as_it_is_at_the_call():  # test_globals_update_at_each_parallel_call
    cell = "before"

    def look():
        return cell

    assert Parallel(2, backend="qjam")(delayed(look)() for _ in range(2)) == ["before"] * 2
    cell = "after"
    assert Parallel(2, backend="qjam")(delayed(look)() for _ in range(2)) == ["after"] * 2


def test_no_task():  # test_parallel_with_exhausted_iterator
    assert Parallel(2, backend="qjam")([]) == []


@pytest.mark.parametrize("order", ["<", ">", "="])
def test_the_order_of_bytes_is_kept(order):  # test_parallel_byteorder_corruption
    array = np.arange(6).reshape(2, 3).view(f"{order}i4")
    for result in Parallel(2, backend="qjam")(delayed(np.negative)(array) for _ in range(2)):
        assert np.array_equal(result, -array)
    ((back,), _) = Parallel(2, backend="qjam")(delayed(jobcode.give)(array) for _ in range(2))[0]
    assert back.dtype.byteorder == array.dtype.byteorder


def test_large_arrays():  # test_auto_memmap_on_arrays_from_generator, test_memmap_with_big_offset
    array = np.ones(1 << 18)
    results = Parallel(2, backend="qjam")(delayed(jobcode.total_and_writable)(array) for _ in range(4))
    assert [total for total, _ in results] == [float(1 << 18)] * 4


def test_many_short_tasks_are_put_together():  # test_batching_auto_subprocesses, test_dask_backend_uses_autobatching
    with Parallel(2, backend="qjam") as parallel:
        assert parallel(delayed(jobcode.square)(i) for i in range(2000)) == [i * i for i in range(2000)]
        assert parallel._backend.compute_batch_size() >= 1
        assert parallel.n_dispatched_batches <= 2000
    assert parallel._backend._effective_batch_size == 1  # test_backend_batch_statistics_reset
    assert parallel._backend._smoothed_batch_duration == 0


@pytest.mark.parametrize("pre_dispatch", ["all", "n_jobs", 7, 1])
@pytest.mark.parametrize("batch_size", ["auto", 1, 4])
def test_any_dispatch(pre_dispatch, batch_size):  # test_dispatch_race_condition
    assert squares(pre_dispatch=pre_dispatch, batch_size=batch_size) == EXPECTED


def test_tasks_are_taken_as_others_end(gates):  # test_dispatch_multiprocessing
    told, gate = gates
    taken = []

    def tasks():
        for i in range(6):
            taken.append(i)
            if i == 3:
                assert told.heard() == "None"  # no fourth task before the first has begun
            yield delayed(jobcode.tell_and_wait)(told.path, gate.path)

    gate.open(6)
    Parallel(2, backend="qjam", batch_size=1, pre_dispatch=3)(tasks())
    assert taken == [0, 1, 2, 3, 4, 5]


# Generators


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_generator_is_in_order(n_jobs):  # test_parallel_return_order_with_return_as_generator_parameter
    assert list(squares(n_jobs, return_as="generator")) == EXPECTED


def test_a_generator_without_order_gives_the_fastest(gates):  # test_parallel_unordered_generator_returns_fastest_first
    told, gate = gates
    tasks = [
        delayed(jobcode.tell_and_wait)(told.path, gate.path, -1),
        *(delayed(jobcode.square)(i) for i in range(9)),
    ]
    results = Parallel(2, backend="qjam", return_as="generator_unordered")(tasks)
    assert sorted(next(results) for _ in range(9)) == EXPECTED[:9]
    gate.open()
    assert list(results) == [-1]


@pytest.mark.parametrize("return_as", GENERATORS)
def test_a_generator_that_is_left(return_as):  # test_deadlock_with_generator
    with Parallel(2, backend="qjam", return_as=return_as) as parallel:
        results = parallel(delayed(np.ones)(500_000) for _ in range(10))
        next(results), next(results)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there were more results
            del results
        assert list(squares()) == EXPECTED  # the same Parallel may keep tasks of the last call: a defect of joblib 1.6


@pytest.mark.parametrize("managed", [False, True])
def test_one_generator_at_a_time(gates, managed):  # test_multiple_generator_call, test_multiple_generator_call_managed
    told, gate = gates
    parallel = Parallel(2, backend="qjam", return_as="generator")
    with parallel if managed else warnings.catch_warnings():
        results = parallel(delayed(jobcode.tell_and_wait)(told.path, gate.path, i) for i in range(4))
        with pytest.raises(RuntimeError, match="This Parallel instance is already running"):
            parallel(delayed(jobcode.square)(i) for i in range(3))
        gate.open(4)
        assert list(results) == [0, 1, 2, 3]


@pytest.mark.parametrize("first", GENERATORS)
@pytest.mark.parametrize("second", GENERATORS)
def test_two_generators_of_two(first, second):  # test_multiple_generator_call_separated
    one, two = squares(return_as=first), squares(return_as=second)
    assert (sorted(one), sorted(two)) == (EXPECTED, EXPECTED)


def test_two_generators_in_one_context():
    with parallel_config("qjam", n_jobs=2):
        one, two = (
            Parallel(return_as="generator", batch_size=1)(delayed(jobcode.square)(i) for i in range(10)) for _ in "ab"
        )
        assert list(one) == EXPECTED
        assert list(two) == EXPECTED


def test_the_end_of_one_generator_does_not_harm_another(gates):  # test_multiple_generator_call_separated_gc
    # Not an error as with loky, whose workers end.
    told, gate = gates
    one = Parallel(2, backend="qjam", return_as="generator")(
        delayed(jobcode.tell_and_wait)(told.path, gate.path) for _ in range(10)
    )
    told.heard()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del one
    assert list(squares(return_as="generator")) == EXPECTED


# Errors, time-outs, aborts


@pytest.mark.parametrize("managed", [False, True])
def test_an_exception_comes_back(managed):  # test_error_capture, test_errors
    with Parallel(2, backend="qjam") if managed else warnings.catch_warnings() as given:
        parallel = given if managed else Parallel(2, backend="qjam")
        for error in (ZeroDivisionError, KeyboardInterrupt, OSError):
            with pytest.raises(error):
                parallel([delayed(jobcode.square)(1), delayed(jobcode.fail_with)(error)])
            assert parallel(delayed(jobcode.square)(i) for i in range(10)) == EXPECTED


def test_an_exception_tells_where_it_was_raised():  # test_nested_exception_dispatch
    with pytest.raises(ValueError, match="item 3") as raised:
        Parallel(2, backend="qjam")(delayed(jobcode.fail_in_nested)(3) for _ in range(4))
    text = "".join(traceback.format_exception(raised.value))
    assert "in fail_in_nested" in text
    assert "in fail_at" in text


@pytest.mark.parametrize("wrong", [0, 5, 19])
def test_the_tasks_raise(wrong):  # test_error_in_task_iterator, test_exception_dispatch
    with Parallel(2, backend="qjam") as parallel, pytest.raises(ValueError, match=f"item {wrong}"):
        parallel(delayed(jobcode.square)(jobcode.fail_at(i, wrong)) for i in range(20))


def test_what_cannot_be_pickled():  # test_parallel_pickling
    with pytest.raises(Exception, match="cannot be pickled"):
        Parallel(2, backend="qjam")(delayed(id)(jobcode.FailsWhenPickled()) for _ in range(10))
    assert squares() == EXPECTED


def test_a_worker_that_dies():
    with pytest.raises(BrokenProcessPool):
        Parallel(2, backend="qjam")(delayed(jobcode.crash)() for _ in range(1))
    assert squares() == EXPECTED


@pytest.mark.parametrize("return_as", ["list", *GENERATORS])
def test_a_timeout(gates, return_as):  # test_parallel_timeout_fail, ..._with_generator
    told, gate = gates
    with pytest.raises(JoblibTimeout):
        list(
            Parallel(2, backend="qjam", timeout=0.05, return_as=return_as)(
                delayed(jobcode.tell_and_wait)(told.path, gate.path) for _ in range(10)
            )
        )
    assert sorted(squares(timeout=30, return_as=return_as)) == EXPECTED  # test_parallel_timeout_success


def test_an_exception_stops_the_others(gates):  # test_abort_backend
    told, gate = gates
    tasks = [delayed(jobcode.tell_and_wait)(told.path, gate.path) for _ in range(20)]
    with pytest.raises(TypeError):
        Parallel(2, backend="qjam", batch_size=1)([tasks[0], delayed(jobcode.square)("a"), *tasks])
    assert squares() == EXPECTED


# Numbers of jobs, contexts


@pytest.mark.parametrize(("n_jobs", "expected"), [(3, 3), (-1, joblib.cpu_count()), (None, joblib.cpu_count())])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_number_of_jobs(context, n_jobs, expected):  # test_effective_n_jobs_None
    with context("qjam", n_jobs=n_jobs):
        assert joblib.effective_n_jobs(None if n_jobs else -1) == expected


@pytest.mark.parametrize("n_jobs", ["2", 2.3, 2])
def test_n_jobs_becomes_an_int(n_jobs):  # test_njobs_converted_to_int
    assert Parallel(n_jobs, backend="qjam")._effective_n_jobs() == 2


@pytest.mark.parametrize("n_jobs", [0, 0.5])
def test_no_jobs(n_jobs):  # test_invalid_njobs
    with pytest.raises(ValueError, match="n_jobs == 0 in Parallel has no meaning"):
        squares(n_jobs)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context(context):  # test_backend_context_manager, test_parameterized_backend_context_manager
    with context("qjam", n_jobs=2, echo=False):
        backend, n_jobs = joblib.parallel.get_active_backend()
        assert (type(backend), n_jobs) == (QjamBackend, 2)
        assert Parallel()._backend is backend
    with context(QjamBackend(), n_jobs=2):  # test_directly_parameterized_backend_context_manager
        assert Parallel()(delayed(jobcode.square)(i) for i in range(10)) == EXPECTED
    assert type(joblib.parallel.get_active_backend()[0]) is not QjamBackend


def test_wrong_arguments():  # test_dask_backend_keywords
    with pytest.raises(TypeError, match="hosts"), parallel_config("qjam", hosts=5.5):
        pass
    with pytest.raises(ValueError, match="hosts"), parallel_config("qjam", hosts=[]):
        pass
    with pytest.raises(ValueError, match="leave out hosts"), parallel_config("qjam", hosts=2, master=5):
        pass
    with pytest.raises(TypeError, match="foo"):
        squares(foo=1)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        squares(initializer=5)


def test_the_managed_workers():  # test_parallel_as_context_manager
    with Parallel(2, backend="qjam") as parallel:
        used = parallel._backend._used
        for _ in range(2):
            assert parallel(delayed(jobcode.square)(i) for i in range(10)) == EXPECTED
            assert parallel._backend._used is used
    assert parallel._backend._used is None
    assert parallel(delayed(jobcode.square)(i) for i in range(10)) == EXPECTED


def test_workers_are_used_again():  # test_loky_reuse_workers, test_initializer_reused, test_initializer_not_reused
    def pids(value):
        calls = (delayed(os.getpid)() for _ in range(20))
        return set(Parallel(2, backend="qjam", initializer=jobcode.set_state, initargs=(value,))(calls))

    one = np.zeros(3)
    assert len(pids(one) | pids(one)) <= 2
    assert not pids(one) & pids(np.zeros(3))


def test_an_initializer():  # test_initializer_context, test_initializer_parallel
    with parallel_config("qjam", n_jobs=2, initializer=jobcode.set_state, initargs=("begun",)):
        assert set(Parallel()(delayed(jobcode.get_state)() for _ in range(10))) == {"begun"}
    with pytest.raises(BrokenProcessPool, match="cannot start here"):
        squares(initializer=jobcode.fail_to_start)


def test_idle_workers_end():
    used = qjam.joblib._workers.take({"hosts": 1, "master": None, "idle_worker_timeout": 0.05})
    timer = qjam.joblib._workers
    qjam.joblib._workers.leave(used)
    timer._timer.join()
    with pytest.raises(RuntimeError, match="after shutdown"):
        used.executor.submit(id, 1)


def test_hosts_and_their_number_of_workers():  # test_simple of test_dask.py
    with parallel_config("qjam", hosts=["local*3"]):
        assert joblib.effective_n_jobs(-1) == 3
        assert joblib.effective_n_jobs(-2) == 2
        assert joblib.effective_n_jobs(8) == 3
        assert joblib.effective_n_jobs(1) == 1
    with Master(1) as master, parallel_config("qjam", master=master):
        (pid,) = set(Parallel()(delayed(os.getpid)() for _ in range(4)))
        assert pid == master.workers[0].pid  # the only worker is used, not this process
        assert master.run(lambda params, part: 1) == 1  # and left open


def test_fewer_jobs_than_workers(gates):
    told, gate = gates
    with Master(3) as master, parallel_config("qjam", master=master, n_jobs=2):
        results = Parallel(return_as="generator", batch_size=1, pre_dispatch="all")(
            delayed(jobcode.tell_and_wait)(told.path, gate.path, i) for i in range(6)
        )
        assert sorted([told.heard(), told.heard()]) == ["0", "1"]
        future = master.submit(lambda params, part: 5, None, [0])  # there is a worker that has nothing to do
        assert future.result(30) == 5
        gate.open(6)
        assert list(results) == [0, 1, 2, 3, 4, 5]


def test_threads_of_the_program_have_workers_each():  # test_background_thread_parallelism
    found = {}
    threads = [threading.Thread(target=lambda name=name: found.update({name: squares()})) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": EXPECTED, "b": EXPECTED}


@pytest.mark.parametrize("constraint", [{"require": "sharedmem"}])
def test_shared_memory_is_for_threads(constraint):  # test_backend_hinting_and_constraints
    with parallel_config("qjam", n_jobs=2):
        assert type(Parallel(**constraint)._backend).__name__ == "ThreadingBackend"
        assert type(Parallel(prefer="threads")._backend) is QjamBackend


# Nested


@pytest.mark.parametrize("context", CONTEXTS)
def test_nested_back_ends(context):  # test_nested_parallelism_limit, test_nested_backend_context_manager
    with context("qjam", n_jobs=2):
        results = Parallel()(delayed(jobcode.nested)(3, 2) for _ in range(2))
    for names, places in results:
        assert names[0] == "ThreadingBackend"
        assert set(names[1:]) == {"SequentialBackend"}
        assert len({pid for pid, _ in places}) == 1
        assert len(places) <= 2


def test_nested_jobs_do_not_outnumber_the_cores():  # test_nested_parallelism_limit, test_thread_bomb_mitigation
    with parallel_config("qjam", hosts="local*2"):
        share = max(1, joblib.cpu_count() // 2)
        assert Parallel()(delayed(jobcode.add_in_threads)(-1) for _ in range(4)) == [share] * 4
        assert Parallel()(delayed(jobcode.add_in_threads)(None) for _ in range(4)) == [1] * 4


def test_this_back_end_within_itself_and_within_threads():  # test_nested_loop, test_nested_parallel_warnings
    for outer in ("qjam", "threading"):
        results = Parallel(2, backend=outer)(delayed(jobcode.with_qjam)() for _ in range(2))
        assert results == [EXPECTED] * 2


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_of_libraries(threads):  # test_threadpool_limitation_in_child_context
    with parallel_config("qjam", n_jobs=2, inner_max_num_threads=threads):
        results = Parallel()(delayed(jobcode.thread_limits)() for _ in range(4))
    expected = threads or max(1, joblib.cpu_count() // 2)
    for pools, variables in results:
        assert set(pools) <= {expected}
        assert set(variables) == {str(expected)}


def test_the_variables_of_the_user_count(monkeypatch):  # test_threadpool_limitation_in_child_override
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with parallel_config("qjam", n_jobs=3):
        results = Parallel()(delayed(jobcode.thread_limits)() for _ in range(2))
        assert {variables[0] for _, variables in results} == {"3"}


def test_the_name_of_the_main_thread_does_not_matter(monkeypatch):  # test_main_thread_renamed_no_warning
    monkeypatch.setattr(threading.current_thread(), "name", "another")
    assert squares() == EXPECTED


# scikit-learn

SKLEARN = """
import warnings
warnings.simplefilter("error")
import joblib
import numpy as np
import qjam.joblib
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score

def results():
    X, y = make_classification(80, 5, random_state=0)
    search = GridSearchCV(LogisticRegression(), {"C": [0.1, 1, 10]}, cv=3).fit(X, y)
    forest = RandomForestClassifier(4, random_state=0).fit(X, y)
    return [
        search.cv_results_["mean_test_score"],
        forest.predict_proba(X),
        cross_val_score(forest, X, y, cv=3),
        permutation_importance(forest, X, y, n_repeats=2, random_state=0).importances,
    ]

if __name__ == "__main__":
    qjam.joblib.register()
    here = results()
    for options in {"n_jobs": 2}, {"hosts": ["a*2", "b"], "n_jobs": -1}:
        with joblib.parallel_config("qjam", **options):
            print([np.array_equal(a, b) for a, b in zip(here, results())])
"""


@pytest.mark.timeout(120)
def test_scikit_learn_on_this_machine_and_on_ssh_hosts(tmp_path, ssh_host):
    config = write_config(tmp_path / "config", [ssh_host(name) for name in "ab"])
    (tmp_path / "program.py").write_text(textwrap.dedent(SKLEARN))
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"QJAM_SSH_CONFIG": str(config), "QJAM_REMOTE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[True, True, True, True]"] * 2
