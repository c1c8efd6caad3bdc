"""Which data the program still holds: hosts need not keep the slices of what nobody holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any


class Lease:
    """The slices of data that somebody holds, until `held` is False. `key`: their hashes in order. `nbytes`: in all."""

    __slots__ = ("held", "key", "nbytes")

    def __init__(self, key: tuple[str, ...], nbytes: int, held: bool = True) -> None:
        self.key, self.nbytes, self.held = key, nbytes, held


# Called when a lease ends, with whether that is to count at once. In any thread, also by the garbage collector, which
# may interrupt anything: it must neither block nor take a lock.
LetGo = Callable[[Lease, bool], None]


class Leases:
    """The leases of one Master, by who holds them: data sets, and arrays that were passed to it as they are."""

    def __init__(self, let_go: LetGo) -> None:
        self._let_go = let_go
        self._leases: dict[int, tuple[weakref.ref[Any], Lease]] = {}  # by the id of the holder
        _all.add(self)

    def of(self, holder: Any, refs: list[str], size: Callable[[], int]) -> Lease:
        """The lease of a holder of slices with these hashes, `size()` bytes in all. It ends when the holder dies, or
        has other slices.
        """
        key, place = tuple(refs), id(holder)
        known = self._leases.get(place)
        if known is not None and known[0]() is holder:
            if known[1].key == key:
                return known[1]
            self._end(known[1], False)
        lease = Lease(key, size())
        self._leases[place] = weakref.ref(holder, partial(_on_death, weakref.ref(self), place, lease)), lease
        return lease

    def release(self, holder: Any) -> None:
        """End the lease of a holder at once."""
        known = self._leases.get(id(holder))
        if known is not None and known[0]() is holder:
            del self._leases[id(holder)]
            self._end(known[1], True)

    def _end(self, lease: Lease, at_once: bool) -> None:
        lease.held = False
        self._let_go(lease, at_once)

    def forget(self, place: int, lease: Lease) -> None:
        """The holder has died."""
        known = self._leases.get(place)
        if known is not None and known[1] is lease:
            del self._leases[place]
        self._end(lease, False)


_all: weakref.WeakSet[Leases] = weakref.WeakSet()


def release(holder: Any) -> None:
    """End all leases of a holder."""
    for leases in list(_all):
        leases.release(holder)


def _on_death(leases: weakref.ref[Leases], place: int, lease: Lease, holder: Any) -> None:
    alive = leases()  # a Master does not last as long as the data of its user
    if alive is not None:
        alive.forget(place, lease)
