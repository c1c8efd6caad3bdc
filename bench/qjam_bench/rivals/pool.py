"""multiprocessing.Pool, forked: slices in shared memory, one task per slice; params and results there or in pipes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.pool import Pool as Processes
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import numpy as np

from qjam_bench import ends
from qjam_bench.ends.loops import Round
from qjam_bench.harness.party import ManyWays, Party, parts


class Shared(NamedTuple):
    """Where an array of float64 lies in shared memory."""

    name: str
    start: int
    shape: tuple[int, ...]


class Pool(ManyWays):
    """A pool and its shared memory."""

    def __init__(self, pool: Processes, workers: int, stack: ExitStack) -> None:
        """`stack`: removes the shared memory when it closes."""
        super().__init__()
        self._pool = pool
        self._stack = stack
        self._slices: list[Shared | None] = [None] * workers
        self._blocks: dict[str, SharedMemory] = {}
        self._result: tuple[int, ...] | None = None  # the shape of a result, once one has come

    @property
    def ways(self) -> list[Round]:
        return [
            partial(self._play, params_shared=True, results_shared=True),
            partial(self._play, params_shared=True, results_shared=False),
            partial(self._play, params_shared=False, results_shared=False),
        ]

    def _load(self, data: Any) -> None:
        block = self._block("data", data.shape)
        _array(block)[:] = data
        start = 0
        for index, part in enumerate(parts(data, len(self._slices))):
            self._slices[index] = Shared(block.name, start, part.shape)
            start += part.nbytes

    def _play(self, params: Any, params_shared: bool, results_shared: bool) -> Any:
        given: Any = params
        if params_shared:
            given = self._block("params", params.shape)
            _array(given)[:] = params
        results: list[Shared | None] = [None] * len(self._slices)
        if results_shared and self._result is not None:
            results = [self._block(f"result {index}", self._result) for index in range(len(results))]
        tasks = [(given, part, result) for part, result in zip(self._slices, results, strict=True)]
        total: Any = None
        for answer in self._pool.imap_unordered(_task, tasks):
            array = _array(answer) if isinstance(answer, Shared) else answer
            if total is None:
                total = np.zeros_like(array)
            total += array
        self._result = total.shape
        return total

    def _block(self, purpose: str, shape: tuple[int, ...]) -> Shared:
        """Give shared memory for an array; the same memory again for the same purpose while the array fits."""
        size = 8 * math.prod(shape)
        if purpose not in self._blocks or self._blocks[purpose].size < size:
            self._blocks[purpose] = SharedMemory(create=True, size=size)
            self._stack.callback(self._blocks[purpose].unlink)
        return Shared(self._blocks[purpose].name, 0, shape)


_function: Any = None


def _begin(name: str) -> None:
    global _function
    _function = ends.work(name)


def _task(task: tuple[Any, Shared | None, Shared | None]) -> Any:
    params, part, result = task
    answer = _function(_array(params) if isinstance(params, Shared) else params, part and _array(part))
    if result is None:
        return answer
    _array(result)[:] = answer
    return result


@lru_cache(maxsize=64)
def _attached(name: str) -> SharedMemory:
    return SharedMemory(name)


def _array(shared: Shared) -> Any:
    return np.ndarray(shared.shape, buffer=_attached(shared.name).buf, offset=shared.start)


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run a pool of `workers` processes."""
    resource_tracker.ensure_running()  # one for all processes: separate ones would miss what another process removes
    with ExitStack() as stack:
        pool = stack.enter_context(get_context("fork").Pool(workers, _begin, (function,)))
        yield Pool(pool, workers, stack)
