"""Slices whose bytes lie, just as they would be sent, in a file that this host sees as well: mapped here and not sent.

The file here is taken for the file there when path, size, time of change (nanoseconds) and SAMPLES pages of it are the
same. So a file system that hosts share will do, or copies that have kept their times; what would deceive it is a file
that was changed between these pages and given its old time again.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import struct
from functools import partial
from typing import Any, Callable, NamedTuple

from qjam_worker.values import codec

SAMPLES, PAGE = 64, 4096

Stamp = tuple[int, int, int, int]


class Place(NamedTuple):
    """Where a slice lies: what the codec calls its header, and its only buffer as bytes of a file."""

    path: str
    offset: int
    size: int
    head: bytes
    stamp: Stamp

    @classmethod
    def of(cls, told: list[Any]) -> Place:
        """As it has come through a pipe."""
        path, offset, size, head, its_stamp = told
        return cls(path, offset, size, head, tuple(its_stamp))


def stamp(path: str) -> Stamp:
    """What changes when a file is changed or another one takes its place. Raises OSError."""
    return _stamp(os.stat(path))


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def identify(path: str) -> tuple[bytes, Stamp]:
    """What tells a file from others on any host, and its stamp on this one. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        content = hashlib.blake2b(struct.pack("<Qq", status.st_size, status.st_mtime_ns), digest_size=16)
        last = max(0, status.st_size - PAGE)
        for number in range(SAMPLES):
            content.update(os.pread(fd, PAGE, last * number // (SAMPLES - 1)))
        return content.digest(), _stamp(status)
    finally:
        os.close(fd)


def has_changed(place: Place) -> bool:
    """Whether the file is not as it was when the node was told of it."""
    try:
        return stamp(place.path) != place.stamp
    except OSError:
        return True


def check(place: Place) -> None:
    """Raises RuntimeError when the file has changed."""
    if has_changed(place):
        raise RuntimeError(f"{place.path} has changed since its data set was made")


def loader(place: Place) -> Callable[[], Any]:
    """What gives the slice each time that it is called. Raises RuntimeError when the file has changed, OSError when it
    cannot be mapped.
    """
    fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if _stamp(os.fstat(fd)) != place.stamp:
            check(place)
        before = place.offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(fd, before + place.size, offset=place.offset - before, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    return partial(codec.decode, place.head, [memoryview(mapped)[before:]])
