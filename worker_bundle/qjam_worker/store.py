"""Mapped files that a node and its workers share, and the slices kept in them by content hash, bounded in bytes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple, Optional

PREFIX = "qjam-"
SHARED_MEMORY = "/dev/shm"
# Left free in /dev/shm for other programs: the doorbell of "no room" must ring before theirs does.
MARGIN = 4 * 1024 * 1024
# Seconds for which a directory that nobody has locked yet is taken for one that is just being made.
BEING_MADE = 60.0


class NoRoom(OSError):
    """Neither shared memory nor the disk has room for a file of this size."""


class Mapped(NamedTuple):
    """A file and its mapping. `view` covers exactly the bytes that were asked for."""

    path: str
    view: memoryview


def map_file(path: str, size: int, write: bool = False) -> memoryview:
    """The first `size` bytes of the file as a memory map; the map lives as long as views of it do."""
    fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
        return memoryview(mmap.mmap(fd, max(size, 1), access=access))[:size]
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Unlink a file that may be gone already."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


class Files:
    """Where a node's files are made: private directories, the first one with room is used.

    Each file's pages are reserved when it is made, because a page that cannot be had later is a SIGBUS in
    whoever touches it, and that may be the user's own process.
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
        for directory in self.directories:
            if directory.startswith(SHARED_MEMORY) and size > _free(directory) - MARGIN:
                continue
            path = os.path.join(directory, name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _reserve(fd, max(size, 1))
                return Mapped(path, memoryview(mmap.mmap(fd, max(size, 1)))[:size])
            except OSError as error:
                remove(path)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                    raise
            finally:
                os.close(fd)
        raise NoRoom(
            errno.ENOSPC,
            f"no room for {size:,} bytes in {' or '.join(map(os.path.dirname, self.directories))}",
        )

    def lock(self) -> list[int]:
        """Mark the directories as in use for as long as the returned file descriptors are open."""
        return [lock for lock in map(_lock, self.directories) if lock is not None]

    def remove(self) -> None:
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


def sweep(base: str) -> None:
    """Remove directories of this user's nodes that died with everything that could have cleaned up."""
    prefix = f"{PREFIX}{os.getuid()}-"
    for name in os.listdir(base):
        path = os.path.join(base, name)
        if not name.startswith(prefix) or not _is_ours(path):
            continue
        if not os.path.exists(os.path.join(path, "lock")) and time.time() - os.stat(path).st_mtime < BEING_MADE:
            continue
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _is_ours(path: str) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _lock(directory: str) -> Optional[int]:
    try:
        fd = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _free(directory: str) -> int:
    room = os.statvfs(directory)
    return room.f_bavail * room.f_frsize


def _reserve(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


class Slice(NamedTuple):
    """One ref's content: `have` of `len(view)` bytes are here."""

    path: str
    view: memoryview
    have: int


class Store:
    """Refs by name in mapped files. Beyond `limit` bytes the least recently used unpinned ones go."""

    def __init__(self, files: Files, limit: int) -> None:
        self.files = files
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[str, Slice] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._made = 0

    def __contains__(self, ref: str) -> bool:
        entry = self._entries.get(ref)
        return entry is not None and entry.have == len(entry.view)

    def have(self, ref: str) -> int:
        """How many leading bytes of the ref are here: where a broken transfer resumes."""
        entry = self._entries.get(ref)
        return 0 if entry is None else entry.have

    def refs(self) -> list[str]:
        return [ref for ref in self._entries if ref in self]

    def path(self, ref: str) -> str:
        self._entries.move_to_end(ref)
        return self._entries[ref].path

    def view(self, ref: str) -> memoryview:
        return self._entries[ref].view

    def pin(self, ref: str) -> None:
        """Keep the ref while a round needs it."""
        self._pins[ref] = self._pins.get(ref, 0) + 1

    def unpin(self, ref: str) -> None:
        left = self._pins.pop(ref, 0) - 1
        if left > 0:
            self._pins[ref] = left

    def write(self, ref: str, offset: int, total: int, data: memoryview) -> list[str]:
        """Put one chunk in its place; a chunk that does not follow what is here is dropped (it came twice).

        Gives the paths of files that had to go to make room. Raises NoRoom, ValueError for impossible offsets.
        """
        dropped: list[str] = []
        entry = self._entries.get(ref)
        if entry is None:
            dropped = self._make_room(total)
            self._made += 1
            mapped = self.files.create(f"ref{self._made}", total)
            entry = self._entries[ref] = Slice(mapped.path, mapped.view, 0)
            self.bytes += total
        if total != len(entry.view) or offset < 0 or offset + len(data) > total:
            raise ValueError(
                f"chunk [{offset}, {offset + len(data)}) of {ref}: its length is {len(entry.view)}, not {total}"
            )
        if offset == entry.have:
            entry.view[offset : offset + len(data)] = data
            self._entries[ref] = entry._replace(have=offset + len(data))
        return dropped

    def drop(self, ref: str) -> None:
        entry = self._entries.pop(ref, None)
        if entry is not None:
            self.bytes -= len(entry.view)
            remove(entry.path)

    def clear(self) -> None:
        """Drop everything."""
        for ref in list(self._entries):
            self.drop(ref)

    def _make_room(self, size: int) -> list[str]:
        dropped: list[str] = []
        while self.bytes + size > self.limit:
            ref = next((ref for ref in self._entries if ref not in self._pins), None)
            if ref is None:
                break
            dropped.append(self._entries[ref].path)
            self.drop(ref)
        return dropped
