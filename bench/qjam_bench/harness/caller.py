"""A party that makes calls: qjam or a rival, with its workers, as `qjam-bench calls` drives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from qjam_bench import ends


class Caller(ABC):
    """A party that is ready for calls; what the loops of ends/calls.py need."""

    def drive(self, loop: Callable[..., Any], *arguments: Any) -> Any:
        """Call a loop of ends/calls.py with this party; give the result."""
        return loop(self, *arguments)

    def work(self, name: str) -> Callable[..., Any]:
        """Give a function of qjam_bench_work."""
        return ends.work(name)

    @abstractmethod
    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Begin a call; give a handle for its result."""

    @abstractmethod
    def gather(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for the results of these calls and give them, in this order."""

    def keep(self, array: Any) -> Any:
        """Give what stands for an array in the arguments of many calls: itself, unless there is a better way."""
        return array


class Futures(Caller):
    """A concurrent.futures.Executor."""

    def __init__(self, executor: Executor) -> None:
        """`executor`: one that somebody else ends."""
        self._executor = executor
        # One python call less in what is measured.
        self.submit = executor.submit  # type: ignore[method-assign, assignment]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._executor.submit(function, *arguments)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.result() for handle in handles]
