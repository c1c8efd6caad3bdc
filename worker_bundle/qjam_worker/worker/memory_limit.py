"""The option memory_limit: how much private memory a worker may allocate, enforced by the kernel (RLIMIT_DATA)."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
from typing import Optional

import numpy as np

# Bytes beyond the limit for the worker's own code: it has to report an error after user code has taken all it may.
RESERVE = 32 * 1024 * 1024
HIGHEST = 2**62
# A product of matrices of this size makes BLAS start its threads and take its buffers. If it cannot get them later, it
# waits for ever.
BLAS_SIZE = 400


class MemoryLimit:
    """Lets user code allocate `limit` bytes of private memory beyond what this process has now; None: no limit.

    The kernel refuses more, so Python and numpy raise MemoryError. Shared maps (slices, params) do not count. Child
    processes of user code inherit the limit: each may take as much.
    """

    def __init__(self, limit: Optional[int]) -> None:
        self.limit = limit or 0
        self.holds = False
        self._held = self._relaxed = (0, 0)
        self._fresh = 0
        if limit is not None:
            self._begin(limit)

    def _begin(self, limit: int) -> None:
        square = np.ones((BLAS_SIZE, BLAS_SIZE))
        np.dot(square, square)
        del square
        self._fresh = _taken()
        if not self._fresh:
            _tell(f"memory_limit is not kept on {sys.platform}")
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = min([HIGHEST, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)])
        self._held = min(most, self._fresh + limit), hard
        self._relaxed = min(most, self._fresh + limit + RESERVE), hard
        self.holds = True
        self.relax()
        if _can_take(limit + RESERVE + mmap.PAGESIZE):
            _tell("memory_limit is not kept here: Linux before 4.7 counts only a part of a process's memory")

    def hold(self) -> None:
        """User code is about to run."""
        if self.holds:
            _set(self._held)

    def relax(self) -> None:
        """User code has ended: the worker's own code may take RESERVE more."""
        if self.holds:
            _set(self._relaxed)

    def come_back(self) -> bool:
        """Return freed memory to the system; whether half of the limit is free then. It is not if user code keeps
        references, or the heap is fragmented. Imported modules count too, and may keep their part.
        """
        if not self.holds or self._is_back():
            return True
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        return self._is_back()

    def _is_back(self) -> bool:
        return _taken() - self._fresh < self.limit // 2


def _set(limits: tuple[int, int]) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    except (OSError, ValueError):  # user code has lowered the hard limit, which only root can raise
        pass


def _taken() -> int:
    """The bytes of this process that count; 0 if /proc does not say."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return 0


def _can_take(size: int) -> bool:
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError):
        return False
    return True


def _tell(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201  the master shows it
