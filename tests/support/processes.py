"""Programs that tests start, what they start in turn, and the end of all of it."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# What issue 2 gives close(), the interpreter's exit and `kill -9` of the master to leave nothing behind.
GRACE_S = 5.0

Program = subprocess.Popen[str]


def start(folder: Path, source: str, *arguments: object) -> Program:
    """Starts a script that lies in `folder` beside the user's modules, with a temporary folder of its own."""
    (folder / "script.py").write_text(textwrap.dedent(source))
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "script.py", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(program: Program, status: int = 0) -> str:
    """Waits for the program's end and gives what it has printed since."""
    try:
        printed, errors = program.communicate()
    finally:
        program.kill()
    assert program.returncode == status, f"exit status {program.returncode}\n{printed}\n{errors}"
    return printed


def output(folder: Path, source: str, *arguments: object) -> str:
    """What a script prints that ends well and complains of nothing."""
    program = start(folder, source, *arguments)
    printed, errors = program.communicate()
    assert program.returncode == 0, errors
    assert not errors
    return printed


def parent(pid: int) -> int:
    """The process that started this one; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def descendants(pid: int) -> set[int]:
    """All processes that this one has started, directly or not, and that have not ended."""
    parents = {int(name): parent(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
    found = {pid}
    while more := {child for child, its_parent in parents.items() if its_parent in found} - found:
        found |= more
    return found - {pid}


class Traces(NamedTuple):
    """What runs and lies about because of a master."""

    processes: set[int]
    folders: set[Path]

    def are_gone(self) -> bool:
        """Waits for all of it to be gone, 5 s at most, and tells whether it is."""
        deadline = time.monotonic() + GRACE_S
        return all_end(self.processes, deadline) and not any(folder.exists() for folder in self.folders)


def traces(pid: int) -> Traces:
    """What the master in the process `pid` has brought about so far."""
    processes = descendants(pid)
    maps = "".join(Path(f"/proc/{process}/maps").read_text() for process in processes)
    folders = {Path(found) for found in re.findall(r"(/\S*/qjam-[^/\s]+)/\S*$", maps, re.MULTILINE)}
    assert processes
    assert folders
    return Traces(processes, folders)


def all_end(pids: Iterable[int], deadline: float | None = None) -> bool:
    """Waits for the end of processes, whoever's children they are."""
    if deadline is None:
        deadline = time.monotonic() + GRACE_S
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        ended = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(fd)
        if not ended:
            return False
    return True
