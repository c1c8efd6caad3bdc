"""A worker's descriptors: its standard streams, which user code may close, and its own ones, out of user code's way."""

from __future__ import annotations

import fcntl
import io
import os
import resource
import select
import sys

# The worker's own descriptors get numbers from here on, or the last OWN_FDS that the limit allows: user code does not
# close them by accident, and if it closes all, no file that it opens later gets the number of one that the worker
# writes to.
HIGH_FDS = 200
OWN_FDS = 16

_spare: dict[int, int] = {}  # copies of descriptors 0, 1 and 2
_streams = select.poll()  # tells with one call which of the three are closed


def open_streams(out: int, err: int) -> None:
    """Make stdin empty, and these descriptors stdout and stderr."""
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(fd, target)
        _spare[target] = out_of_the_way(fd)
        _streams.register(target, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (_text_stream(fd) for fd in (1, 2))


def out_of_the_way(fd: int) -> int:
    """Move a descriptor to a high number, which exec closes."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = HIGH_FDS if limit == resource.RLIM_INFINITY else max(3, min(HIGH_FDS, limit - OWN_FDS))
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first)
    os.close(fd)
    return high


def flush_streams() -> None:
    """Write out what user code has printed, as far as its streams still work."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S110  closed, None, or an object of the user's
            pass


def restore_streams() -> None:
    """Open the streams again that user code has closed, or the next file gets the number and print() writes into it."""
    for fd, event in _streams.poll(0):
        if event & select.POLLNVAL:
            os.dup2(_spare[fd], fd)


def _text_stream(fd: int) -> io.TextIOWrapper:
    raw = open(fd, "wb", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
