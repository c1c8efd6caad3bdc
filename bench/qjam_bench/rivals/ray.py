"""Ray: one actor per worker, which keeps its slice; params go by ray.put to the object store, or in the call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray

from qjam_bench import ends
from qjam_bench.ends.loops import Round
from qjam_bench.harness.party import ManyWays, Party, parts


class Worker:
    """The class of the actors."""

    def __init__(self, function: Any) -> None:
        """`function`: f(params, slice), called in every round."""
        self._function = function
        self._part: Any = None

    def load(self, part: Any) -> None:
        """Keep a slice, which is a view of the object store."""
        self._part = part

    def round(self, params: Any) -> Any:
        """Compute one slice's result."""
        return self._function(params, self._part)

    def add(self, one: Any, other: Any) -> Any:
        """Add the results of two actors."""
        return one + other


class Ray(ManyWays):
    """The actors, one per worker."""

    def __init__(self, actors: list[Any]) -> None:
        """`actors`: their handles."""
        super().__init__()
        self._actors = actors

    @property
    def ways(self) -> list[Round]:
        return [
            partial(self._play, put=put, collect=collect)
            for put in (False, True)
            for collect in (self._here, self._tree)
        ]

    def _load(self, data: Any) -> None:
        refs = [ray.put(part) for part in parts(data, len(self._actors))]
        ray.get([actor.load.remote(ref) for actor, ref in zip(self._actors, refs, strict=True)])

    def _play(self, params: Any, put: bool, collect: Any) -> Any:
        given = ray.put(params) if put else params
        return collect([actor.round.remote(given) for actor in self._actors])

    def _here(self, refs: list[Any]) -> Any:
        results = ray.get(refs)
        total = results[0].copy()
        for result in results[1:]:
            total += result
        return total

    def _tree(self, refs: list[Any]) -> Any:
        """Have the actors add up results in pairs, through the object store."""
        actors = self._actors
        while len(refs) > 1:
            pairs = zip(refs[::2], refs[1::2], strict=False)
            odd = refs[-1:] if len(refs) % 2 else []
            refs = [actors[index].add.remote(*pair) for index, pair in enumerate(pairs)] + odd
        return ray.get(refs[0])


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """Run Ray on this machine alone: a cluster of its own, whatever cluster the machine has or had before."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # the future default; set here, it saves a warning
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as folder:  # short: it holds sockets
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run Ray and its actors."""
    with cluster(workers):
        actor = ray.remote(num_cpus=1)(Worker)
        yield Ray([actor.remote(ends.work(function)) for _ in range(workers)])
