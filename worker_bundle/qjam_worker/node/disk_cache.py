"""Slices on disk by content hash, for later programs. Within a quota, the least recently used go first.

All programs of a user share one directory, and no process owns it:

    slices/<ref>   a slice: content and trailer; it is never written again, and its mtime is when it was last used
    used           how many bytes the slices take, or more; a process that adds or removes slices holds its lock
    qjam-.../      the directory of one running node: links to the slices that it uses, and files that it is writing

A node maps its own link: the slice stays for it even if another process removes the name, and the link count tells
others that it is in use. When a node starts, it removes the directories of nodes that were killed.
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

# The trailer follows the content: a sign, the ref, the size and the CRC of the content. A node cannot check the ref
# itself, which is an xxh3 hash. CRC-32 finds what disks and crashes damage, at 4 to 6 GB/s; the fastest cryptographic
# hash of the standard library makes 1.4 GB/s, and only the user could forge a file here. The sign ends with the version
# of the layout of flat values, which the ref does not tell.
TRAILER = struct.Struct("<8s32sQI")
SIGN = b"keptqjv1"
REF = re.compile(r"[0-9a-f]{32}")
NEW = "new-"  # prefix of a file that is being written
PIECE = 1024 * 1024  # bytes that are read at once: they fit into the processor's cache
PAUSE = 0.005  # seconds between two attempts to lock a file
BLOCK = 4096  # bytes that the smallest file takes
# One part in so many of the quota is freed beyond what is needed, so that not every slice has to evict others.
EVICTION_SLACK = 16
# Slices may take one part in so many of what would be free without them: others need the disk too.
DISK_SHARE = 2
# Errors of open and read that are not the fault of the file.
SHORTAGES = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOMEM])


class Damaged(OSError):
    """A slice on disk was not what had been written; it was removed."""


class Stopped(Exception):
    """The time for this is up."""


class Room(NamedTuple):
    """The bytes that are taken in all, and the slices that nobody uses, as (mtime, bytes, path)."""

    used: int
    idle: list[tuple[int, int, str]]


def default_folder() -> str:
    """The directory for slices of this user. OSError if the home directory is unknown."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    cache = named if os.path.isabs(named) else os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        raise FileNotFoundError(errno.ENOENT, "there is no home", cache)
    return os.path.join(cache, "qjam", "data")


class DiskCache:
    """The directory as one node uses it. `quota`: bytes for all slices there. OSError if it cannot be used."""

    def __init__(self, folder: str, quota: int) -> None:
        self.folder = folder
        self.slices = os.path.join(folder, "slices")
        self.quota = quota
        self.until = math.inf  # by time.monotonic(); reads and writes raise Stopped after it
        self._refused: Optional[int] = None  # a slice of so many bytes found no room
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
        """Unlink all slices, which were used until now."""
        with suppress(OSError):
            for name in filter(REF.fullmatch, os.listdir(self._links)):
                os.utime(os.path.join(self._links, name))
        self._files.remove()
        for lock in self._locks:
            os.close(lock)
        self._locks = []

    def __contains__(self, ref: str) -> bool:
        """Whether there is a file for the slice; `take` may find that it is damaged."""
        return REF.fullmatch(ref) is not None and os.path.lexists(self._name(ref))

    def release(self, ref: str) -> None:
        """This node uses a slice no longer, and was the last to use it: others may evict it."""
        if REF.fullmatch(ref):
            with suppress(OSError):
                os.utime(self._link(ref))
            remove(self._link(ref))

    def take(self, ref: str) -> Optional[tuple[str, int]]:
        """The path and the size of a slice, after all of it was read and checked; None if it is not here.

        The file stays until `close`. Raises Damaged, and Stopped after `until`.
        """
        name, link = self._name(ref), self._link(ref)
        try:
            os.link(name, link, follow_symlinks=False)
        except FileExistsError:
            pass  # this node has used it before
        except OSError:
            return None
        try:
            size = self._check(ref, link)
            os.utime(link)
        except OSError as error:
            if error.errno in SHORTAGES:
                return None
            with suppress(OSError):
                if os.path.samestat(os.lstat(name), os.lstat(link)):  # else another process has written it anew
                    os.unlink(name)
            remove(link)
            raise Damaged(f"{name} {error}") from error
        return link, size

    def put(self, ref: str, source: str, size: int) -> bool:
        """Copy the first `size` bytes of a file, if that still exists, to disk; False if there is no room.

        Raises OSError if it cannot be written, and Stopped after `until`.
        """
        with suppress(OSError):  # if another process has written it already, this node uses it too
            os.link(self._name(ref), self._link(ref), follow_symlinks=False)
        if os.path.lexists(self._link(ref)):
            return True
        try:
            content = FileIO(source)  # not mapped: a map would count as memory of the user's own process
        except FileNotFoundError:
            return True
        with content:
            return self._copy(ref, content, size)

    def trim(self) -> None:
        """Remove slices until all fit into this quota: programs before may have had a larger one."""
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
        """Yields the next `size` bytes in pieces; each one is valid until the next."""
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
        """The descriptor of a new file, whose size counts from now on; None if there is no room for it."""
        need = _taken(size)
        if self._refused is not None and need >= self._refused:
            return None  # slices in use fill the quota
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
        """The descriptor of the file `used`, locked."""
        path = os.path.join(self.folder, "used")
        count = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while not _lock(count):  # the process that holds it may be stopped
                self._go_on()
                time.sleep(PAUSE)
            yield count
        finally:
            os.close(count)

    def _make_room(self, count: int, need: int) -> Optional[int]:
        """Count anew, and remove the least recently used slices until `need` bytes fit. Gives the bytes that are taken
        then; None, with nothing removed, if `need` bytes cannot fit.
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
    """Make the directory, or check that it is this user's and gives nobody else the `barred` rights."""
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
