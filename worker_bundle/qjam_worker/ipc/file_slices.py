"""Slices that a host maps from a file of its own in place of receiving them from the master.

A host takes its file for the master's if path, size, mtime (in nanoseconds) and the bytes of SAMPLES pages are equal:
it is on a shared file system, or a copy that kept its mtime. One case goes unnoticed: a file that was changed outside
these pages and then given its old mtime.
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


class FileSlice(NamedTuple):
    """A slice in a file: its codec header (`head`), and the offset and size in bytes of its only buffer."""

    path: str
    offset: int
    size: int
    head: bytes
    stamp: Stamp

    @classmethod
    def of(cls, fields: list[Any]) -> FileSlice:
        """The FileSlice that came through a pipe as a list."""
        path, offset, size, head, its_stamp = fields
        return cls(path, offset, size, head, tuple(its_stamp))


def stamp(path: str) -> Stamp:
    """Device, inode, size and mtime: they differ once a file is changed or replaced. Raises OSError."""
    return _stamp(os.stat(path))


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def identify(path: str) -> tuple[bytes, Stamp]:
    """A hash that identifies a file on any host, and its stamp on this host. Raises OSError."""
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


def has_changed(part: FileSlice) -> bool:
    """Whether the file was changed or replaced since the node identified it."""
    try:
        return stamp(part.path) != part.stamp
    except OSError:
        return True


def check(part: FileSlice) -> None:
    """Raises RuntimeError if the file was changed or replaced."""
    if has_changed(part):
        raise _changed(part)


def _changed(part: FileSlice) -> RuntimeError:
    return RuntimeError(f"{part.path} has changed since its data set was made")


def loader(part: FileSlice) -> Callable[[], Any]:
    """A function that returns the slice, from a map of the file. Raises RuntimeError if the file was changed or
    replaced, OSError if it cannot be mapped.
    """
    fd = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if _stamp(os.fstat(fd)) != part.stamp:
            raise _changed(part)
        before = part.offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(fd, before + part.size, offset=part.offset - before, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    return partial(codec.decode, part.head, [memoryview(mapped)[before:]])
