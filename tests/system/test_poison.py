"""User code at its worst: each of these ends in an answer, and an ordinary run on the same master is right afterwards.

Elsewhere: sys.exit, os._exit, SIGSEGV, SIGKILL, abort, deaf ears, exceptions that cannot be pickled (test_failures);
forks that import, cycles of params, 40 MB of text (test_hard_cases); closed and altered streams, 100 MB of prints
(test_output_of_workers); results larger than /dev/shm (test_memory); too much memory (test_memory_limit).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

import gather
import poison
import pyzmq_garbage  # noqa: F401
import usercode
from processes import all_end
from qjam import DataSet, Master, QjamError, RoundTimeout, TaskError, WorkerLost
from qjam_worker.worker import fork_server


def is_right(master):
    """Ordinary runs: on every worker, over many slices, and with params and results that lie in files of their own."""
    workers = len(master.workers)
    assert master.run(usercode.add_up, 2, DataSet(list(range(10)), slice_size=1), timeout=20) == 90
    assert master.run(usercode.forty_two, timeout=20) == 42 * workers
    total = master.run(usercode.give_params, np.ones(100_000), timeout=20)
    assert total.tolist() == [workers] * 100_000
    return True


def pids(master):
    return {worker.pid for worker in master.workers}


def with_reduce(mapfunc, reduce):
    module = types.ModuleType("made_here")
    module.mapfunc, module.reduce = mapfunc, reduce
    return module


@pytest.fixture(scope="module")
def master():
    """For what costs no process."""
    with Master(2) as master:
        before = pids(master)
        yield master
        assert is_right(master)
        assert pids(master) == before


@pytest.fixture
def pool():
    """Two workers of the test's own."""
    with Master(2) as pool:
        yield pool
        assert is_right(pool)


# Ends of a worker


ENDS = {
    poison.end_by_faulthandler: "exited with status 1",
    poison.become_another_program: "exited with status 7",
    poison.kill_its_parent: "signal 9 (SIGKILL)",
    poison.close_all_files: "exited with status 1",
    poison.close_all_files_but_its_streams: "exited with status 1",
    poison.limit_its_files_to_nothing: "exited with status 1",
    poison.give_what_exits_while_it_is_pickled: "exited with status 4",
    poison.stop_its_parent_and_die: "exited with status 9",
}


@pytest.mark.parametrize("function", ENDS, ids=lambda function: function.__name__)
def test_a_slice_that_ends_its_worker_three_times_is_named_with_how_it_ended(pool, function):
    with pytest.raises(WorkerLost) as caught:
        pool.run(function, None, DataSet([5, 6], slice_size=1), timeout=20)
    assert ENDS[function] in caught.value.how
    assert caught.value.slice in (0, 1)


def test_a_worker_whose_files_are_closed_says_why_it_ends(pool, capsys):
    with pytest.raises(WorkerLost):
        pool.run(poison.close_all_files_but_its_streams, None, [1])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("this worker process cannot go on" in line and "Bad file descriptor" in line for line in lines)


def test_nothing_of_ours_is_written_to_what_user_code_opens_after_it_has_closed_all_files(pool, tmp_path):
    def work(folder, part):
        os.closerange(3, 65_536)
        vars(sys)["opened"] = [open(f"{folder}/{os.getpid()}-{number}", "w") for number in range(30)]

    with pytest.raises(WorkerLost):
        pool.run(work, str(tmp_path), [1])
    written = list(tmp_path.iterdir())
    assert len(written) == 90
    assert [file.name for file in written if file.stat().st_size] == []


def test_user_code_that_removes_the_folders_of_its_node_is_told_of_them_and_holds_nothing_up():
    with Master(2) as master:
        folders = master.run(lambda params, part: poison.own_folders(), None, [1])
        assert folders
        for folder in folders:
            shutil.rmtree(folder)
        for _ in range(3):
            try:
                assert is_right(master)
            except QjamError as error:
                assert folders[0] in str(error)  # noqa: PT017  both are fine: to go on, and to say why not


