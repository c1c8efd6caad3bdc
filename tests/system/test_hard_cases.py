"""What seldom happens to a pool: odd numbers, sizes and texts, forks, stray threads, and programs that let it go."""

from __future__ import annotations

import collections
import gc
import importlib
import io
import math
import os
import signal
import sys
import textwrap
import threading
import time
import types
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from gates import Gate, announce, wait_at
from processes import Traces, all_end, descendants, output, start, traces
from qjam import BaseDataSet, DataSet, Master, RoundTimeout, TaskError

QUICK_S = 3.0  # less than what close() gives its threads and workers to end


@pytest.fixture(scope="module")
def master():
    """For what costs no process."""
    with Master(2) as master:
        before = {worker.pid for worker in master.workers}
        assert master.run(lambda params, part: print("which starts the thread that shows it") or 1) == 2
        yield master
        assert master.run(usercode.forty_two) == 84
        assert {worker.pid for worker in master.workers} == before


@pytest.fixture
def make_gate(tmp_path):
    gates = []

    def make(name):
        gates.append(Gate(tmp_path / name))
        return gates[-1]

    yield make
    for gate in gates:
        gate.close()


def with_reduce(mapfunc, reduce):
    """A module that was made on the fly."""
    module = types.ModuleType("made_here")
    module.mapfunc, module.reduce = mapfunc, reduce
    return module


def slices(*values):
    """A data set with one value a slice."""
    return DataSet(list(values), slice_size=1)


def usable(master):
    return master.run(usercode.forty_two) == 42 * len(master.workers)


# Timeouts


@pytest.mark.parametrize(
    "timeout",
    [float("inf"), np.float64("inf"), 3e6, 30 * 86400, 1e300, 10**400],
    ids=["inf", "numpy's inf", "3e6", "30 days", "1e300", "10**400"],
)
def test_a_timeout_may_be_as_long_as_one_likes(master, timeout):
    assert master.run(usercode.forty_two, timeout=timeout) == 84
    assert master.submit(usercode.forty_two, timeout=timeout).result() == 84
    assert usable(master)


@pytest.mark.parametrize(
    "timeout", [math.nan, np.float64("nan"), -math.inf, -(10**400)], ids=["nan", "numpy's nan", "-inf", "-10**400"]
)
def test_a_timeout_that_is_no_length_of_time_is_a_value_error(master, timeout):
    with pytest.raises(ValueError, match="timeout must be a positive number"):
        master.run(usercode.forty_two, timeout=timeout)
    assert usable(master)


def test_a_timeout_too_short_for_anything_is_a_round_timeout(master):
    with pytest.raises(RoundTimeout):
        master.run(usercode.linger, os.devnull, timeout=1e-300)
    assert usable(master)


# Numbers that do not add up


def outcome(master, function):
    """The result over two slices and no text, or none and the text of its TaskError."""
    try:
        return master.run(function, None, slices(0, 1)), ""
    except TaskError as error:
        return None, error.what


def test_results_whose_sum_overflows_python_are_a_task_error(master):
    with pytest.raises(TaskError, match="OverflowError"):
        master.run(lambda params, part: 10**400 if part == [0] else 1.5, None, slices(0, 1))
    assert usable(master)


def test_a_numpy_number_and_an_int_that_it_cannot_take_are_their_sum_or_a_task_error(master):
    total, error = outcome(master, lambda params, part: np.int64(1) if part == [0] else 10**30)
    assert error.startswith("OverflowError") if error else total == 10**30 + 1
    assert usable(master)


def test_numpy_numbers_and_huge_ints_in_a_tuple_add_up(master):
    total = master.run(lambda params, part: (np.int64(1), 10**30), None, slices(0, 1, 2))
    assert total == (3, 3 * 10**30)


