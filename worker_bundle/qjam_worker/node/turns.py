"""Whose turn it is among the rounds of a node, without a walk through those that have nothing to do here."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from typing import Optional

from .rounds import NodeRound


class Turns:
    """The rounds that may have work for a worker, the oldest first. One that turns out to have none is left out until
    something happens to it (`stir`).
    """

    def __init__(self, rounds: Mapping[int, NodeRound]) -> None:
        self._rounds = rounds
        self._heap: list[tuple[float, int]] = []  # when each began, and its number
        self._known: set[int] = set()  # those in the heap

    def stir(self, round_: NodeRound) -> None:
        """The round may have work now."""
        if round_.number not in self._known:
            self._known.add(round_.number)
            heappush(self._heap, (round_.began, round_.number))

    def __bool__(self) -> bool:
        """Whether any round has work."""
        while self._heap:
            round_ = self._rounds.get(self._heap[0][1])
            if round_ is not None and round_.has_work:
                return True
            self._known.discard(heappop(self._heap)[1])
        return False

    def take(self) -> Optional[NodeRound]:
        """The next round that has work; it is left out until it is stirred."""
        if not self:
            return None
        number = heappop(self._heap)[1]
        self._known.discard(number)
        return self._rounds[number]