def test_a_node_whose_files_user_code_has_removed_starts_again_when_a_worker_ends(caplog):
    with Master(2) as master:
        before = pids(master)
        assert master.run(poison.leave, poison.remove_its_files) == 2
        assert is_right(master)
        assert pids(master) == before
        os.kill(min(before), signal.SIGKILL)
        assert all_end(before)
        assert is_right(master)
        assert not pids(master) & before
    assert "was removed, which new worker processes need" in caplog.text


# No end


def test_user_code_that_no_interrupt_reaches_is_killed_after_two_seconds_and_its_workers_replaced():
    with Master(4) as master:
        before = pids(master)
        with pytest.raises(RoundTimeout):
            master.run(poison.be_stubborn, None, DataSet([0, 1, 2, 3], slice_size=1), timeout=0.5)
        assert is_right(master)
        assert not pids(master) & before
        assert all_end(before)


def test_a_worker_that_has_refused_interrupts_is_interrupted_in_a_later_round(pool):
    before = pids(pool)
    pool.run(lambda params, part: poison.leave_interrupts_blocked() or 1)
    with pytest.raises(RoundTimeout):
        pool.run(usercode.linger_forever, timeout=0.2)
    assert is_right(pool)
    assert pids(pool) == before


def test_a_long_power_is_interrupted(master):
    with pytest.raises(RoundTimeout):
        master.run(lambda params, part: 7 ** (10**9), None, [1], timeout=0.2)


# Results


RESULTS = {
    "generator": lambda params, part: (item for item in "abc"),
    "socket": lambda params, part: socket.socket(),
    "lock in an array": lambda params, part: np.array([threading.Lock()], dtype=object),
    "pointer": lambda params, part: ctypes.pointer(ctypes.c_int(3)),
    "frame": lambda params, part: sys._getframe(),
    "thread": lambda params, part: {"deep": [threading.current_thread()]},
    "pickling raises": lambda params, part: poison.Unpicklable(),
    "pickling has no end": lambda params, part: poison.Endless(),
    "nested too deeply": lambda params, part: poison.nested(100_000),
}


@pytest.mark.parametrize("function", RESULTS.values(), ids=RESULTS)
def test_a_result_that_cannot_be_encoded_is_a_task_error_that_says_so(master, function):
    module = with_reduce(function, lambda a, b: a)
    for data in ([1], DataSet(list(range(8)), slice_size=1), None):
        with pytest.raises(TaskError, match="mapfunc or reduce gave a result that cannot be sent back") as caught:
            master.run(module, None, data, timeout=20)
        assert isinstance(caught.value.__cause__, TypeError)


def test_a_result_that_interrupts_while_it_is_pickled_is_a_task_error(master):
    with pytest.raises(TaskError, match="while pickled") as caught:
        master.run(lambda params, part: poison.InterruptsWhilePickled(), None, [1])
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)


def test_a_result_that_cannot_be_loaded_again_is_an_error_that_tells_why(master):
    module = with_reduce(lambda params, part: poison.Unbuildable(), lambda a, b: a)
    for data in ([1], DataSet(list(range(8)), slice_size=1), None):
        with pytest.raises((QjamError, ValueError), match="cannot be built"):
            master.run(module, None, data)


def test_a_list_that_holds_itself_and_one_of_a_class_of_its_own_are_results(master):
    def ring(params, part):
        made = [part[0]]
        made.append(made)
        return made

    data = DataSet([1, 2, 3, 4], slice_size=1)
    one = master.run(ring, None, [7])
    assert one[0] == 7
    assert one[1] is one
    assert master.run(with_reduce(ring, lambda a, b: [a[0] + b[0]]), None, data) == [10]
    pair = master.run(
        with_reduce(lambda params, part: poison.TwoItems(part[0], 1), lambda a, b: poison.TwoItems(a[0] + b[0], 2)),
        None,
        data,
    )
    assert type(pair).__name__ == "TwoItems"
    assert pair == [10, 2]


