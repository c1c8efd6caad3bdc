"""Files that a node and its workers map: in private directories, in shared memory if there is room."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable
from typing import NamedTuple, Optional

from . import huge_pages

PREFIX = "qjam-"

SHARED_MEMORY = "/dev/shm"

# Bytes of /dev/shm that are left free for other programs.
MARGIN = 4 * 1024 * 1024

# Seconds during which a directory without a lock may be one that is just being made.
BEING_MADE = 60.0


class NoRoom(OSError):
    """Neither shared memory nor the disk has room for a file of this size."""


class Mapped(NamedTuple):
    """A file and its map. `view` has exactly the requested bytes."""

    path: str
    view: memoryview


def map_file(path: str, size: int, write: bool = False) -> memoryview:
    """The first `size` bytes of the file as a memory map; the map lives as long as views of it do."""
    fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        return huge_pages.map_shared(fd, size, write)
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Unlink a file that may be gone already."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


class Files:
    """The private directories of a node. A new file lies in the first one that has room.

    Each file's pages are reserved when it is made. If the system lacked one later, the process that touches it would
    die of SIGBUS, and that may be the user's own process.
    """

    def __init__(self, directories: list[str]) -> None:
        self.directories = directories

    @classmethod
    def make(cls, bases: Optional[Iterable[str]] = None) -> Files:
        """New private directories (0700), in /dev/shm where there is one and in the temporary directory."""
        chosen = [SHARED_MEMORY, tempfile.gettempdir()] if bases is None else list(bases)
        usable = [base for base in chosen if os.path.isdir(base) and os.access(base, os.W_OK)]
        if not usable:
            raise NoRoom(errno.ENOENT, f"no writable directory for shared files among {', '.join(chosen)}")
        for base in usable:
            sweep(base)
        prefix = f"{PREFIX}{os.getuid()}-"
        return cls([tempfile.mkdtemp(prefix=prefix, dir=base) for base in usable])

    def create(self, name: str, size: int) -> Mapped:
        """A new file of `size` bytes, mapped for writing. Raises NoRoom."""
        path, fd, _ = self.open(name, size)
        try:
            return Mapped(path, huge_pages.map_shared(fd, size, write=True))
        finally:
            os.close(fd)

    def open(self, name: str, size: int) -> tuple[str, int, bool]:
        """The path and a file descriptor of a new file, in which `size` bytes are reserved, and whether its pages are
        large ones. Raises NoRoom.
        """
        for directory in self.directories:
            shared, large = directory.startswith(SHARED_MEMORY), False
            if shared and size > _free(directory) - MARGIN:
                continue
            path = os.path.join(directory, name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                large = shared and huge_pages.make_large(fd, size)
                _reserve(fd, max(size, 1))
            except OSError as error:
                os.close(fd)
                remove(path)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
            else:
                return path, fd, large
        raise NoRoom(
            errno.ENOSPC,
            f"no room for {size:,} bytes in {' or '.join(map(os.path.dirname, self.directories))}",
        )

    def paths(self, name: str) -> list[str]:
        """Where a file of this name may be."""
        return [os.path.join(directory, name) for directory in self.directories]

    def find(self, name: str) -> str:
        """The path of the file of this name, which exists."""
        return next(path for path in self.paths(name) if os.path.exists(path))

    def lock(self) -> list[int]:
        """Mark the directories as in use for as long as the returned file descriptors are open."""
        locks = [_lock(directory, fcntl.LOCK_SH) for directory in self.directories]
        return [lock for lock in locks if lock is not None]

    def remove(self) -> None:
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


def sweep(base: str) -> None:
    """Remove directories of this user's nodes that were killed together with their fork servers."""
    prefix = f"{PREFIX}{os.getuid()}-"
    for name in os.listdir(base):
        path = os.path.join(base, name)
        if not name.startswith(prefix) or not _is_ours(path):
            continue
        if _being_made(path):
            continue
        lock = _lock(path, fcntl.LOCK_EX)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _being_made(path: str) -> bool:
    try:
        return not os.path.exists(os.path.join(path, "lock")) and time.time() - os.stat(path).st_mtime < BEING_MADE
    except FileNotFoundError:  # another process has removed it
        return True


def _is_ours(path: str) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _lock(directory: str, how: int) -> Optional[int]:
    place = os.path.join(directory, "lock")
    try:
        if how == fcntl.LOCK_SH and not os.path.exists(place):
            fresh, path = tempfile.mkstemp(dir=directory)  # it is locked before another process's sweep sees it
            fcntl.flock(fresh, how)
            os.rename(path, place)
            return fresh
        fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _free(directory: str) -> int:
    room = os.statvfs(directory)
    return room.f_bavail * room.f_frsize


def has_plenty(path: str, size: int) -> bool:
    """Whether there is so much free room that a file of `size` bytes may stay for a while."""
    return _free(os.path.dirname(path)) > 8 * size


def _reserve(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
