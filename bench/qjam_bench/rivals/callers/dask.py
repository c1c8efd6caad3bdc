"""Dask distributed: one process with one thread per worker; an array of many calls is scattered to all once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qjam_bench.harness.caller import Caller
from qjam_bench.rivals.dask import connected


class Dask(Caller):
    """A client."""

    def __init__(self, client: Any) -> None:
        """`client`: of a running cluster."""
        self._client = client

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._client.submit(function, *arguments, pure=False)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        found: list[Any] = self._client.gather(list(handles), direct=True)
        return found

    def keep(self, array: Any) -> Any:
        return self._client.scatter(array, broadcast=True, hash=False)


@contextmanager
def party(workers: int) -> Iterator[Caller]:
    """Run a cluster on this machine."""
    with connected(workers) as client:
        yield Dask(client)
