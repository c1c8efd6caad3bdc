"""Slices that a host maps from a file of its own in place of receiving them from the master.

It must be the very file that the master has mapped and hashed, on the same machine: device, inode, size and both times
of change (in nanoseconds) are equal. A time alone can be set back, and an equal copy need not stay one. Nobody but the
user and root may be able to change or replace it, and nobody may have it open for writing: what is written through a
map changes these times late.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import signal
import stat
import struct
import time
from functools import partial
from typing import Any, Callable, NamedTuple

from qjam_worker.values import codec

BOOT = "/proc/sys/kernel/random/boot_id"  # differs from machine to machine
# Seconds after which the system has written back what was changed through a map: the next such change has a new time.
SETTLED = 60.0

Stamp = tuple[int, int, int, int, int]


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
    """Device, inode, size, and the times of change of content and of anything: they differ once a file is changed or
    replaced. Raises OSError.
    """
    return _stamp(os.stat(path))


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def identify(path: str) -> tuple[bytes, Stamp]:
    """A hash that identifies a file, as it is now, among those of all hosts, and its stamp. Raises OSError, also where
    somebody may be writing to it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if _may_have_writers(fd, status):
            raise OSError(errno.ETXTBSY, "somebody may be writing to it", path)
    finally:
        os.close(fd)
    with open(BOOT, "rb") as boot:
        its_stamp = _stamp(status)
        return hashlib.blake2b(struct.pack("<3Q2q", *its_stamp) + boot.read(), digest_size=16).digest(), its_stamp


def _may_have_writers(fd: int, status: os.stat_result) -> bool:
    """Whether somebody may have the file open, or mapped, for writing."""
    try:
        # The system grants a lease to read only where nobody writes. If it is broken in this very moment, the signal is
        # one that is ignored, not SIGIO, which would end the process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):  # the file is not the user's, or the system has no leases
        return time.time() - status.st_ctime < SETTLED
    return False


def is_safe(path: str) -> bool:
    """Whether only the user and root can change the file, or put another one in its place: sshd's StrictModes, but in a
    folder with the sticky bit (/tmp) nobody else can replace what is theirs. `path` has no symbolic links.
    """
    ours, file = (0, os.geteuid()), os.lstat(path)
    if not stat.S_ISREG(file.st_mode) or file.st_uid not in ours or file.st_mode & 0o022:
        return False
    while path != (path := os.path.dirname(path)):
        folder = os.lstat(path)
        if not stat.S_ISDIR(folder.st_mode) or folder.st_uid not in ours:
            return False
        if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
            return False
    return True


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
