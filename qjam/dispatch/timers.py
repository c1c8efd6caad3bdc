"""Moments to come, each under a key: set, moved and taken back in O(log n), the first one known at once."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K", int, str)


class Timers(Generic[K]):
    """A heap whose entries are not looked for when they are moved: what is out of date is dropped when it comes up."""

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, K]] = []

    def __repr__(self) -> str:
        return f"<Timers: {self._at}>"

    def __len__(self) -> int:
        return len(self._at)

    def get(self, key: K) -> float | None:
        """When this one is due."""
        return self._at.get(key)

    def set(self, key: K, at: float) -> None:
        """Have this one come at that moment, and not at the one that it was set for before."""
        self._at[key] = at
        heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._at) + 64:
            self._heap = [(at, key) for key, at in self._at.items()]
            heapify(self._heap)

    def drop(self, key: K) -> None:
        """It will not come."""
        self._at.pop(key, None)

    @property
    def first(self) -> float | None:
        """The earliest moment."""
        heap, at = self._heap, self._at
        while heap:
            if at.get(heap[0][1]) == heap[0][0]:
                return heap[0][0]
            heappop(heap)
        return None

    def due(self, now: float) -> list[K]:
        """Those whose moment has come, the earliest first; they are set no longer."""
        found = []
        while (first := self.first) is not None and first <= now:
            key = heappop(self._heap)[1]
            del self._at[key]
            found.append(key)
        return found
