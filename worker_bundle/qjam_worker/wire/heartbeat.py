"""What a node lives by: somebody at the other end of its stdin, who sends a byte now and then and gets it back."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import Callable, Optional

# Seconds for the node to stop its workers and remove its files; then it is ended, and its fork server does that.
HARD = 3.0


def hold(read_fd: int, write_fd: int, limit: Optional[float], end: Callable[[str], None]) -> None:
    """Watch, in a thread of its own. When `read_fd` ends, or nothing has come for `limit` seconds, `end(why)` is called
    there, and the process is ended if it has not gone by itself soon after.

    A thread, because the node's own loop may be held up by a slow disk. What ends a host that was cut off from the
    network is the silence alone: nothing tells a machine that its peer is no more.
    """
    threading.Thread(target=_watch, args=(read_fd, write_fd, limit, end), name="qjam-heartbeat", daemon=True).start()


def _watch(read_fd: int, write_fd: int, limit: Optional[float], end: Callable[[str], None]) -> None:
    why = "the master is gone"
    try:
        while True:
            readable, _, _ = select.select([read_fd], [], [], limit)
            if not readable:
                why = f"nothing was heard of the master for {limit:.0f} s"
                break
            beat = os.read(read_fd, 4096)
            if not beat:
                break
            os.write(write_fd, beat)
    except OSError as error:
        why = f"the way to the master is closed: {error}"
    _wake_children()
    end(why)
    time.sleep(HARD)
    os._exit(1)


def _wake_children() -> None:
    """The fork server, and the relay if there is one: stopped, they would outlive this process."""
    try:
        tasks = os.listdir("/proc/self/task")
    except OSError:
        return  # not Linux
    for task in tasks:
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGCONT)
        except OSError:
            continue  # it has gone first
