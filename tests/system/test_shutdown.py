"""However a master ends, nothing of it is left: no process, no shared memory, no file, no socket."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from gates import Gate
from processes import Traces, all_end, descendants, finish, start, traces
from qjam import BootstrapError, Master, MasterClosed

TESTS = str(Path(__file__).parents[1] / "support")


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


def names(path):
    return sorted(os.listdir(path))


# In the user's program, which goes on


def test_close_leaves_nothing():
    threads = threading.active_count()
    master = Master(2)
    master.run(usercode.add_up, 1, [1, 2, 3])
    left = traces(os.getpid())
    assert len(left.processes) == 3  # two workers and their fork server
    master.close()
    assert left.are_gone()
    assert threading.active_count() == threads


@pytest.mark.parametrize("end", ["close", "worker"])
def test_a_process_that_user_code_has_sent_to_a_session_of_its_own_is_left_neither(end):
    def daemon(params, part):
        import subprocess

        return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid

    with Master(1) as master:
        pid = master.run(daemon)
        if end == "worker":
            os.kill(master.workers[0].pid, signal.SIGKILL)
            assert all_end([pid])
    assert all_end([pid])


def test_close_may_be_called_again():
    master = Master(1)
    master.close()
    master.close()
    assert "closed" in repr(master)


def test_descriptors_do_not_pile_up():
    def use():
        with Master(2) as master:
            master.run(usercode.add_up, 1, [1, 2, 3])
            master.submit(usercode.forty_two).result()

    use()
    gc.collect()
    before = len(names("/proc/self/fd"))
    for _ in range(3):
        use()
    gc.collect()
    assert len(names("/proc/self/fd")) <= before


def test_the_end_of_the_with_block_leaves_nothing():
    with Master(2):
        left = traces(os.getpid())
    assert left.are_gone()


def test_an_exception_in_the_with_block_comes_through_and_leaves_nothing():
    left = []

    def fail():
        with Master(2):
            left.append(traces(os.getpid()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert left[0].are_gone()


def test_a_master_that_nobody_holds_any_longer_leaves_nothing():
    master = Master(2)
    assert master.run(usercode.forty_two) == 84
    left = traces(os.getpid())
    del master
    gc.collect()
    assert left.are_gone()


@pytest.mark.parametrize("function", [usercode.linger, usercode.deaf, usercode.swallow])
def test_close_ends_workers_in_user_code(gate, function):
    with Master(2) as master:
        future = master.submit(function, gate.path)
        assert gate.heard()
        assert gate.heard()
        left = traces(os.getpid())
    assert left.are_gone()
    assert isinstance(future.exception(), MasterClosed)


def test_close_in_another_thread_ends_a_run_with_master_closed(gate):
    with Master(2) as master:

        def close():
            gate.heard()
            master.close()

        closer = threading.Thread(target=close)
        closer.start()
        with pytest.raises(MasterClosed):
            master.run(usercode.linger, gate.path)
        closer.join()


def test_futures_of_a_closed_master_say_so(gate):
    with Master(1) as master:
        futures = [master.submit(usercode.linger, gate.path) for _ in range(5)]
        gate.heard()
    assert {type(future.exception()) for future in futures} == {MasterClosed}


def test_close_ends_what_user_code_has_started(gate):
    def work(path, part):
        import subprocess

        child = subprocess.Popen(["sleep", "1000"])
        usercode.announce(path, child.pid)
        child.wait()

    with Master(1) as master:
        master.submit(work, gate.path)
        sleeper = int(gate.heard())
        left = traces(os.getpid())
        assert sleeper in left.processes
    assert left.are_gone()


def test_a_host_that_cannot_be_started_says_why_and_leaves_nothing(monkeypatch, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('this numpy is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BootstrapError, match=r"(?s)local: .*this numpy is broken"):
        Master(2)
    assert not descendants(os.getpid())


def test_a_python_that_cannot_even_start_says_why_and_leaves_nothing(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with pytest.raises(BootstrapError, match=r"(?s)local: .*encodings"):
        Master(2)
    assert not descendants(os.getpid())


# With the user's program

BEGINNING = f"""
    import sys, os, signal, subprocess
    sys.path.insert(0, {TESTS!r})
    import usercode
    from qjam import Master
    gate = sys.argv[1]
    """


def run_up_to(folder, gate, source, announcements):
    """Starts a script, waits for its workers, and gives the program and what there is because of it."""
    program = start(folder, BEGINNING + source, gate.path)
    for _ in range(announcements):
        gate.heard()
    return program, traces(program.pid)


def assert_nothing_is_left(folder, left):
    assert left.are_gone(), [pid for pid in left.processes if Path(f"/proc/{pid}").exists()]
    assert names(folder / "tmp") == []


def let_on(program):
    """Lets a script on that waits in input()."""
    program.stdin.write("\n")
    program.stdin.flush()


ENDINGS = {
    "without close": ("", 0),
    "exception": ("raise RuntimeError('of the script')", 1),
    "sys.exit": ("sys.exit(7)", 7),
    "exception in with": ("with master: raise RuntimeError('of the script')", 1),
    "os._exit": ("os._exit(3)", 3),
}


@pytest.mark.parametrize(("ending", "status"), ENDINGS.values(), ids=ENDINGS)
def test_the_end_of_the_program_leaves_nothing(tmp_path, gate, ending, status):
    source = f"""
    master = Master(2)
    usercode.announce(gate, master.run(usercode.forty_two))
    input()
    {ending}
    """
    program, left = run_up_to(tmp_path, gate, source, 1)
    let_on(program)
    finish(program, status)
    assert_nothing_is_left(tmp_path, left)


@pytest.mark.parametrize("function", ["linger", "deaf", "swallow"])
def test_the_end_of_the_program_ends_workers_in_user_code(tmp_path, gate, function):
    source = f"""
    master = Master(2)
    future = master.submit(usercode.{function}, gate)
    input()
    """
    program, left = run_up_to(tmp_path, gate, source, 2)
    let_on(program)
    finish(program)
    assert_nothing_is_left(tmp_path, left)


IDLE = """
    master = Master(2)
    master.run(usercode.add_up, 1, [1, 2, 3])
    usercode.announce(gate, "idle")
    signal.pause()
    """
BUSY = """
    with Master(2) as master:
        master.run(usercode.FUNCTION, gate)
    """
WITH_A_CHILD = """
    def work(gate, part):
        child = subprocess.Popen(["sleep", "1000"])
        usercode.announce(gate, child.pid)
        child.wait()

    with Master(2) as master:
        master.run(work, gate)
    """
WITH_AN_ORPHAN = """
    def work(gate, part):
        subprocess.run(["sh", "-c", "sleep 1000 & exit"], check=True)
        usercode.linger(gate, part)

    with Master(2) as master:
        master.run(work, gate)
    """
PRINTING = """
    def work(gate, part):
        usercode.announce(gate, "printing")
        while True:
            print("on and on")

    sys.stdout = open(os.devnull, "w")
    with Master(2) as master:
        master.run(work, gate)
    """
OCCUPATIONS = {
    "idle": (IDLE, 1),
    "in user code": (BUSY.replace("FUNCTION", "linger"), 2),
    "in deaf user code": (BUSY.replace("FUNCTION", "deaf"), 2),
    "in user code that swallows": (BUSY.replace("FUNCTION", "swallow"), 2),
    "with a child of user code": (WITH_A_CHILD, 2),
    "with an orphan of user code": (WITH_AN_ORPHAN, 2),
    "printing": (PRINTING, 2),
}


@pytest.mark.parametrize(("source", "announcements"), OCCUPATIONS.values(), ids=OCCUPATIONS)
def test_kill_9_of_the_master_leaves_nothing(tmp_path, gate, source, announcements):
    program, left = run_up_to(tmp_path, gate, source, announcements)
    program.kill()
    finish(program, -signal.SIGKILL)
    assert_nothing_is_left(tmp_path, left)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_master_leaves_nothing(tmp_path, gate, number):
    program, left = run_up_to(tmp_path, gate, BUSY.replace("FUNCTION", "linger"), 2)
    program.send_signal(number)
    finish(program, -number)
    assert_nothing_is_left(tmp_path, left)


def test_kill_9_while_the_workers_start_leaves_nothing(tmp_path, gate):
    source = """
    class Deadly(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            command = ""
            while "/qjam-" not in command:  # it is told a moment after exec() is over
                with open(f"/proc/{self.pid}/cmdline") as file:
                    command = file.read()
            usercode.announce(gate, f"{self.pid} {command!r}")
            os.kill(os.getpid(), signal.SIGKILL)

    subprocess.Popen = Deadly
    Master(2)
    """
    program = start(tmp_path, BEGINNING + source, gate.path)
    warm, _, command = gate.heard().partition(" ")
    finish(program, -signal.SIGKILL)
    folders = [Path(text) for text in command.split("'") if "/qjam-" in text]
    assert len(folders) == 2
    assert_nothing_is_left(tmp_path, Traces({int(warm)}, set(folders)))


def test_kill_9_of_master_and_fork_server_leaves_no_process_and_the_next_master_removes_the_files(tmp_path, gate):
    program, left = run_up_to(tmp_path, gate, BUSY.replace("FUNCTION", "deaf"), 2)
    workers = {pid for pid in left.processes if not descendants(pid)}
    (warm,) = left.processes - workers
    os.kill(program.pid, signal.SIGSTOP)  # so that it does not clean up between the two
    os.kill(warm, signal.SIGKILL)
    program.kill()
    finish(program, -signal.SIGKILL)
    assert left._replace(folders=set()).are_gone()
    Master(1).close()
    assert not [folder for folder in left.folders if folder.exists() and "shm" in str(folder)]


def test_a_fork_of_the_program_that_ends_leaves_the_pool_alone(tmp_path, gate):
    source = """
    with Master(2) as master:
        master.run(usercode.forty_two)
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
        print(master.run(usercode.forty_two))
        usercode.announce(gate, "done")
        input()
    """
    program = start(tmp_path, BEGINNING + source, gate.path)
    assert gate.heard()
    left = traces(program.pid)
    let_on(program)
    assert finish(program) == "84\n"
    assert_nothing_is_left(tmp_path, left)
