"""Memory maps of files in /dev/shm, and huge pages (2 MiB) for them where the kernel can give some.

Files of 4 KiB pages are slow: on Linux 6.18, 512 MiB in /dev/shm took 135 ms to reserve, 80 ms to fill with pwrite, and
38 ms of page faults in each reader. With huge pages it took 30 ms, 27 ms through a map, and no time. They need Linux
6.1 or newer, but no setting and no privileges; without them everything works, only slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
import weakref
from functools import partial
from typing import Any, Optional

LARGE = 2 * 1024 * 1024
# Seconds per byte that huge pages may take: what small pages cost to reserve, fill and read.
SLOW = 0.5e-9
# Seconds that they may take beyond that: a few slow huge pages cost less than small pages for the whole file.
SLACK = 10e-3
# Seconds without another attempt after they took longer.
REST = 1.0
MAX_PAGES_PER_CALL = 8  # of madvise; few large calls are best, as each one flushes the page lists of all CPUs
# Freed bytes that malloc keeps for reuse: twice as many as messages in flight may take.
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
    _unmap = _libc["munmap"]  # another instance, with the third argument that a weakref callback gets
    _unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.py_object]
_resting_until = 0.0
_FAILED = ctypes.c_void_p(-1).value


def map_shared(fd: int, size: int, write: bool = False, offset: int = 0) -> memoryview:
    """Map `size` bytes of a file from `offset` (a multiple of LARGE) on. The map lives as long as views of it do.
    Raises OSError.

    A map of LARGE bytes or more starts at a multiple of LARGE, as huge pages need; python's own maps do not, and each
    keeps a file descriptor open.
    """
    if _libc is None or size < LARGE:
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
        return memoryview(mmap.mmap(fd, max(size, 1), access=access, offset=offset))[:size]
    import numpy as np  # not at the top: the node first checks that this host's numpy can be imported

    return np.asarray(_Map(_map_aligned(fd, size, write, offset), size, write)).data


class _Map:
    """Owns a map and unmaps it. Not a ctypes buffer: arrays over a read-only one could be made writable, and writing to
    them would be a SIGSEGV. Not __del__: a KeyboardInterrupt in it is lost, while this weak reference calls C only.
    """

    def __init__(self, address: int, size: int, write: bool) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, not write), "shape": (size,), "typestr": "|u1"}
        self._unmap = weakref.ref(self, partial(_unmap, address, size))


def _map_aligned(fd: int, size: int, write: bool, offset: int) -> int:
    """Map a file at a multiple of LARGE; returns the address."""
    if os.fstat(fd).st_size < offset + size:  # to read beyond the end of the file is a SIGBUS
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
    """Back a new file in shared memory with huge pages, as many as fit into `size` bytes; returns whether it has them.

    The caller still has to reserve the rest. Huge pages can be slow: the kernel may have to move memory first, or a
    hypervisor has taken free memory back. Then this function makes no more of them for REST seconds.
    """
    global _resting_until
    whole = size // LARGE * LARGE
    if _libc is None or not whole or time.monotonic() < _resting_until:
        return False
    os.ftruncate(fd, size)
    start, count, spent, patience = 0, 1, 0.0, SLACK
    while start < whole:
        length = min(count * LARGE, whole - start)
        for offset in range(start, start + length, LARGE):  # the kernel collapses no empty range
            os.pwrite(fd, b"\0", offset)
        view = map_shared(fd, length, write=True, offset=start)  # a part at a time: this may be the user's process
        began = time.thread_time()
        if _libc.madvise(ctypes.addressof(ctypes.c_ubyte.from_buffer(view)), length, _MADV_COLLAPSE):
            return False
        spent, patience = spent + time.thread_time() - began, patience + SLOW * length
        if spent > patience:
            _resting_until = time.monotonic() + REST
            return False
        start, count = start + length, min(2 * count, MAX_PAGES_PER_CALL)
    return True


def write(fd: int, data: memoryview, offset: int) -> int:
    """As os.pwrite, for files in huge pages: through a map it takes a third of the time."""
    start = offset // LARGE * LARGE
    map_shared(fd, offset + len(data) - start, write=True, offset=start)[offset - start :] = data
    return len(data)


def keep_freed() -> None:
    """Make malloc in this process reuse freed memory for large values, in place of returning it to the kernel.

    Otherwise each message of 4 MiB costs ZeroMQ's thread page faults for all of it: 512 MiB over TCP took 270 ms, and
    take 234 ms with this. In workers the same goes for the arrays that a mapfunc makes in each round: the autoencoder
    took 71 or 40 ms for 50,000 patches, depending on the layout of the heap.
    """
    mallopt = getattr(_libc, "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEPT)
        mallopt(_M_TRIM_THRESHOLD, KEPT)
