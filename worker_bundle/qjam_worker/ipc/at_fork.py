"""What a fork of the program must let go of: copies of descriptors whose end is to tell of the program's end."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Abandoned(Protocol):
    """Closes its descriptors and does nothing else: they, and what they lead to, are the parent's."""

    def abandon(self) -> None: ...


_living: weakref.WeakSet[Abandoned] = weakref.WeakSet()
add = _living.add
discard = _living.discard


def _abandon_all() -> None:
    for one in list(_living):
        one.abandon()
    _living.clear()


os.register_at_fork(after_in_child=_abandon_all)
