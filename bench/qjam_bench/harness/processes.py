"""Processes as /proc shows them, and what it takes to stop those of a party that is not on turn."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def proc_text(pid: int, name: str) -> str:
    """Give a file of a process; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def below(pid: int) -> set[int]:
    """All processes that this one has started, directly or not."""
    stats = {int(name): proc_text(int(name), "stat") for name in os.listdir("/proc") if name.isdecimal()}
    parents = {one: int(text.rpartition(")")[2].split()[1]) for one, text in stats.items() if text}
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to each of these that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wake_when_parent_dies() -> None:
    """Have the kernel continue this process when its parent ends: stopped, it would stay for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