def results_are_removed(master):
    """Whether no file with a result is left of what has been run; ordinary runs go on while they go away."""
    folders = master.run(lambda params, part: poison.own_folders(), None, [1])
    deadline = time.monotonic() + 5
    while left := [name for folder in folders for name in os.listdir(folder) if name.startswith("result")]:
        if time.monotonic() > deadline:
            return left == []
        assert is_right(master)
        master.run(usercode.forty_two)  # then nothing is kept to be written again
    return True


def test_results_of_200_mb_arrive_whole_and_leave_no_file(master):
    large = master.run(poison.make_large, 25_000_000, DataSet([1, 2], slice_size=1), timeout=30)
    assert large.nbytes == 200_000_000
    assert large.min() == large.max() == 3
    many = master.run(poison.make_large, 1_000_000, DataSet(list(range(16)), slice_size=1), timeout=30)
    assert many.min() == many.max() == 120
    assert results_are_removed(master)


def test_large_results_that_are_interrupted_or_have_a_bad_one_among_them_leave_no_file(master):
    sizes = DataSet([10_000_000, 10_000_001], slice_size=1)
    for timeout in (0.03, 0.04, 0.05, 0.06, 0.07, 0.08):
        with contextlib.suppress(RoundTimeout):
            master.run(
                with_reduce(lambda params, part: np.zeros(part[0]), lambda a, b: a), None, sizes, timeout=timeout
            )

    def work(params, part):
        return np.ones(100_000) if part[0] < 7 else threading.Lock()

    bad = with_reduce(work, lambda a, b: b)
    with pytest.raises(TaskError, match="cannot be sent back"):
        master.run(bad, None, DataSet(list(range(8)), slice_size=1), timeout=20)
    assert results_are_removed(master)


# Exceptions


def raising(make):
    """A mapfunc that raises what is made in the worker."""

    def work(params, part):
        raise make()

    return work


EXCEPTIONS = {
    "exits when pickled": (raising(lambda: poison.ExitsWhenPickled("why")), "ExitsWhenPickled: why", None),
    "exits when built": (raising(lambda: poison.ExitsWhenBuilt("why")), "ExitsWhenBuilt: why", None),
    "exits when shown": (raising(lambda: poison.ExitsWhenShown()), "ExitsWhenShown", poison.ExitsWhenShown),
    "text is None": (raising(lambda: poison.TextThatIsNone()), "TextThatIsNone", poison.TextThatIsNone),
    "has nothing": (raising(lambda: poison.HasNothing()), "HasNothing", None),
    "cause raises": (raising(lambda: poison.CauseThatRaises("why")), "CauseThatRaises: why", None),
    "base": (raising(lambda: poison.OfNoKind("why")), "OfNoKind: why", poison.OfNoKind),
    "circular": (poison.raise_two_that_cause_each_other, "ValueError: first", ValueError),
    "chain": (poison.raise_the_last_of_many, "ValueError: 4999", ValueError),
    "holds itself": (poison.raise_one_that_holds_itself, "ValueError", None),
    "syntax": (poison.raise_a_syntax_error_of_no_line, "SyntaxError: odd", None),
}
if sys.version_info >= (3, 11):
    EXCEPTIONS["group"] = (poison.raise_a_group, "ExceptionGroup: outer (2 sub-exceptions)", ExceptionGroup)  # noqa: F821
    EXCEPTIONS["ends"] = (poison.raise_a_group_of_ends, "BaseExceptionGroup: ends (2 sub", BaseExceptionGroup)  # noqa: F821


