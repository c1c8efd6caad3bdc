"""Slices on disk by content hash, for the programs that come after: within a quota, the least recently used go first.

All programs of a user share one directory, and no process owns it:

    slices/<ref>   content and trailer of a kept slice: never written again; its mtime is when it was used last
    used           the bytes that are kept, or more; whoever changes what is kept holds its lock
    qjam-.../      of one node that runs: links to the slices that it uses, and what it is writing now

A node maps its own link, so that a slice stays for it whatever becomes of the name, and others see that it is in use.
The directory of a node that was killed goes when the next one starts.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from typing import NamedTuple, Optional

from qjam_worker.ipc.files import PREFIX, Files, remove

# After the content: a sign, the ref, the size and the CRC of the content. The node cannot compute a ref, which is an
# xxh3 hash, but what was written as one content under one name is found to be that again. CRC-32 is for what disks and
# crashes do, at 4 to 6 GB/s, where the fastest hash of the standard library that a forger could not beat makes 1.4:
# a forger who can write here is the user. The sign ends with that of flat values, for a ref does not tell their layout.
TRAILER = struct.Struct("<8s32sQI")
SIGN = b"keptqjv1"
REF = re.compile(r"[0-9a-f]{32}")
NEW = "new-"  # of a file that is being written
PIECE = 1024 * 1024  # bytes that are read at once: they stay in the processor's cache
PAUSE = 0.005  # seconds between two attempts at a lock
BLOCK = 4096  # what the smallest file takes
# How much of the allowed room is made free beyond what is needed, so that not every slice has to look for more.
EVICTION_SLACK = 16
# The free disk is shared with everybody else: of what would be free without slices, this part may be taken.
DISK_SHARE = 2
# What keeps a file from being read without its being at fault.
SHORTAGES = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOMEM])


class Damaged(OSError):
    """A kept slice was not what had been written, and is removed."""


class Stopped(Exception):
    """There is no time left for this."""


class Room(NamedTuple):
    """What is kept: bytes in all, and the slices that nobody uses as (mtime, bytes, path)."""

    used: int
    idle: list[tuple[int, int, str]]


def default_folder() -> str:
    """Where slices of this user are kept. OSError where nobody tells of a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    cache = named if os.path.isabs(named) else os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        raise FileNotFoundError(errno.ENOENT, "there is no home", cache)
    return os.path.join(cache, "qjam", "data")