@pytest.mark.parametrize("number", [np.int8(127), np.int64(2**63 - 1), np.float64(1.7e308)], ids=lambda n: n.dtype.name)
def test_an_overflow_is_numpys_sum_or_a_task_error_also_where_warnings_are_errors(master, number):
    total, error = outcome(master, lambda params, part: number)
    with np.errstate(over="ignore"):
        assert "RuntimeWarning" in error if error else total == number + number
    assert usable(master)


# Much of everything


def test_2000_slices_need_no_more_than_256_descriptors(tmp_path):
    source = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        from qjam import DataSet, Master
        with Master(2) as master:
            data = DataSet(range(2000), slice_size=1)
            for _ in range(2):
                print(master.run(lambda params, part: sum(part), None, data))
            print(master.run(lambda params, part: 1))
        """
    assert output(tmp_path, source).split() == ["1999000", "1999000", "2"]


@pytest.mark.parametrize("size", [2, 200])
def test_a_result_may_hold_66000_arrays(master, size):
    result = master.run(lambda params, part: [np.full(size, i) for i in range(66_000)], None, [1])
    assert len(result) == 66_000
    assert result[-1].tolist() == [65_999] * size


@pytest.mark.parametrize("size", [2, 200])
def test_params_may_hold_66000_arrays(master, size):
    params = [np.full(size, i) for i in range(66_000)]
    last = master.run(lambda params, part: (len(params), params[-1]), params, [1])
    assert last[0] == 66_000
    assert last[1].tolist() == [65_999] * size


def test_more_slices_than_a_worker_keeps_mapped_are_used_again_and_again(master):
    lists = DataSet([[i, i] for i in range(500)], slice_size=1)
    arrays = DataSet(np.arange(1000.0).reshape(500, 2), slice_size=1)
    sent = None
    for turn in range(4):
        assert master.run(lambda turn, part: turn + part[0][1], turn, lists) == 500 * turn + 124_750
        assert master.run(lambda turn, part: turn + float(part.sum()), turn, arrays) == 500 * turn + 499_500
        sent = sent or master.stats().dataset_sent
    assert master.stats().dataset_sent == sent


@pytest.mark.parametrize(("workers", "size"), [(1, 25_000), (2, 25_000), (2, 60_000)])
def test_large_results_of_many_rounds_leave_no_file(workers, size):
    data = slices(*range(10))
    with Master(workers) as master:
        folders = traces(os.getpid()).folders

        def files():
            return [file for folder in folders for file in folder.iterdir() if file.name.startswith("result")]

        for turn in range(30):
            total = master.run(lambda params, part: np.full(size, params), turn, data)
            assert total[0] == total[-1] == 10 * turn
        deadline = time.monotonic() + QUICK_S
        while files() and time.monotonic() < deadline:
            assert usable(master)
        assert not files()


# Texts


def test_an_exception_with_40_mb_of_text_arrives_cut(master):
    def work(size, part):
        raise ValueError("x" * size)

    with pytest.raises(TaskError) as caught:
        master.run(work, 40_000_000, [1])
    assert caught.value.what.startswith("ValueError: xxx")
    assert len(str(caught.value)) < 1_000_000
    assert usable(master)


def test_lone_surrogates_in_the_text_of_an_exception_do_no_harm(master):
    def work(params, part):
        raise FileNotFoundError("no file bad\udcff.txt")

    with pytest.raises(TaskError) as caught:
        master.run(work, None, [1])
    assert "no file bad" in caught.value.what
    assert "no file bad" in caught.value.remote_traceback
    assert usable(master)


def test_a_stdout_that_takes_no_text_holds_nothing_up(master, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.BytesIO())
    for _ in range(2):
        assert master.run(lambda params, part: print("hello") or 1) == 2


def test_a_stdout_that_cannot_encode_a_character_shows_it_with_backslashes(master, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert master.run(lambda params, part: print("caf\xe9 \u2713") or 1, None, [1]) == 1
    sys.stdout.flush()
    assert raw.getvalue().rstrip().endswith(rb"] caf\xe9 \u2713")


# What the caller is told


def test_a_master_in_a_closure_is_a_type_error_that_says_so(master):
    with pytest.raises(
        TypeError, match=r"a Master cannot be pickled or sent to workers.*perhaps a function or params refer to it"
    ):
        master.run(lambda params, part: master)
    assert usable(master)


def test_a_master_in_params_is_a_type_error_that_says_so(master):
    with pytest.raises(TypeError, match="a Master cannot be pickled or sent to workers"):
        master.run(usercode.give_params, [master])
    assert usable(master)


def test_a_number_of_workers_as_a_text_is_told_how_to_write_it():
    with pytest.raises(ValueError, match=r"local\*4"):
        Master("4")


def test_a_slice_that_cannot_be_pickled_is_a_type_error_that_says_dataset(master):
    with pytest.raises(TypeError, match="dataset"):
        master.run(usercode.forty_two, None, slices(1, threading.Lock()))
    assert usable(master)


def test_a_result_that_cannot_be_pickled_is_a_task_error_that_says_mapfunc(master):
    with pytest.raises(TaskError, match="mapfunc"):
        master.run(lambda params, part: threading.Lock(), None, [1])
    assert usable(master)


def test_the_syntax_error_of_an_edited_module_is_told_in_one_line(master, monkeypatch, tmp_path):
    (tmp_path / "imports_late.py").write_text(
        "def mapfunc(p, s):\n    import edited_badly\n    return edited_badly.value"
    )
    file = tmp_path / "edited_badly.py"  # only workers load it, and so take it as it is
    file.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("imports_late")
    assert master.run(module) == 2
    file.write_text("value = 1 +\n")
    with pytest.raises(TaskError) as caught:
        master.run(module, None, [1])
    assert caught.value.what.startswith("SyntaxError: ")
    assert "\n" not in caught.value.what
    file.write_text("value = 100\n")
    assert master.run(module) == 200


def test_a_data_set_that_ends_the_program_does_so_and_the_pool_is_usable(master):
    class Ends(BaseDataSet):
        calls = 0

        def chunks(self):
            return 1

        def slice(self, index):
            self.calls += 1
            if self.calls == self.last:
                sys.exit(3)
            return [f"a slice that nobody has seen {self.last}"]

    for last in (1, 2):
        data = Ends()
        data.last = last
        with pytest.raises(SystemExit) as caught:
            master.run(usercode.forty_two, None, data)
        assert caught.value.code == 3
        assert usable(master)
        assert master.run(usercode.add_up, 1, [last, 2, 3]) == last + 5


# Memory that is used again

Pair = collections.namedtuple("Pair", "number array")
SHAPES = {
    "array": lambda buffer: buffer,
    "tuple": lambda buffer: (1, buffer),
    "namedtuple": lambda buffer: Pair(1, buffer),
    "list": lambda buffer: [1, buffer],
    "nested": lambda buffer: (1, [Pair(1, buffer)]),
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_a_result_with_the_one_buffer_that_mapfunc_uses_again_adds_up(make):
    buffer = np.zeros(2)

    def work(params, part):
        buffer[:] = part[0]
        return make(buffer)

    with Master(1) as master:
        total = master.run(work, None, slices(*range(8)))
    assert type(total) is type(make(buffer))
    while not isinstance(total, np.ndarray):
        assert len(total) == 1 or total[0] == 8
        total = total[-1]
    assert total.tolist() == [28.0, 28.0]


def test_a_dict_with_the_one_buffer_that_mapfunc_uses_again_adds_up():
    buffer = np.zeros(2)

    def mapfunc(params, part):
        buffer[:] = part[0]
        return {"deep": {"array": buffer}}

    def reduce(a, b):
        return {"deep": {"array": a["deep"]["array"] + b["deep"]["array"]}}

    with Master(1) as master:
        total = master.run(with_reduce(mapfunc, reduce), None, slices(*range(8)))
    assert total["deep"]["array"].tolist() == [28.0, 28.0]


def alter_shape(params, part):
    seen = part.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part.shape = (part.size,)  # numpy warns of it from 2.5 on
    return seen


def test_a_slice_whose_shape_user_code_has_changed_is_whole_again():
    data = DataSet(np.ones((4, 3)), slice_size=4)
    with Master(1) as master:
        for _ in range(3):
            assert master.run(alter_shape, None, data) == (4, 3)


def test_a_slice_whose_fields_user_code_has_renamed_is_whole_again():
    def rename(params, part):
        seen = part.dtype.names
        part.dtype.names = ("x", "y")
        return seen

    data = DataSet(np.zeros(4, dtype=[("a", "i4"), ("b", "f8")]), slice_size=4)
    with Master(1) as master:
        for _ in range(3):
            assert master.run(rename, None, data) == ("a", "b")


# Forks

FORK = """
    import os, sys, time
    sys.path.insert(0, sys.argv[1])
    import usercode
    from qjam import Master, MasterClosed

    def fork():
        "A child of this program that lives until its stdin ends."
        pid = os.fork()
        if pid == 0:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            os.read(0, 1)
            os._exit(0)
        return pid

    """
TESTS = str(Path(__file__).parents[1] / "support")


def forking(folder, source):
    return start(folder, textwrap.dedent(FORK) + textwrap.dedent(source), TESTS)


def test_close_is_quick_while_a_forked_child_of_the_program_lives(tmp_path):
    source = """
        master = Master(2)
        master.run(usercode.forty_two)
        fork()
        before = time.monotonic()
        master.close()
        print(time.monotonic() - before, flush=True)
        """
    program = forking(tmp_path, source)
    took = float(program.stdout.readline())
    assert not program.wait()
    program.communicate()
    assert took < QUICK_S


def test_kill_9_of_the_master_leaves_nothing_while_a_forked_child_of_it_lives(tmp_path):
    source = """
        master = Master(2)
        master.run(usercode.forty_two)
        print(fork(), flush=True)
        time.sleep(1000)
        """
    program = forking(tmp_path, source)
    child = int(program.stdout.readline())
    found = traces(program.pid)
    left = Traces(found.processes - {child}, found.folders)
    assert len(left.processes) == 3
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert left.are_gone()
    os.kill(child, 0)  # it lives
    program.communicate()
    assert all_end([child])


def test_run_in_a_fork_of_the_program_says_whose_the_master_is(tmp_path):
    source = """
        with Master(1) as master:
            pid = os.fork()
            if pid == 0:
                for call in (master.run, master.submit):
                    try:
                        call(usercode.forty_two)
                    except MasterClosed as error:
                        print(str(os.getppid()) in str(error), "fork" in str(error), flush=True)
                os._exit(0)
            os.waitpid(pid, 0)
            print(master.run(usercode.forty_two))
        """
    program = forking(tmp_path, source)
    printed, errors = program.communicate()
    assert not errors
    assert printed.splitlines() == ["True True", "True True", "42"]


def test_children_that_user_code_has_forked_may_import(master):
    def work(params, part):
        import multiprocessing

        def child(number):
            found = 0
            for name in ("colorsys", f"nosuch_{number}", "nosuch.module"):
                try:
                    importlib.import_module(name)
                except ImportError:
                    found += 1
            queue.put(found)

        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        children = [context.Process(target=child, args=(number,)) for number in range(3)]
        for process in children:
            process.start()
        found = [queue.get() for _ in children]
        for process in children:
            process.join()
        return sum(found)

    assert master.run(work, None, timeout=20) == 2 * 3 * 2
    assert usable(master)


def test_a_scripts_function_may_be_run_from_a_spawned_child_of_multiprocessing(tmp_path):
    source = """
        import multiprocessing
        from qjam import Master

        FACTOR = 7

        def work(params, part):
            return FACTOR * sum(part)

        def child(queue):
            with Master(1) as master:
                queue.put((__name__, master.run(work, None, [1, 2])))

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            print(*queue.get())
            process.join()
        """
    assert output(tmp_path, source) == "__mp_main__ 21\n"


# Threads and futures


def test_a_thread_of_user_code_that_imports_later_disturbs_no_round(master, monkeypatch, tmp_path, make_gate):
    names = [f"imported_late_{number}" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / f"{name}.py").write_text(f"value = {number}")
    monkeypatch.syspath_prepend(tmp_path)
    go_on, here = make_gate("go_on"), make_gate("here")

    def work(params, part):
        def later():
            wait_at(params[0])
            values = [importlib.import_module(name).value for name in names]
            try:
                importlib.import_module("nosuch_module")
            except ImportError:
                announce(params[1], values)

        threading.Thread(target=later, daemon=True).start()
        return 1

    assert master.run(work, (go_on.path, here.path)) == 2
    heard = []
    listener = threading.Thread(target=lambda: heard.extend(here.heard() for _ in range(2)))
    listener.start()
    go_on.open(2)
    while listener.is_alive():
        assert master.run(usercode.add_up, 1, slices(*range(4)), timeout=20) == 6
    assert heard == ["[0, 1, 2]"] * 2
    assert usable(master)


def test_a_done_callback_may_wait_for_another_future(master, make_gate):
    gate = make_gate("gate")
    got, done = [], threading.Event()

    def call_back(future):
        got.append((future.result(), master.submit(usercode.forty_two).result(20)))
        done.set()

    future = master.submit(lambda path, part: wait_at(path) or 1, gate.path)
    future.add_done_callback(call_back)
    gate.open(2)
    assert done.wait(20)
    assert got == [(2, 84)]


def test_an_error_while_reducing_interrupts_the_workers_of_that_round(master, make_gate):
    here, tidy, go_on = make_gate("here"), make_gate("tidy"), make_gate("go_on")
    paths = here.path, tidy.path, go_on.path

    def mapfunc(params, part):
        return np.full(400_000, part[0])  # too large for its worker to fold it with all the others

    def reduce(a, b):
        if a[0] == 0:
            wait_at(paths[2])
            return 1 / 0
        return usercode.linger_and_tidy_up(paths, None)

    before = {worker.pid for worker in master.workers}
    future = master.submit(with_reduce(mapfunc, reduce), None, slices(0, 1, 2, 3))
    assert int(here.heard()) in before
    go_on.open()
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        future.result(20)
    assert tidy.heard() == "tidied up"
    assert usable(master)
    assert {worker.pid for worker in master.workers} == before


# A master that is held no more


@pytest.mark.parametrize("use", ["nothing", "run", "submit", "failure", "printing"])
def test_a_master_that_is_held_no_more_goes_with_all_its_processes_and_threads(use):
    before = set(threading.enumerate())
    processes, folders = descendants(os.getpid()), {*Path("/dev/shm").glob("qjam-*")}
    master = Master(2)
    if use == "run":
        assert master.run(usercode.add_up, 1, [1, 2]) == 3
    elif use == "submit":
        assert master.submit(usercode.add_up, 1, [1, 2]).result() == 3
    elif use == "failure":
        assert isinstance(master.submit(usercode.divide, 0).exception(), TaskError)
    elif use == "printing":
        assert master.run(lambda params, part: print("hello") or 1) == 2
    left = traces(os.getpid())
    left = Traces(left.processes - processes, left.folders - folders)
    assert len(left.processes) == 3
    gone = weakref.ref(master)
    del master
    gc.collect()
    assert gone() is None
    assert left.are_gone()
    for thread in set(threading.enumerate()) - before:
        thread.join(QUICK_S)
        assert not thread.is_alive(), thread
