"""Descriptors of a worker: standard streams, whatever user code does to them, and our own files out of its way."""

from __future__ import annotations

import fcntl
import io
import os
import select
import sys

# Our own files get numbers from here on: user code does not close them by accident, and where it has closed them, none
# that it opens later gets the number of one that we write to.
HIGH_FDS = 200

_spare: dict[int, int] = {}  # copies of file descriptors 0, 1 and 2, out of harm's way
_streams = select.poll()  # of the three, those that are closed: told by one call


def open_streams(out: int, err: int) -> None:
    """Have an empty stdin, and these as stdout and stderr."""
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(fd, target)
        _spare[target] = out_of_the_way(fd)
        _streams.register(target, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (_text_stream(fd) for fd in (1, 2))


def out_of_the_way(fd: int) -> int:
    """The same file under a high number, which is closed when another program is started."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FDS)
    os.close(fd)
    return high


def flush_streams() -> None:
    """Write out what user code has printed, if it has left streams that can be."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S110  closed, None, or an object of the user's
            pass


def restore_streams() -> None:
    """Open again what user code has closed, before a file of ours gets the number and is printed into."""
    for fd, event in _streams.poll(0):
        if event & select.POLLNVAL:
            os.dup2(_spare[fd], fd)


def _text_stream(fd: int) -> io.TextIOWrapper:
    raw = open(fd, "wb", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
