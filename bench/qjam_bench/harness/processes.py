"""Find processes in /proc, and stop and continue those of a party."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def proc_text(pid: int, name: str) -> str:
    """Read /proc/PID/NAME; "" if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def below(pid: int) -> set[int]:
    """Give the pids of all descendants of a process."""
    stats = {int(name): proc_text(int(name), "stat") for name in os.listdir("/proc") if name.isdecimal()}
    parents = {one: int(text.rpartition(")")[2].split()[1]) for one, text in stats.items() if text}
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def births(pids: Iterable[int]) -> dict[int, str]:
    """Give when each of these processes began, if it still exists: a pid can come again, this cannot."""
    stats = {pid: proc_text(pid, "stat") for pid in pids}
    return {pid: text.rpartition(")")[2].split()[19] for pid, text in stats.items() if text}


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to each of these processes that still exists."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wake_when_parent_dies() -> None:
    """Have the kernel continue this process when its parent ends; otherwise it could stay stopped for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
