"""What executors and joblib call in a worker, in the place of the user's function."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Callable, Optional

from .ipc.cores import BLAS_VARIABLES

# How many jobs a nested joblib.Parallel takes n_jobs=-1 for; joblib asks for it at each call.
JOBLIB_CORES = "LOKY_MAX_CPU_COUNT"


def apply_chunk(function: Callable[..., Any], chunk: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of `function(*arguments)` for each of the chunk."""
    return [function(*arguments) for arguments in chunk]


def apply_batch(batch: Callable[[], Any], threads: Optional[int]) -> Any:
    """What a batch of joblib gives. `threads`: how many threads each BLAS and OpenMP may use meanwhile; None: as many
    as the worker may. A nested joblib.Parallel with n_jobs=-1 starts as many threads.
    """
    changed = {} if JOBLIB_CORES in os.environ else {JOBLIB_CORES: str(threads or _share())}
    if threads is not None:
        changed.update(dict.fromkeys((*BLAS_VARIABLES, "NUMBA_NUM_THREADS"), str(threads)))
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        if threads is None:
            return batch()
        with _thread_pools().limit(limits=threads):
            return batch()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _share() -> int:
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() and int(value) else 1


class _Unlimited:
    """Stands for the thread pools of a host without threadpoolctl; those that are loaded later obey the variables."""

    def limit(self, *, limits: int) -> _Unlimited:
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        pass


_found: tuple[int, Any] = (0, None)


def _thread_pools() -> Any:
    """Those that are loaded. Looking for them takes milliseconds, so it is done after imports only."""
    global _found
    if _found[0] != len(sys.modules):
        try:
            import threadpoolctl
        except ImportError:
            return _Unlimited()
        controller = threadpoolctl.ThreadpoolController()
        _found = (len(sys.modules), controller)
    return _found[1]