@pytest.mark.parametrize(("function", "what", "kind"), EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_an_exception_that_is_a_trap_is_a_task_error_with_its_name(master, function, what, kind):
    with pytest.raises(TaskError) as caught:
        master.run(function, None, [1], timeout=20)
    assert what in caught.value.what
    assert caught.value.slice == 0
    if kind is not None:
        assert isinstance(caught.value.__cause__, kind)


# Output


class Silent:
    """A stdout that shows nothing."""

    def write(self, text):
        pass

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("function", "echo"),
    [(poison.print_in_a_child, True), (poison.print_in_a_thread, True), (poison.print_in_mapfunc, False)],
)
def test_50_mb_of_output_hold_nothing_up_whoever_prints_them(monkeypatch, capfd, function, echo):
    monkeypatch.setattr(sys, "stdout", Silent())
    with Master(2, echo=echo) as master:
        before = pids(master)
        assert master.run(function, 25_000_000, timeout=20) == 2
        assert is_right(master)
        deadline = time.monotonic() + 20
        while master.stats().output_received < 50_000_000 and time.monotonic() < deadline:
            assert is_right(master)
        assert master.stats().output_received == 50_000_000
        assert pids(master) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("lines", [10_700, 10_900, 11_100, 11_300])
def test_all_of_it_is_shown_before_run_returns_also_where_the_terminal_stands_still(monkeypatch, lines):
    class Slow(Silent):
        shown = ""

        def write(self, text):
            while master.stats().output_received < 1 << 20 and not self.shown:
                time.sleep(0.01)
            if not self.shown:
                time.sleep(0.1)  # the worker has printed all that may be on its way, and a little more, and answers
            self.shown += text

    def work(lines, part):
        for _ in range(lines):
            print("x" * 99)
        return 1

    monkeypatch.setattr(sys, "stdout", slow := Slow())
    with Master(1) as master:
        assert master.run(work, lines, timeout=20) == 1
        shown = slow.shown.splitlines()
    assert len(shown) == lines
    assert set(shown) == {"[local 0] " + "x" * 99}


def print_without_end(params, part):
    os.posix_spawnp("yes", ["yes"], os.environ)
    return 1


@pytest.mark.parametrize("echo", [True, False])
def test_a_child_that_prints_without_end_holds_up_neither_rounds_nor_the_end(monkeypatch, echo):
    monkeypatch.setattr(sys, "stdout", Silent())
    before = set(threading.enumerate())
    with Master(2, echo=echo) as master:
        assert master.run(print_without_end, timeout=20) == 2
        for _ in range(3):
            assert is_right(master)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "qjam-print"]


# Children


@pytest.mark.parametrize("data", [None, DataSet(list(range(12)), slice_size=1)], ids=["no data", "12 slices"])
def test_a_forked_child_that_returns_from_mapfunc_answers_and_maps_nothing(pool, tmp_path, data):
    before = pids(pool)
    tally = tmp_path / "tally"
    for turn in range(1, 4):
        if data is None:
            assert pool.run(lambda tally, part: poison.fork_and_return_twice(tally, [21]), str(tally)) == 42
            assert len(tally.read_text()) == 2 * turn
        else:
            assert pool.run(poison.fork_and_return_twice, str(tally), data) == 66
            assert len(tally.read_text()) == 12 * turn
        assert is_right(pool)
    assert pids(pool) == before


def test_a_forked_child_that_returns_from_reduce_answers_and_folds_nothing(pool, tmp_path):
    tally = str(tmp_path / "tally")

    def reduce(a, b):
        return poison.fork_and_return_twice(tally, [a, b])

    module = with_reduce(lambda params, part: sum(part), reduce)
    assert pool.run(module, None, DataSet(list(range(12)), slice_size=1), timeout=20) == 66
    assert len((tmp_path / "tally").read_text()) == 11


