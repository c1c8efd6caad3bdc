"""The fork server: forks the workers of a node, reports how they ended, and cleans up when the node has ended."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Container
from typing import NoReturn, Optional

from qjam_worker.ipc import huge_pages
from qjam_worker.ipc.files import Files

# The node requests a worker by its index, and sends its file descriptors along; the fork server reports forks and ends.
REQUEST = struct.Struct("=iq")  # worker, memory_limit in bytes or 0
MAX_MEMORY_LIMIT = 2**63 - 1
NEWS = struct.Struct("=iiii")  # FORKED or EXITED, worker, pid, wait status
FORKED, EXITED = 1, 2
# Descriptors of a new worker: messages to it, the broadcast, its messages, the wake-up for answers in its mailbox,
# answers to its imports, stdout, stderr.
FDS = 7


def main(control_fd: int, directories: list[str], here: bool = False) -> NoReturn:
    """Serve requests on a socket until its other end closes; then kill the workers and remove the node's files.

    `here`: whether this is the master's machine.
    """
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a worker leaves behind becomes our child
    files = Files(directories)
    locks = files.lock()
    workers: dict[int, int] = {}  # pid -> worker
    huge_pages.keep_freed()  # in the workers
    try:
        _preload()
        _serve(control, files, workers, locks, here)
    except BaseException:  # noqa: BLE001  the node passes on what this prints
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            pass  # the node has ended
        for pid in workers:
            _kill_group(pid)
        while _kill_children():
            os.waitpid(-1, 0)
        files.remove()
        os._exit(0)


def _preload() -> None:
    for name in (
        "numpy",
        "numpy.random",
        "pickle",
        "traceback",
        "linecache",
        "inspect",
        "qjam_worker.worker.worker",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or the garbage collector would touch, and so copy, memory that the workers share


def _serve(control: socket.socket, files: Files, workers: dict[int, int], locks: list[int], here: bool) -> None:
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                _reap(control, workers)
                continue
            try:
                request, fds, _, _ = socket.recv_fds(control, REQUEST.size, FDS)
            except ConnectionResetError:  # the node died before it had read all reports
                return
            if not request:
                return
            worker, memory_limit = REQUEST.unpack(request)
            pid = os.fork()
            if pid == 0:
                selector.close()
                for fd in (wake_read, wake_write, control.fileno(), *locks):
                    os.close(fd)
                _become_worker(worker, fds, files, memory_limit or None, here)
            for fd in fds:
                os.close(fd)
            workers[pid] = worker
            _report(control, FORKED, worker, pid, 0)


def _report(control: socket.socket, what: int, worker: int, pid: int, status: int) -> None:
    try:
        control.sendall(NEWS.pack(what, worker, pid, status))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the node has ended: the next read shows it


def _reap(control: socket.socket, workers: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        worker = workers.pop(pid, None)
        if worker is None:
            continue  # a process that a worker left behind and that was killed below
        _kill_group(pid)  # processes that the worker has started end with it,
        _kill_children(workers)  # also those that have left its group: they are our children now
        _report(control, EXITED, worker, pid, status)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _kill_children(spared: Container[int] = ()) -> bool:
    """Kill the children of this process that are not `spared`; whether a child was killed, so that one will end."""
    me = os.getpid()
    try:
        with open(f"/proc/{me}/task/{me}/children") as file:
            children = [int(pid) for pid in file.read().split()]
    except OSError:  # not Linux
        return False
    killed = False
    for pid in children:
        if pid not in spared:
            try:
                os.kill(pid, signal.SIGKILL)
                killed = True
            except (ProcessLookupError, PermissionError):
                pass  # it runs as another user, by sudo perhaps
    return killed


def _become_worker(worker: int, fds: list[int], files: Files, memory_limit: Optional[int], here: bool) -> NoReturn:
    from .streams import flush_streams
    from .worker import main as work

    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = work(worker, fds, files, memory_limit, here)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        if isinstance(leaving.code, str):  # sys.exit("why")
            os.write(2, f"{leaving.code}\n".encode(errors="replace"))
    except BaseException:  # noqa: BLE001  nobody else prints it
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            flush_streams()
        finally:
            os._exit(status & 0xFF)
