"""Who waits for which refs. Looking it up takes no longer where many wait for many."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from qjam_worker.wire.refs import Ref

W = TypeVar("W", bound=Hashable)


class Wants(Generic[W]):
    """The refs that were asked for and have not come, and who waits for each."""

    def __init__(self) -> None:
        self._who: dict[Ref, dict[W, None]] = {}  # in the order in which they came
        self._what: dict[W, dict[Ref, None]] = {}

    def __contains__(self, ref: Ref) -> bool:
        return ref in self._who

    def __iter__(self) -> Iterator[Ref]:
        return iter(self._who)

    def __len__(self) -> int:
        return len(self._who)

    def want(self, ref: Ref, who: W) -> bool:
        """Somebody needs the ref. True if it has to be asked for: nobody has waited for it."""
        first = ref not in self._who
        self._who.setdefault(ref, {})[who] = None
        self._what.setdefault(who, {})[ref] = None
        return first

    def arrived(self, ref: Ref) -> list[W]:
        """The ref is here. Gives those who have waited for it."""
        who = list(self._who.pop(ref, ()))
        for one in who:
            del self._what[one][ref]
            if not self._what[one]:
                del self._what[one]
        return who

    def gone(self, ref: Ref) -> list[W]:
        """The ref will not come. Gives those who have waited for it: they may want it again."""
        return self.arrived(ref)

    def leave(self, who: W) -> None:
        """This one waits for nothing any more."""
        for ref in self._what.pop(who, ()):
            del self._who[ref][who]
            if not self._who[ref]:
                del self._who[ref]
