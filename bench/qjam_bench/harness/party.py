"""A party: qjam or a rival, with its workers, as the experiments drive it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from qjam_bench.ends.loops import Round

TRIAL_S = 0.3  # seconds for each way of a party
TRIAL_ROUNDS = 1, 100  # rounds of each way: at least, however long they take; at most
HOPELESS = 5  # a way whose first round takes this many times the best median is not tried further


class Party(ABC):
    """A party that is ready. It cuts data by rows into one slice per worker."""

    def load(self, data: Any) -> float:
        """Send the slices of a (rows, columns) float64 array to the workers; give the seconds.

        A party may leave the sending to its first round.
        """
        began = time.perf_counter()
        self._load(data)
        return time.perf_counter() - began

    def drive(self, loop: Callable[..., Any], *arguments: Any) -> Any:
        """Call a loop of ends/loops.py with this party's round, where its rounds start; give the result.

        The first of `arguments` is params; all rounds of the loop have params of that size.
        """
        return loop(self.round, *arguments)

    def first(self, params: Any) -> Any:
        """Give the answer of a first round, without a trial before it."""
        return self.round(params)

    @abstractmethod
    def _load(self, data: Any) -> None: ...

    @abstractmethod
    def round(self, params: Any) -> Any:
        """Give the sum over all workers of f(params, slice); the slice is None if no data was loaded."""


class ManyWays(Party):
    """A party that can do a round in several ways, and uses the fastest one.

    The first round with params of a new size holds a trial of all ways.
    """

    def __init__(self) -> None:
        """A subclass defines `ways`."""
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
    """Give the way with the smallest median. The first round of a way counts only if it was hopelessly slow."""
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
    """Cut `data` by rows into one view per worker."""
    return np.array_split(data, workers)
