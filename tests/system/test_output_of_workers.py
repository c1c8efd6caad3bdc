"""What user code prints is shown at the master, and can disturb nothing, whatever it does to its streams."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import gather
import pyzmq_garbage  # noqa: F401
import usercode
from qjam import DataSet, Master, TaskError, WorkerLost


@pytest.fixture(scope="module")
def master():
    with Master(2) as master:
        master.run(lambda params, part: print() or 1)  # the thread that shows it starts here, for all tests
        yield master


@pytest.fixture
def one():
    """A worker of the test's own, which may be spoilt."""
    with Master(1) as master:
        yield master


def test_a_line_is_prefixed_with_host_and_worker(master, capsys):
    master.run(lambda params, part: print(f"I am {os.getpid()}") or 1)
    pids = [worker.pid for worker in master.workers]
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"[local 0] I am {pids[0]}",
        f"[local 1] I am {pids[1]}",
    ]


def test_all_of_it_is_shown_before_run_returns(master, capsys):
    for turn in range(20):
        master.run(lambda params, part: print(f"({params})") or 1, turn)
        assert capsys.readouterr().out.count(f"({turn})") == 2


def test_stderr_is_shown_on_stderr(master, capsys):
    master.collect(lambda params, part: print("oh", file=sys.stderr), None, [1])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err in ("[local 0] oh\n", "[local 1] oh\n")


def test_each_of_several_lines_has_its_prefix(one, capsys):
    one.collect(lambda params, part: print("a\n\nb"))
    assert capsys.readouterr().out == "[local 0] a\n[local 0] \n[local 0] b\n"


def test_lines_of_several_workers_are_not_mixed(master, capsys):
    def work(params, part):
        for _ in range(500):
            sys.stdout.write("abc")
            sys.stdout.flush()
            sys.stdout.write("def\n")
        return 1

    master.run(work)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["[local 0] abcdef"] * 500 + ["[local 1] abcdef"] * 500


def test_a_line_without_an_end_is_shown_at_the_end_of_its_round(one, capsys):
    one.collect(lambda params, part: print("begun", end=""))
    assert capsys.readouterr().out == "[local 0] begun\n"
    one.collect(lambda params, part: print("and ended"))
    assert capsys.readouterr().out == "[local 0] and ended\n"


def test_a_line_that_is_never_ended_is_shown_at_the_end(capsys):
    with Master(1) as master:
        master.collect(lambda params, part: print("begun", end=""))
    assert capsys.readouterr().out == "[local 0] begun\n"


def test_a_line_of_a_megabyte_is_shown_in_pieces(one, capsys):
    one.collect(lambda params, part: print("x" * 1_000_000))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[local 0] ") for line in lines)
    assert sum(len(line) - len("[local 0] ") for line in lines) == 1_000_000


def test_bytes_that_are_no_text_are_shown_as_far_as_they_can(one, capsys):
    one.run(lambda params, part: os.write(1, b"caf\xe9 \xc3\xa9\n"))
    assert capsys.readouterr().out == "[local 0] caf\N{REPLACEMENT CHARACTER} \xe9\n"


def test_text_of_any_alphabet_is_shown(one, capsys):
    one.collect(lambda params, part: print("\u65e5\u672c\u8a9e \U0001f600"))
    assert capsys.readouterr().out == "[local 0] \u65e5\u672c\u8a9e \U0001f600\n"


def test_what_child_processes_of_user_code_print_is_shown(one, capsys):
    def work(params, part):
        subprocess.run(["echo", "from a child"], check=True)
        os.system("echo from a shell >&2")

    one.collect(work)
    shown = capsys.readouterr()
    assert shown.out == "[local 0] from a child\n"
    assert shown.err == "[local 0] from a shell\n"


def test_what_a_module_prints_when_it_is_loaded_is_shown(one, capsys):
    module = type(gather)("chatty")
    exec("def mapfunc(params, part):\n    import this\n    return 1", vars(module))
    one.run(module)
    assert "[local 0] Beautiful is better than ugly." in capsys.readouterr().out


def test_the_last_words_of_a_worker_are_shown(one, capsys):
    def work(params, part):
        print("last words")
        os._exit(1)

    with pytest.raises(WorkerLost):
        one.run(work, None, [1])
    assert capsys.readouterr().out == "[local 0] last words\n" * 3


def test_echo_false_shows_nothing(capfd):
    with Master(1, echo=False) as master:
        assert master.run(lambda params, part: print("unseen") or os.system("echo unseen >&2")) == 0
        assert master.stats().output_received == 2 * len("unseen\n")
    assert capfd.readouterr() == ("", "")


# A lot of it


