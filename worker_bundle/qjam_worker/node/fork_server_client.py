"""The node's end of its fork server: the process that forks the workers and reports how they ended.

A remote node forks it from itself while it is young: numpy is then imported once per host and not twice, which is half
of what a start costs there (8 hosts on 2 cores start in 0.9 s so, and in 1.4 s with a fork server that is a program of
its own). It must happen before ZeroMQ is imported, for the workers have none. A node in a user's process cannot do so:
what is in there, threads above all, must not be copied.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn, Optional, Union

from qjam_worker.ipc.cores import thread_environment
from qjam_worker.ipc.files import Files
from qjam_worker.worker.fork_server import MAX_MEMORY_LIMIT, NEWS, REQUEST, main

from .options import NodeOptions

# Nothing that is imported here may import numpy: `prepare` comes first.

HIGHEST_FD = 65_536
SAID = 4096  # bytes of its own output that are kept, to tell why it ended


class Forked:
    """A child process, with as much of Popen's face as is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended: Optional[int] = None

    def wait(self) -> int:
        """Block until it has ended; its exit status, or the number of the signal that killed it as a negative one."""
        if self._ended is None:  # the system tells it once
            _, status = os.waitpid(self.pid, 0)
            self._ended = os.waitstatus_to_exitcode(status)
        return self._ended


class News(NamedTuple):
    """What the fork server reports: that it has forked a worker, or that one has ended."""

    what: int  # FORKED or EXITED
    worker: int
    pid: int
    status: int  # as wait() gives it


class ForkServer:
    """A running fork server. `files` and `locks` are set where it was forked early: the node's directories."""

    def __init__(
        self,
        process: Union[Forked, subprocess.Popen[bytes]],
        control: socket.socket,
        output: int,
        files: Optional[Files] = None,
        locks: Sequence[int] = (),
    ) -> None:
        self.process = process
        self.control = control
        self.output = output  # what it prints
        self.files = files
        self.locks = list(locks)
        self._said = b""

    @classmethod
    def start(cls, files: Files, options: NodeOptions) -> ForkServer:
        """Start one as a program."""
        ours, theirs = socket.socketpair()
        output, output_end = os.pipe()
        root = str(Path(__file__).absolute().parents[2])
        replaced = 0 if sys.flags.isolated else 1  # the folder that it is started in
        command = (
            f"import sys; sys.path[:{replaced}] = {[root, *options.paths]!r}; "
            "from qjam_worker.worker.fork_server import main; "
            f"main({theirs.fileno()}, {files.directories!r}, {options.here})"
        )
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *(["-I"] if sys.flags.isolated else []), "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                pass_fds=[theirs.fileno()],
                env={**thread_environment(options.workers), **options.environment},
                start_new_session=True,
            )
        os.close(output_end)
        return cls(process, ours, output)

    def fork(self, worker: int, memory_limit: Optional[int], fds: list[int]) -> None:
        """Ask for a worker that has these descriptors."""
        try:
            socket.send_fds(self.control, [REQUEST.pack(worker, min(memory_limit or 0, MAX_MEMORY_LIMIT))], fds)
        except (BrokenPipeError, ConnectionResetError):
            pass  # its socket tells of its end

    def news(self) -> Optional[News]:
        """The next report; None when it has ended."""
        try:
            data = self.control.recv(NEWS.size, socket.MSG_WAITALL)
        except ConnectionResetError:  # it died with our requests unread
            data = b""
        return News(*NEWS.unpack(data)) if data else None

    def take_output(self, data: bytes) -> None:
        """It has printed this."""
        self._said = (self._said + data)[-SAID:]

    @property
    def last_words(self) -> str:
        """The end of what it has printed."""
        return self._said.decode(errors="replace").strip()

    def resume(self) -> None:
        """Wake it up, if user code has stopped it (SIGSTOP)."""
        send_signal(self.process.pid, signal.SIGCONT)

    def hang_up(self) -> None:
        """Close the control socket: it kills the workers, removes the files and ends."""
        try:
            self.control.shutdown(socket.SHUT_RDWR)  # reaches it also when a fork of the program has copies
        except OSError:
            pass  # it has gone first
        self.control.close()

    def forget(self) -> None:
        """In another process than the node's: close the copies of what its end is to be known by."""
        self.control.close()
        for fd in (self.output, *self.locks):
            os.close(fd)

    def end(self) -> None:
        """No node will use it: have it remove the files, and wait for its end."""
        self.forget()
        self.process.wait()


def prepare(workers: int) -> None:
    """Make the environment of this process that of workers: BLAS reads it when numpy is imported."""
    os.environ.update(thread_environment(workers))


def fork() -> ForkServer:
    """Fork one from this process, which has called `prepare` and imported numpy."""
    files = Files.make()
    locks = files.lock()  # for the node too: nobody sweeps its files away when the fork server is killed
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
        _become_fork_server(theirs.fileno(), output_end, files)
    theirs.close()
    os.close(output_end)
    return ForkServer(Forked(pid), ours, output, files, locks)


def _become_fork_server(control: int, output: int, files: Files) -> NoReturn:
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(fd, place)
        keep = os.dup(control)
        os.closerange(3, keep)
        os.closerange(keep + 1, HIGHEST_FD)
        sys.modules["__main__"] = ModuleType("__main__")  # the bootstrap stands there
        main(keep, files.directories)
    finally:
        os._exit(1)


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
