"""multiprocessing.Pool, forked: apply_async."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool as Processes
from typing import Any

from qjam_bench.harness.caller import Caller


class Pool(Caller):
    """A pool."""

    def __init__(self, pool: Processes) -> None:
        """`pool`: one that somebody else ends."""
        self._pool = pool

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.apply_async(function, arguments)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.get() for handle in handles]


@contextmanager
def party(workers: int) -> Iterator[Caller]:
    """Run a pool of `workers` processes."""
    with get_context("fork").Pool(workers) as pool:
        yield Pool(pool)
