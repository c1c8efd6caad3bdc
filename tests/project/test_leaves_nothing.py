"""What conftest.py holds every test to can fail: a pytest session is failed for each thing that it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"

GUILTY = """
import os, socket, subprocess, tempfile, threading
from pathlib import Path

def test_child(): subprocess.Popen(["sleep", "100"]).returncode = 0
def test_orphan():
    command = ["sh", "-c", "cd /; setsid sh -c 'echo; sleep 101; :' & exit 0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as started:
        started.stdout.readline()  # the orphan runs, and is not just about to, when the test ends
def test_zombie(): os.posix_spawn("/bin/true", ["true"], os.environ)
def test_thread(): threading.Thread(target=threading.Event().wait, args=(3,), name="lost").start()
def test_folder(): tempfile.mkdtemp(prefix="qjam-folder-")
def test_shared_memory():
    global held  # the tests that run beside this session know by it that the file is not theirs
    held = open("/dev/shm/qjam-" + os.environ["QJAM_TEST_SESSION"], "w")
def test_socket():
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(tempfile.gettempdir() + "/qjam-socket")
"""
INNOCENT = """
import os, subprocess
from pathlib import Path

def test_process_that_ends_later(): subprocess.run(["sh", "-c", "setsid sleep 0.1 & exit 0"], check=True)
def test_files_of_pytest(tmp_path): (tmp_path / "qjam").touch()
"""


def session(folder: Path, tests: str) -> str:
    """Gives what a pytest session of its own prints, in which nothing has more than half a second to end."""
    (folder / "conftest.py").write_text(CONFTEST.read_text() + "\nGRACE_S = 0.5\n")
    (folder / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout


def test_whatever_is_left_fails_its_test(tmp_path: Path) -> None:
    told = session(tmp_path, GUILTY)
    for path in Path("/dev/shm").glob("qjam-qjt-*"):
        if path.name in told:
            path.unlink()
    for wanted in (
        "7 passed, 7 errors",
        "sleep 100",
        "sleep 101",
        "a zombie",
        "thread 'lost'",
        "/qjam-folder-",
        "/dev/shm/qjam-",
        "socket /",
    ):
        assert wanted in told, told


def test_what_ends_in_time_and_what_pytest_keeps_is_let_be(tmp_path: Path) -> None:
    assert "2 passed in" in session(tmp_path, INNOCENT)