class Counting:
    """A stdout that keeps only what the test asks about."""

    def __init__(self, master):
        self.master = master
        self.shown = 0
        self.lines = 0
        self.strange = []
        self.most_on_its_way = 0

    def write(self, text):
        lines = text.splitlines()
        self.lines += len(lines)
        self.shown += sum(len(line) + 1 - len("[local 0] ") for line in lines)
        self.strange += {line for line in lines if line[:8] != "[local 0" and line[:8] != "[local 1"}
        self.most_on_its_way = max(self.most_on_its_way, self.master.stats().output_received - self.shown)

    def flush(self):
        pass


def test_a_hundred_megabytes_are_shown_line_by_line(master, monkeypatch):
    def work(params, part):
        text = ("x" * 99 + "\n") * 1000
        for _ in range(500):
            sys.stdout.write(text)
        return 1

    monkeypatch.setattr(sys, "stdout", counting := Counting(master))
    assert master.run(work) == 2
    assert counting.shown == 100_000_000
    assert counting.lines == 1_000_000
    assert counting.strange == []
    assert counting.most_on_its_way < 4 * 1024 * 1024  # the rest waits in print(), not in memory


def test_many_small_prints_are_shown(master, monkeypatch):
    def work(params, part):
        for number in range(20_000):
            print(number)
        return 1

    monkeypatch.setattr(sys, "stdout", counting := Counting(master))
    assert master.run(work) == 2
    assert counting.lines == 40_000


def test_a_stdout_that_fails_holds_up_nothing(one, monkeypatch):
    class Broken:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    assert one.run(lambda params, part: print("unseen") or 1) == 1
    monkeypatch.setattr(sys, "stdout", None)
    assert one.run(lambda params, part: print("unseen") or 1) == 1


# The protocol


def garbage_to(*fds):
    def work(params, part):
        for fd in fds:
            try:
                os.write(fd, os.urandom(100_000))
            except OSError:
                pass
        return 1

    return work


def closing(*fds):
    def work(params, part):
        for fd in fds:
            os.close(fd)
        return 1

    return work


def closing_streams(*names):
    def work(params, part):
        for name in names:
            getattr(sys, name).close()
        return 1

    return work


def without_streams(params, part):
    sys.stdin = sys.stdout = sys.stderr = None
    return 1


def with_streams_of_its_own(params, part):
    import io

    sys.stdout = sys.stderr = io.StringIO()
    return 1


def with_a_broken_stdout(params, part):
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("no streams here")

    sys.stdout = sys.stderr = Broken()
    return 1


def with_other_files_behind_its_streams(params, part):
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return 1


MISDEEDS = {
    "garbage to 0, 1 and 2": garbage_to(0, 1, 2),
    "closes 1": closing(1),
    "closes 0, 1 and 2": closing(0, 1, 2),
    "closes stdout": closing_streams("stdout"),
    "closes stderr": closing_streams("stderr"),
    "closes all streams": closing_streams("stdin", "stdout", "stderr"),
    "streams None": without_streams,
    "StringIO": with_streams_of_its_own,
    "broken streams": with_a_broken_stdout,
    "dup2": with_other_files_behind_its_streams,
}


@pytest.mark.parametrize("misdeed", MISDEEDS.values(), ids=MISDEEDS)
def test_what_user_code_does_to_its_streams_disturbs_no_result(one, capfd, misdeed):
    assert one.run(misdeed) == 1
    for _ in range(2):
        assert one.run(usercode.add_up, 1, DataSet(list(range(10)), slice_size=3)) == 45
        assert one.run(lambda params, part: np.ones(params), 300_000).sum() == 300_000


def test_an_unwritten_rest_that_cannot_be_flushed_disturbs_no_result(one, capfd):
    def work(params, part):
        sys.stdout.write("no line end")
        os.close(1)
        return 1

    assert one.run(work) == 1
    assert one.run(usercode.forty_two) == 42


def test_a_closed_stdout_is_not_what_the_caller_is_told_of_another_error(one):
    def work(params, part):
        sys.stdout.close()
        return 1 / 0

    with pytest.raises(TaskError, match="ZeroDivisionError"):
        one.run(work)
    assert one.run(usercode.forty_two) == 42


def test_stdin_is_empty(one):
    assert one.run(lambda params, part: sys.stdin.read() + os.read(0, 10).decode()) == ""


def test_a_thread_that_prints_after_the_round_disturbs_no_later_one(one, capfd):
    def work(params, part):
        def chatter():
            for _ in range(2000):
                print("still here")

        threading.Thread(target=chatter, daemon=True).start()
        return 1

    assert one.run(work) == 1
    for _ in range(50):
        assert one.run(usercode.add_up, 1, [1, 2, 3]) == 6
