"""Memory maps of shared files, and large pages for them where the kernel gives some.

A file of 4 KiB pages costs far more to make than to fill: on Linux 6.18, 512 MiB in /dev/shm took 135 ms to reserve,
80 ms to fill with pwrite and 38 ms to fault in at each reader. With pages of 2 MiB it is 30 ms, 27 ms through a map,
and nothing. They need no setting and no rights, only a kernel from 6.1 on; where they cannot be had all goes as before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
import weakref
from functools import partial
from typing import Any, Optional

LARGE = 2 * 1024 * 1024
# Seconds a byte that large pages may take: as long as small ones take to be made, filled and found by a reader.
SLOW = 0.5e-9
# Seconds that they may take beyond that: a few slow ones among others cost less than small ones instead of all.
SLACK = 10e-3
# Seconds for which no more of them are asked for when they took longer.
REST = 1.0
# Bytes that are worth a second thread: two make 512 MiB in 20 ms, one in 35.
WORTH_A_THREAD = 16 * 1024 * 1024
MOST_AT_ONCE = 8  # pages in one call, for each call has all processors hand in what they have set aside
# Bytes that a process whose messages come in chunks keeps when they are freed: as many as may be on their way, twice.
KEPT = 32 * 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MADV_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED = 0x10


def _functions() -> Any:
    if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


_libc = _functions()
_unmap: Any = None
if _libc is not None:
    _unmap = _libc["munmap"]  # once more, for it gets the weak reference as well
    _unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.py_object]
_resting_until = 0.0
_FAILED = ctypes.c_void_p(-1).value


def map_shared(fd: int, size: int, write: bool = False, offset: int = 0) -> memoryview:
    """So many bytes of a file, from a multiple of LARGE on, as a memory map, which lives as long as views of it do.
    Raises OSError.

    Where large pages can lie it begins at a multiple of them; python's own maps do not, and keep a descriptor each.
    """
    if _libc is None or size < LARGE:
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
        return memoryview(mmap.mmap(fd, max(size, 1), access=access, offset=offset))[:size]
    import numpy as np  # not before it is looked whether the host's own numpy can be imported

    return np.asarray(_Map(_map_aligned(fd, size, write, offset), size, write)).data


class _Map:
    """Owns a map. Memory that ctypes owns would not do: arrays over it can be made writable, and then to write to them
    is a SIGSEGV. Nor would __del__, in which a KeyboardInterrupt is lost: what is called here is C alone.
    """

    def __init__(self, address: int, size: int, write: bool) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, not write), "shape": (size,), "typestr": "|u1"}
        self._unmap = weakref.ref(self, partial(_unmap, address, size))


def _map_aligned(fd: int, size: int, write: bool, offset: int) -> int:
    """The address of a map that begins at a multiple of LARGE."""
    if os.fstat(fd).st_size < offset + size:  # a page beyond the end is a SIGBUS
        raise ValueError(f"the file has less than {offset + size} bytes")
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    room = _checked(_libc.mmap(None, size + LARGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
    start = -(-room // LARGE) * LARGE
    mapped = None
    try:
        mapped = _checked(_libc.mmap(start, size, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, offset))
    finally:
        end = start if mapped is None else -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        for first, after in ((room, start), (end, room + size + LARGE)):
            if after > first:
                _libc.munmap(first, after - first)
    return mapped


def _checked(address: Optional[int]) -> int:
    if address is None or address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address


def make_large(fd: int, size: int) -> bool:
    """Whether a new file in shared memory now has large pages, as far as whole ones fit into `size` bytes.

    Those that lack are still to be reserved. Large pages may be slow to come: memory is in pieces that have to be moved
    first, or a hypervisor has taken free memory back, of which large pages find more than small ones do. Then it is
    left at that for a while.
    """
    whole = size // LARGE * LARGE
    if _libc is None or not whole or time.monotonic() < _resting_until:
        return False
    os.ftruncate(fd, size)
    if whole < WORTH_A_THREAD:
        return _collapse(fd, 0, whole)
    half = whole // 2 // LARGE * LARGE
    try:
        other = _Half(fd, half, whole)
        other.start()
    except (OSError, RuntimeError):  # no room for a thread or its descriptor: memory_limit, ulimit
        return _collapse(fd, 0, whole)
    try:
        made = _collapse(fd, 0, half)
    finally:
        other.join()
    return made and other.made


class _Half(threading.Thread):
    """Makes the large pages of one half of a file, by a descriptor of its own: who waits may be interrupted."""

    def __init__(self, fd: int, start: int, stop: int) -> None:
        super().__init__(name="qjam-pages", daemon=True)
        self.made = False
        self._fd, self._part = fd, (start, stop)

    def start(self) -> None:
        self._fd = os.dup(self._fd)
        try:
            super().start()
        except RuntimeError:
            os.close(self._fd)
            raise

    def run(self) -> None:
        try:
            self.made = _collapse(self._fd, *self._part)
        except OSError:  # whoever reserves what lacks hears of it
            pass
        finally:
            os.close(self._fd)


def _collapse(fd: int, start: int, stop: int) -> bool:
    global _resting_until
    count, spent, patience = 1, 0.0, SLACK
    while start < stop:
        length = min(count * LARGE, stop - start)
        for offset in range(start, start + length, LARGE):  # an empty stretch is not collapsed
            os.pwrite(fd, b"\0", offset)
        view = map_shared(fd, length, write=True, offset=start)  # not all of it: this may be the user's own process
        began = time.thread_time()
        if _libc.madvise(ctypes.addressof(ctypes.c_ubyte.from_buffer(view)), length, _MADV_COLLAPSE):
            return False
        spent, patience = spent + time.thread_time() - began, patience + SLOW * length
        if spent > patience:
            _resting_until = time.monotonic() + REST
        if time.monotonic() < _resting_until:
            return False
        start, count = start + length, min(2 * count, MOST_AT_ONCE)
    return True


def write(fd: int, data: memoryview, offset: int) -> int:
    """As os.pwrite, for files in large pages: through a map of the place, a third of the time of the system call."""
    start = offset // LARGE * LARGE
    map_shared(fd, offset + len(data) - start, write=True, offset=start)[offset - start :] = data
    return len(data)


def keep_freed() -> None:
    """Have this process use the memory that large values have left for the next ones.

    Else ZeroMQ's thread faults in each message of 4 MiB anew, page by page: 512 MiB over TCP took 270 ms so, and take
    234 ms now. In a worker it is the arrays that a mapfunc makes in each round: the autoencoder took 71 or 40 ms for
    50,000 patches, by how the heap happened to lie.
    """
    mallopt = getattr(_libc, "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEPT)
        mallopt(_M_TRIM_THRESHOLD, KEPT)
