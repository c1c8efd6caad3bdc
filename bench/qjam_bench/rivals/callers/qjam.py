"""qjam itself: qjam.Executor, on this machine or on ssh hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import qjam
from qjam_bench.harness.caller import Caller, Futures
from qjam_bench.rivals.qjam import shipped


class Qjam(Futures):
    """An executor, and the functions as a module of the user's."""

    def __init__(self, executor: Executor, module: Any) -> None:
        """`module`: one that qjam sends to the workers."""
        super().__init__(executor)
        self._module = module

    def work(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(self._module, name)
        return found


@contextmanager
def party(workers: int, hosts: list[dict[str, Any]] | None = None, config: str | None = None) -> Iterator[Caller]:
    """Run an executor with `workers` local workers, or with these hosts: each the arguments of a HostSpec."""
    where: Any = [qjam.HostSpec(**host) for host in hosts] if hosts else workers
    options: dict[str, Any] = {"ssh_config": config} if config else {}
    with shipped() as module, qjam.Executor(where, **options) as executor:
        yield Qjam(executor, module)
