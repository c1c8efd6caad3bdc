"""What every test is held to: when it ends, nothing that it started is left.

Each process that a test starts, however far down, inherits QJAM_TEST_SESSION and finds TMPDIR to be a folder
of this session alone, so it is known again after it was orphaned, also while another session runs beside it.
A process that does not inherit the environment (a login through a test's sshd) is known by its command line,
its working directory, or `SetEnv QJAM_TEST_SESSION=...` in the configuration of that sshd.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

GRACE_S = 5.0  # what issue 2 gives close(), the interpreter's exit and `kill -9` of the master

SESSION = f"qjt-{secrets.token_hex(4)}"
SHARED_MEMORY = Path("/dev/shm")

# Before anything asks for a temporary folder. pytest's tmp_path stays outside, for a look after a failure.
# The name is short because the path of a unix socket may have 108 bytes.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
TEMPORARY = Path(tempfile.gettempdir(), SESSION)
TEMPORARY.mkdir(mode=0o700)
os.environ["TMPDIR"] = tempfile.tempdir = str(TEMPORARY)
os.environ["QJAM_TEST_SESSION"] = SESSION
# The parts that hosts lack are kept beside what else is of this session; pip goes on with what it has.
os.environ.setdefault("PIP_CACHE_DIR", str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pip")))
os.environ["XDG_CACHE_HOME"] = str(TEMPORARY / "cache")
Path(os.environ["XDG_CACHE_HOME"]).mkdir()

# What a test was failed for already; the check of the whole session does not tell it again.
_told: set[Path | threading.Thread] = set()


# No test has a limit on speed. All else stays as hypothesis has it, which is another way where CI is set.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


def pytest_unconfigure() -> None:
    shutil.rmtree(TEMPORARY, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _session_leaves_nothing() -> Iterator[None]:
    yield from _left_nothing()


@pytest.fixture(autouse=True)
def _leaves_nothing(_session_leaves_nothing: None) -> Iterator[None]:
    yield from _left_nothing()


def _left_nothing() -> Iterator[None]:
    """Fails what ran meanwhile if it leaves a process, a thread, a socket or a file; kills such processes."""
    processes, threads, files = _pids(), set(threading.enumerate()), set(_files())
    yield
    deadline = time.monotonic() + GRACE_S
    pause = threading.Event()
    left_files = set(_files()) - files - _told  # what comes later is of the sessions that run beside this one
    while True:
        left_processes = [
            process
            for process in map(Process, sorted(_pids() - processes))
            if process.ours and not process.replaces(processes)
        ]
        left_threads = [thread for thread in threading.enumerate() if thread not in threads | _told]
        left_files = {path for path in left_files if not _held_by_a_stranger(path) and os.path.lexists(path)}
        if not (left_processes or left_threads or left_files):
            return
        if time.monotonic() > deadline:
            break
        pause.wait(0.02)

    lines = [f"left behind {GRACE_S:.0f} s after the end:"]
    lines += [f"  process {process}" for process in left_processes]
    lines += [f"  thread {thread.name!r}\n{_stack(thread)}" for thread in left_threads]
    lines += [
        f"  {'socket' if path.is_socket() else 'folder' if path.is_dir() else 'file'} {path}"
        for path in sorted(left_files)
    ]
    for process in left_processes:
        process.kill()
    _told.update(left_threads, left_files)
    pytest.fail("\n".join(lines), pytrace=False)


class Process:
    """One process as /proc tells it now; what cannot be read (it is gone, it is another user's) is empty."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._proc = Path("/proc", str(pid))
        fields = self._read("stat").rpartition(")")[2].split()
        self.state, self.parent, self.session = (
            (fields[0], int(fields[1]), int(fields[3])) if fields else ("gone", 0, 0)
        )
        self.command = self._read("cmdline").replace("\0", " ").strip()

    def replaces(self, before: set[int]) -> bool:
        """Whether it is a worker of a pool that was there before, in the place of one that had to go. Workers lead
        sessions of their own; what user code starts does not.
        """
        pool = self.parent in before - {os.getpid()} and Process(self.parent).ours
        return self.session == self.pid and pool

    @property
    def ours(self) -> bool:
        if self.state == "gone":
            return False
        if self.parent == os.getpid():
            return True
        return any(SESSION in text for text in (self.command, self._link("cwd"), self._read("environ")))

    def holds(self, path: Path) -> bool:
        """Tells whether the process names, maps, has open, or stands in `path` or something below it."""
        try:
            descriptors = [self._link(f"fd/{fd}") for fd in os.listdir(self._proc / "fd")]
        except OSError:
            descriptors = []
        return any(str(path) in text for text in (self.command, self._link("cwd"), self._read("maps"), *descriptors))

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if self.parent == os.getpid():
            try:
                os.waitpid(self.pid, 0)
            except ChildProcessError:
                pass

    def __str__(self) -> str:
        name = self.command or self._read("comm").strip()
        note = " (a zombie: nobody waited for it)" if self.state == "Z" else ""
        return f"{self.pid}, child of {self.parent}, state {self.state}{note}: {name}"

    def _read(self, name: str) -> str:
        try:
            return (self._proc / name).read_text(errors="replace")
        except OSError:
            return ""

    def _link(self, name: str) -> str:
        try:
            return os.readlink(self._proc / name)
        except OSError:
            return ""


def _pids() -> set[int]:
    """Gives the processes of this machine; none where there is no /proc, and then they go unchecked."""
    try:
        return {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    except OSError:
        return set()


def _files() -> list[Path]:
    """Gives what lies in the temporary folder, sockets among it, and what of qjam's lies in shared memory."""
    return sorted([*TEMPORARY.iterdir(), *SHARED_MEMORY.glob("qjam*")])


def _held_by_a_stranger(path: Path) -> bool:
    """Tells whether another session's process uses `path`: shared memory has no folder of our own."""
    if TEMPORARY in path.parents:
        return False
    others = map(Process, _pids() - {os.getpid()})
    return any(process.holds(path) and not process.ours for process in others)


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame else "  (it has just ended)"
