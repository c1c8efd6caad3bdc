"""What is measured: one party with its workers, whoever it is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from qjam_bench.ends.loops import Round

TRIAL_S = 0.3  # for each way of a party
TRIAL_ROUNDS = 1, 100  # at least, however long they take, and at most
HOPELESS = 5  # times as long as another way: no need to see more


class Party(ABC):
    """A party that is ready. All of them cut data by rows into as many slices as there are workers."""

    def load(self, data: Any) -> float:
        """Put the slices of a (rows, columns) float64 array at the workers, once; give the seconds that took.

        A party may leave some of it to the first round.
        """
        began = time.perf_counter()
        self._load(data)
        return time.perf_counter() - began

    def drive(self, loop: Callable[..., Any], *arguments: Any) -> Any:
        """Give loop(round, *arguments), a loop of ends/loops.py, called where this party's rounds start.

        The first argument is params of the size that all its rounds have.
        """
        return loop(self.round, *arguments)

    def first(self, params: Any) -> Any:
        """Give the first round's answer, without any trial before it."""
        return self.round(params)

    @abstractmethod
    def _load(self, data: Any) -> None: ...

    @abstractmethod
    def round(self, params: Any) -> Any:
        """Give the sum over all workers of f(params, slice); without data the slice is None."""


class ManyWays(Party):
    """A party that can do a round in several ways, and does it in the one that a trial has found the fastest.

    The trial is held anew for params of another size, in the first round with them.
    """

    def __init__(self) -> None:
        """A subclass has `ways`."""
        self._best: tuple[int, Round] | None = None

    @property
    @abstractmethod
    def ways(self) -> list[Round]:
        """The ways to do a round."""

    def first(self, params: Any) -> Any:
        return self.ways[0](params)

    def round(self, params: Any) -> Any:
        if self._best is None or self._best[0] != params.nbytes:
            self._best = params.nbytes, fastest(self.ways, params)
        return self._best[1](params)


def fastest(ways: list[Round], params: Any) -> Round:
    """Give the way with the smallest median. The first round of each does not count, unless that was far behind."""
    medians: list[float] = []
    for way in ways:
        first = _seconds(way, params)
        hopeless = bool(medians) and first > HOPELESS * min(medians)
        medians.append(first if hopeless else _trial(way, params))
    return ways[int(np.argmin(medians))]


def _trial(way: Round, params: Any) -> float:
    fewest, most = TRIAL_ROUNDS
    taken: list[float] = []
    stop = time.perf_counter() + TRIAL_S
    while len(taken) < most and (len(taken) < fewest or time.perf_counter() < stop):
        taken.append(_seconds(way, params))
    return float(np.median(taken))


def _seconds(way: Round, params: Any) -> float:
    began = time.perf_counter()
    way(params)
    return time.perf_counter() - began


def parts(data: Any, workers: int) -> list[Any]:
    """Give views of the slices of `data`, one a worker."""
    return np.array_split(data, workers)
