"""How many cores this process may use, and how many of them the BLAS of each worker may use."""

from __future__ import annotations

import os

BLAS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

# 2^18 cycles: how long OpenBLAS's threads spin before they sleep. By default they burn 50 ms of a core when numpy is
# imported, before there is anything to do; products of 400x400 and 2,000x2,000 matrices are as fast so.
OPENBLAS_SPIN = {"OPENBLAS_THREAD_TIMEOUT": "18"}


def usable_cores() -> int:
    """How many cores this process may run on, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_environment(workers: int) -> dict[str, str]:
    """The environment of workers: each BLAS gets its share of the cores, unless the user has set its variable."""
    share = str(max(1, usable_cores() // workers))
    return {**dict.fromkeys(BLAS_VARIABLES, share), **OPENBLAS_SPIN, **os.environ}
