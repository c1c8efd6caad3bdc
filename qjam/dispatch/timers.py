"""Timers by key: set, moved and cancelled in O(log n), the first one known at once."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K", int, str)


class Timers(Generic[K]):
    """A heap in which nothing is searched: an entry that is out of date is dropped when it comes to the top."""

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, K]] = []

    def __repr__(self) -> str:
        return f"<Timers: {self._at}>"

    def __len__(self) -> int:
        return len(self._at)

    def get(self, key: K) -> float | None:
        """When the timer is due."""
        return self._at.get(key)

    def set(self, key: K, at: float) -> None:
        """Set the timer, or move it."""
        self._at[key] = at
        heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._at) + 64:
            self._heap = [(at, key) for key, at in self._at.items()]
            heapify(self._heap)

    def drop(self, key: K) -> None:
        """Cancel the timer."""
        self._at.pop(key, None)

    @property
    def first(self) -> float | None:
        """When the first one is due."""
        heap, at = self._heap, self._at
        while heap:
            if at.get(heap[0][1]) == heap[0][0]:
                return heap[0][0]
            heappop(heap)
        return None

    def due(self, now: float) -> list[K]:
        """The timers that are due, the earliest first; they are set no longer."""
        found = []
        while (first := self.first) is not None and first <= now:
            key = heappop(self._heap)[1]
            del self._at[key]
            found.append(key)
        return found
