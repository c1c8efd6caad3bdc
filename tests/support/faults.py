"""What befalls hosts, on purpose: their processes are found and signalled, their network is cut."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from processes import descendants, parent
from sshd import Sshd


def command(pid: int) -> str:
    """Its command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def node_of(sshd: Sshd) -> int | None:
    """The process of the node on an ssh host, which is what the login has become; None while there is none."""
    for pid in sorted(sshd.sessions()):
        if "sshd" not in command(pid) and "sshd" in command(parent(pid)):
            return pid
    return None


def fork_server_of(node: int) -> int | None:
    """The one child of a node; None while there is none."""
    children = [pid for pid in descendants(node) if parent(pid) == node]
    return min(children, default=None)


def sessions_of(sshd: Sshd) -> list[int]:
    """sshd's own processes of the logins that are on."""
    return [pid for pid in sshd.sessions() if "sshd" in command(pid)]


def kill_sessions(sshd: Sshd) -> None:
    """As the administrator may: the logins' own processes of sshd. The node and its workers are not touched."""
    for pid in sessions_of(sshd):
        send(pid, signal.SIGKILL)  # one may have gone with another


def host_processes() -> list[int]:
    """The processes of this program that hold ssh connections."""
    return [
        pid
        for pid in descendants(os.getpid())
        if "qjam.launch.host_process" in command(pid) and parent(pid) != os.getpid()
    ]


def send(pid: int | None, number: signal.Signals) -> bool:
    """Signal a process that may be gone already; whether it was there."""
    if pid is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
