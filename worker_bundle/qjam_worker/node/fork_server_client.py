"""The warm parent of a node that has a process to itself: forked from it while it is young.

numpy is then imported once a host and not twice, which is half of what a start costs there (with 8 hosts on 2 cores
they started in 0.9 s so, and in 1.4 s with a parent that was started as a program of its own). It must happen before
ZeroMQ is imported, for the workers have none. A node in a user's process cannot do so: what is in there, threads
above all, is not to be copied.
"""

from __future__ import annotations

import os
import socket
import sys
from types import ModuleType
from typing import NamedTuple, NoReturn, Optional

from qjam_worker.ipc.cores import thread_environment
from qjam_worker.ipc.files import Files
from qjam_worker.worker.fork_server import main

HIGHEST_FD = 65_536


class Forked:
    """A child process, as far as it need look like a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended: Optional[int] = None

    def wait(self) -> int:
        """Block until it has ended; its exit status, or the number of the signal that killed it as a negative one."""
        if self._ended is None:  # the system tells it once
            _, status = os.waitpid(self.pid, 0)
            self._ended = os.waitstatus_to_exitcode(status)
        return self._ended


class ForkServer(NamedTuple):
    """A warm parent: its process, the socket that asks it for workers, what it prints, where files are made."""

    process: Forked
    control: socket.socket
    output: int
    files: Files
    locks: list[int]

    def end(self) -> None:
        """It will not be needed: have it remove the files and wait until it has gone."""
        self.forget()
        self.process.wait()

    def forget(self) -> None:
        """In another process than the node's: close the copies of what its end is to be known by."""
        self.control.close()
        for fd in (self.output, *self.locks):
            os.close(fd)


def prepare(workers: int) -> None:
    """Make the environment of this process that of workers: BLAS reads it when numpy is imported."""
    os.environ.update(thread_environment(workers))


def fork() -> ForkServer:
    """Fork it, from a process that has prepared itself and imported numpy."""
    files = Files.make()
    locks = files.lock()  # of the node as well, from now on: nobody sweeps them away when the parent is killed
    ours, theirs = socket.socketpair()
    output, output_end = os.pipe()
    try:
        pid = os.fork()
    except BaseException:
        files.remove()
        for lock in locks:
            os.close(lock)
        raise
    if pid == 0:
        _become_parent(theirs.fileno(), output_end, files)
    theirs.close()
    os.close(output_end)
    return ForkServer(Forked(pid), ours, output, files, locks)


def _become_parent(control: int, output: int, files: Files) -> NoReturn:
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(fd, place)
        keep = os.dup(control)
        os.closerange(3, keep)
        os.closerange(keep + 1, HIGHEST_FD)
        sys.modules["__main__"] = ModuleType("__main__")  # what stands there is stage 1
        main(keep, files.directories)
    finally:
        os._exit(1)