class DiskCache:
    """The directory, for one node. `quota`: bytes for all that is kept there. OSError where nothing can be kept."""

    def __init__(self, folder: str, quota: int) -> None:
        self.folder = folder
        self.slices = os.path.join(folder, "slices")
        self.quota = quota
        self.until = math.inf  # what takes longer, by time.monotonic(), is given up
        self._refused: Optional[int] = None  # bytes for which no room could be made
        os.makedirs(os.path.dirname(folder), 0o700, exist_ok=True)
        for path, barred in ((os.path.dirname(folder), 0o022), (folder, 0o077), (self.slices, 0o077)):
            _check_private(path, barred)
        files = Files.make([folder])
        try:
            self._locks = files.lock()
        except OSError:
            files.remove()
            raise
        self._files = files
        self._links = files.directories[0]

    def close(self) -> None:
        """Let go of all slices: they were used until now."""
        with suppress(OSError):
            for name in filter(REF.fullmatch, os.listdir(self._links)):
                os.utime(os.path.join(self._links, name))
        self._files.remove()
        for lock in self._locks:
            os.close(lock)
        self._locks = []

    def __contains__(self, ref: str) -> bool:
        """Whether it looks as if a slice were kept."""
        return REF.fullmatch(ref) is not None and os.path.lexists(self._name(ref))

    def take(self, ref: str) -> Optional[tuple[str, int]]:
        """The path and the size of a slice, all of which has been read and compared; None when it is not kept.

        The file stays as long as this is not closed. Raises Damaged, and Stopped when it is later than `until`.
        """
        name, link = self._name(ref), self._link(ref)
        try:
            os.link(name, link, follow_symlinks=False)
        except FileExistsError:
            pass  # it was used before
        except OSError:
            return None
        try:
            size = self._check(ref, link)
            os.utime(link)
        except OSError as error:
            if error.errno in SHORTAGES:
                return None
            with suppress(OSError):
                if os.path.samestat(os.lstat(name), os.lstat(link)):  # else somebody has kept it anew
                    os.unlink(name)
            remove(link)
            raise Damaged(f"{name} {error}") from error
        return link, size

    def put(self, ref: str, source: str, size: int) -> bool:
        """Keep a copy of the first `size` bytes of a file, if it is still there; False when there is no room.

        Raises OSError when it cannot be written, and Stopped when it is later than `until`.
        """
        with suppress(OSError):  # somebody has kept it already, and now it is in use here too
            os.link(self._name(ref), self._link(ref), follow_symlinks=False)
        if os.path.lexists(self._link(ref)):
            return True
        try:
            content = FileIO(source)  # not mapped: that would count as memory of the user's own process
        except FileNotFoundError:
            return True
        with content:
            return self._copy(ref, content, size)

    def trim(self) -> None:
        """Have what is kept, perhaps under a larger quota, fit in this one."""
        with self._counting() as count:
            self._make_room(count, 0)

    # Files

    def _name(self, ref: str) -> str:
        return os.path.join(self.slices, ref)

    def _link(self, ref: str) -> str:
        return os.path.join(self._links, ref)

    def _check(self, ref: str, path: str) -> int:
        with FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                raise Damaged("is not a file of this user")
            size = status.st_size - TRAILER.size
            if size < 0:
                raise Damaged("is cut short")
            checksum = 0
            for piece in self._pieces(file, size):
                checksum = zlib.crc32(piece, checksum)
            if file.read(TRAILER.size) != TRAILER.pack(SIGN, ref.encode(), size, checksum):
                raise Damaged("is not what was kept under this name")
            return size

    def _copy(self, ref: str, content: FileIO, size: int) -> bool:
        name, new = self._name(ref), os.path.join(self._links, NEW + ref)
        fd = self._begin(new, size + TRAILER.size)
        if fd is None:
            return False
        try:
            with FileIO(fd, "wb") as out:
                checksum = 0
                for piece in self._pieces(content, size):
                    checksum = zlib.crc32(piece, checksum)
                    _write(out, piece)
                _write(out, memoryview(TRAILER.pack(SIGN, ref.encode(), size, checksum)))
            with suppress(FileExistsError):
                os.link(new, name)  # whole or not at all
            os.rename(new, self._link(ref))
        except BaseException:
            remove(new)
            raise
        return True

    def _pieces(self, file: FileIO, size: int) -> Iterator[memoryview]:
        """The next `size` bytes; each piece lasts until the next one."""
        buffer = memoryview(bytearray(min(size, PIECE)))
        while size:
            self._go_on()
            piece = buffer[: file.readinto(buffer[: min(size, PIECE)])]
            if not piece:
                raise Damaged("is cut short")
            size -= len(piece)
            yield piece

    def _go_on(self) -> None:
        if time.monotonic() > self.until:
            raise Stopped

    # Room

    def _begin(self, new: str, size: int) -> Optional[int]:
        """A file that counts from now on; None where there is no room for it."""
        need = _taken(size)
        if self._refused is not None and need >= self._refused:
            return None  # what is in use fills the quota
        with self._counting() as count:
            used = _read(count)
            if used is None or used + need > self._allowed(used):
                used = self._make_room(count, need)
                if used is None:
                    self._refused = need
                    return None
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
            os.ftruncate(fd, size)
            _note(count, used + need)
            return fd

    @contextmanager
    def _counting(self) -> Iterator[int]:
        """The file that holds the count, locked."""
        path = os.path.join(self.folder, "used")
        count = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while not _lock(count):  # who holds it may be stopped
                self._go_on()
                time.sleep(PAUSE)
            yield count
        finally:
            os.close(count)

    def _make_room(self, count: int, need: int) -> Optional[int]:
        """Count anew, and remove what was used least recently until `need` bytes fit; None, and nothing is removed,
        where they cannot. Gives the bytes that are kept then.
        """
        used, idle = self._look()
        allowed = self._allowed(used)
        if used + need > allowed:
            if need and used - sum(size for _, size, _ in idle) + need > allowed:
                _note(count, used)
                return None
            for _, size, path in sorted(idle):
                if used + need <= allowed - (allowed // EVICTION_SLACK):
                    break
                remove(path)
                used -= size
        _note(count, used)
        return used

    def _look(self) -> Room:
        used, idle = 0, []
        for entry in os.scandir(self.slices):
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                taken = _taken(status.st_size)
                used += taken
                if status.st_nlink == 1:
                    idle.append((status.st_mtime_ns, taken, entry.path))
        for entry in os.scandir(self.folder):
            if entry.name.startswith(PREFIX):
                with suppress(FileNotFoundError, NotADirectoryError):
                    for file in os.scandir(entry.path):
                        if file.name.startswith(NEW):
                            used += _taken(file.stat(follow_symlinks=False).st_size)
        return Room(used, idle)

    def _allowed(self, used: int) -> int:
        room = os.statvfs(self.folder)
        return min(self.quota, (used + room.f_bavail * room.f_frsize) // DISK_SHARE)


def _check_private(path: str, barred: int) -> None:
    """Make a directory of this user, or see that it is one, and that it gives nobody else the `barred` rights."""
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & barred:
        raise PermissionError(errno.EACCES, "it must be a directory that is yours alone (mode 700)", path)


def _lock(count: int) -> bool:
    try:
        fcntl.flock(count, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read(count: int) -> Optional[int]:
    text = os.pread(count, 32, 0)
    return int(text) if text.isdigit() else None


def _note(count: int, used: int) -> None:
    os.pwrite(count, b"%d" % used, 0)
    os.ftruncate(count, len(b"%d" % used))


def _write(out: FileIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]
