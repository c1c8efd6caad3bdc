"""Closes, in a fork of the user's program, the copies of descriptors whose end tells others that the program ended."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Abandoned(Protocol):
    """Closes its copies of descriptors and does nothing else: everything behind them belongs to the parent."""

    def abandon(self) -> None: ...


_living: weakref.WeakSet[Abandoned] = weakref.WeakSet()
add = _living.add
discard = _living.discard


def _abandon_all() -> None:
    for one in list(_living):
        one.abandon()
    _living.clear()


os.register_at_fork(after_in_child=_abandon_all)
