"""Ray: a task for each call; an array of many calls is put once into the object store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from qjam_bench.harness.caller import Caller
from qjam_bench.rivals.ray import cluster


class Ray(Caller):
    """The remote functions of a cluster."""

    def __init__(self) -> None:
        """No function is known yet."""
        self._remote: dict[Callable[..., Any], Any] = {}

    def work(self, name: str) -> Callable[..., Any]:
        function = super().work(name)
        if function not in self._remote:
            self._remote[function] = ray.remote(num_cpus=1)(function)
        found: Callable[..., Any] = self._remote[function].remote
        return found

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        found: list[Any] = ray.get(list(handles))
        return found

    def keep(self, array: Any) -> Any:
        return ray.put(array)


@contextmanager
def party(workers: int) -> Iterator[Caller]:
    """Run Ray on this machine alone."""
    with cluster(workers):
        yield Ray()