def test_a_module_that_forks_when_it_is_imported_gives_one_answer(pool, tmp_path, monkeypatch):
    source = """
import os, sys
if "qjam" not in sys.modules:
    os.fork()

def mapfunc(params, part):
    with open(params, "a") as file:
        file.write("x")
    return 21
"""
    (tmp_path / "forks_when_imported.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import forks_when_imported

    for turn in range(1, 3):
        assert pool.run(forks_when_imported, str(tmp_path / "tally"), timeout=20) == 42
        assert len((tmp_path / "tally").read_text()) == 2 * turn


def test_an_exception_in_a_forked_child_is_shown_and_ends_the_child_alone(pool, capsys):
    before = pids(pool)
    assert pool.run(poison.fork_and_raise_in_the_child) == 2
    shown = capsys.readouterr().err
    assert shown.count("ValueError: in the child") == 2
    assert "qjam_worker" not in shown
    assert pids(pool) == before


def test_sys_exit_in_a_forked_child_ends_the_child_with_that_status(pool, capsys):
    before = pids(pool)
    assert pool.run(poison.fork_and_exit_in_the_child, 3) == 6
    assert pool.run(poison.fork_and_exit_in_the_child) == 2
    assert capsys.readouterr().err.count("enough") == 2
    assert pids(pool) == before


def test_children_that_outlive_mapfunc_live_until_their_worker_ends_and_no_longer():
    with Master(2) as master:
        left = [pid for three in master.run(gather, poison.leave_children) for pid in three]
        assert len(left) == 6
        for _ in range(3):
            assert is_right(master)
        for pid in left:
            os.kill(pid, 0)
    assert all_end(left)


def test_children_that_may_not_be_killed_are_not_waited_for(monkeypatch):
    def refuse(pid, number):
        raise PermissionError  # as for what sudo has started

    with subprocess.Popen(["sleep", "1000"]) as child:
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", refuse)
            assert not fork_server._kill_children()
        assert child.poll() is None
        child.kill()


def test_a_pool_of_multiprocessing_works_in_user_code(pool):
    def work(params, part):
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as processes:
            return sum(processes.map(abs, part))

    assert pool.run(work, None, DataSet([-1, -2, -3, -4], slice_size=2), timeout=20) == 10


# What stays behind


@pytest.mark.parametrize("function", poison.LEFT_BEHIND, ids=lambda function: function.__name__)
def test_what_user_code_leaves_behind_spoils_no_later_round(pool, capfd, function):
    assert pool.run(poison.leave, function, timeout=20) == 2
    assert is_right(pool)
    time.sleep(0.03)  # for what comes later


def test_workers_that_leave_after_their_answer_lose_nothing_and_no_slice_is_blamed(pool):
    before = pids(pool)
    data = DataSet(list(range(12)), slice_size=1)
    assert pool.run(lambda params, part: poison.have_no_modules() or part[0], None, data, timeout=20) == 66
    with pytest.raises(TaskError, match="division by zero"):
        pool.run(lambda params, part: poison.have_no_modules() or 1 / 0, None, data, timeout=20)
    assert is_right(pool)
    assert not pids(pool) & before
    assert pool.stats().resent_slices == 0


def test_a_thread_that_raises_is_shown(pool, capsys):
    assert pool.run(poison.leave, poison.raise_in_a_thread) == 2
    deadline = time.monotonic() + 5
    shown = ""
    while shown.count("ZeroDivisionError") < 2 and time.monotonic() < deadline:
        assert is_right(pool)
        shown += capsys.readouterr().err
    assert shown.count("ZeroDivisionError") == 2


def test_a_stopped_parent_of_the_workers_does_not_hold_up_close():
    with Master(2) as master:
        assert master.run(poison.leave, poison.stop_its_parent) == 2
        began = time.monotonic()
    assert time.monotonic() - began < 3


def test_a_worker_that_nobody_gave_a_reason_to_leave_stays(master):
    before = pids(master)
    for _ in range(50):
        assert master.run(usercode.add_up, 1, [1, 2, 3]) == 6
        with pytest.raises(TaskError):
            master.run(usercode.divide, 0)
    assert pids(master) == before
