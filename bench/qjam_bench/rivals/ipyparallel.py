"""ipyparallel: one engine per worker. Slices are pushed once; params go to all by the direct or the broadcast view."""

from __future__ import annotations

import logging
import operator
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Any

import ipyparallel

from qjam_bench import ends
from qjam_bench.ends.loops import Round
from qjam_bench.harness.party import ManyWays, Party, parts

PART = "part"  # the name of its slice in an engine


class Ipyparallel(ManyWays):
    """A client of all engines."""

    def __init__(self, client: Any, function: Any) -> None:
        """`client`: of a running cluster."""
        super().__init__()
        self._client = client
        self._function = function
        self._views = [client[:], client.broadcast_view()]
        client[:].push({PART: None}, block=True)

    @property
    def ways(self) -> list[Round]:
        return [partial(self._play, view) for view in self._views]

    def _load(self, data: Any) -> None:
        ids = self._client.ids
        pushed = [
            self._client[number].push({PART: part}, block=False)
            for number, part in zip(ids, parts(data, len(ids)), strict=True)
        ]
        for one in pushed:
            one.get()

    def _play(self, view: Any, params: Any) -> Any:
        answer = view.apply_async(self._function, params, ipyparallel.Reference(PART))
        results = answer.get()
        self._client.purge_local_results(answer)  # else the client keeps every result
        return reduce(operator.add, results)


@contextmanager
def connected(workers: int) -> Iterator[Any]:
    """Run a controller and its engines; yield their client."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qjam-bench-"))
        cluster = ipyparallel.Cluster(n=workers, profile_dir=folder, log_level=logging.ERROR)
        client = stack.enter_context(cluster)
        client.wait_for_engines(workers, interactive=False)
        yield client


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run a controller and its engines."""
    with connected(workers) as client:
        yield Ipyparallel(client, ends.work(function))
