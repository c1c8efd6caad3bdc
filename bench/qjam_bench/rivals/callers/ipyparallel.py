"""ipyparallel: the load-balanced view; an array of many calls is pushed to all engines once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ipyparallel

from qjam_bench.harness.caller import Caller
from qjam_bench.rivals.ipyparallel import connected

KEPT = "kept"  # the name of the array in an engine


class Ipyparallel(Caller):
    """A client of all engines."""

    def __init__(self, client: Any) -> None:
        """`client`: of a running cluster."""
        self._client = client
        self._view = client.load_balanced_view()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._view.apply_async(function, *arguments)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        found = [handle.get() for handle in handles]
        self._client.purge_local_results(list(handles))  # else the client keeps every result
        return found

    def keep(self, array: Any) -> Any:
        self._client[:].push({KEPT: array}, block=True)
        return ipyparallel.Reference(KEPT)


@contextmanager
def party(workers: int) -> Iterator[Caller]:
    """Run a controller and its engines."""
    with connected(workers) as client:
        yield Ipyparallel(client)
