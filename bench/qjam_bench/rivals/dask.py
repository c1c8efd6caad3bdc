"""Dask distributed: one process with one thread per worker; each slice is scattered once and pinned to its worker."""

from __future__ import annotations

import logging
import operator
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Any

import dask
from distributed import Client, LocalCluster, wait

from qjam_bench import ends
from qjam_bench.ends.loops import Round
from qjam_bench.harness.party import ManyWays, Party, parts

# Less work for idle workers: 16 of them took 45 % of a core, which made their own rounds no faster.
QUIET = {
    "distributed.admin.tick.interval": "1 s",
    "distributed.admin.system-monitor.interval": "10 s",
    "distributed.worker.profile.enabled": False,
}
LARGE = 4 << 20  # bytes of params in a task from which Dask warns


class Dask(ManyWays):
    """A Dask client and the addresses of its workers."""

    def __init__(self, client: Any, function: Any) -> None:
        """`client`: of a running cluster."""
        super().__init__()
        self._client = client
        self._function = function
        self._addresses = list(client.scheduler_info(n_workers=-1)["workers"])
        self._slices: list[Any] = [None] * len(self._addresses)

    @property
    def ways(self) -> list[Round]:
        return [self._embedded, partial(self._scattered, tree=False), partial(self._scattered, tree=True)]

    def _load(self, data: Any) -> None:
        pinned = zip(self._addresses, parts(data, len(self._addresses)), strict=True)
        scatter = partial(self._client.scatter, hash=False, direct=True)
        self._slices = [scatter(part, workers=[address]) for address, part in pinned]
        wait(self._slices)

    def _embedded(self, params: Any) -> Any:
        """Put the params into each task; scatter them if they are too large for that."""
        if params.nbytes >= LARGE:
            return self._scattered(params, tree=False)
        return reduce(operator.add, self._gather(self._map(params)))

    def _scattered(self, params: Any, tree: bool) -> Any:
        given = self._client.scatter(params, broadcast=True, hash=False, direct=True)
        futures = self._map(given)
        while tree and len(futures) > 1:
            pairs = list(zip(futures[::2], futures[1::2], strict=False))
            odd = futures[-1:] if len(futures) % 2 else []
            futures = [self._client.submit(operator.add, *pair, pure=False) for pair in pairs] + odd
        return reduce(operator.add, self._gather(futures))

    def _map(self, params: Any) -> list[Any]:
        submit = partial(self._client.submit, self._function, params, pure=False)
        return [submit(part, workers=[address]) for address, part in zip(self._addresses, self._slices, strict=True)]

    def _gather(self, futures: list[Any]) -> list[Any]:
        found: list[Any] = self._client.gather(futures, direct=True)
        return found


@contextmanager
def connected(workers: int) -> Iterator[Any]:
    """Run a cluster on this machine, without its dashboard; yield its client."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qjam-bench-"))
        stack.enter_context(dask.config.set({"temporary-directory": folder, **QUIET}))
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                memory_limit=None,
                silence_logs=logging.CRITICAL,
            )
        )
        yield stack.enter_context(Client(cluster))


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run a cluster."""
    with connected(workers) as client:
        yield Dask(client, ends.work(function))
