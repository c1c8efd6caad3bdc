"""Parties that may fail without an end to the run: one that does not start is left out; one that takes too long in a
case, or ends in it, has no figure for that case and starts anew for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from qjam_bench.harness.figures import OURS, PartyLost

from . import seat, turns


class Entry(NamedTuple):
    """How a party starts: its row in KINDS and the arguments for it; `rests` as for `seat.seat`."""

    kind: str
    name: str
    arguments: list[Any]
    rests: bool = True


class Field:
    """Parties in processes of their own."""

    def __init__(self, entries: Mapping[str, Entry], lost: turns.Lost) -> None:
        """`lost`: why rivals are left out, by name; those that do not start come to be in it."""
        self._entries = {name: entry for name, entry in entries.items() if name not in lost}
        self.lost = lost
        self._running: dict[str, tuple[ExitStack, seat.Seated]] = {}

    def start(self) -> None:
        """Start all that do not run. PartyLost if qjam does not start."""
        for name, entry in list(self._entries.items()):
            if name in self._running:
                continue
            turns.progress(f"starting {name}")
            with ExitStack() as stack:
                try:
                    party = stack.enter_context(seat.seat(*entry[:3], rests=entry.rests))
                except PartyLost as error:
                    if entry.name == OURS:
                        raise
                    turns.progress("")
                    self.lost[name] = error.short
                    del self._entries[name]
                else:
                    self._running[name] = stack.pop_all(), party

    def play(
        self, rounds: int, limit: float, loop: Callable[..., Any], *arguments: Any
    ) -> tuple[dict[str, list[Any]], turns.Lost]:
        """Let each party play a loop once uncounted and `rounds` times counted, in turns.

        A party that has spent `limit` seconds plays no more, once it has one counted result. Gives the results by name,
        and why there are none of a party: it took more than `limit` seconds at once, or ended.
        """
        self.start()
        given: dict[str, list[Any]] = {name: [] for name in self._entries}
        why: turns.Lost = {}
        spent = dict.fromkeys(given, 0.0)
        for turn, name in turns.order(list(given), 1 + rounds):
            if name in why or (given[name] and spent[name] > limit):
                continue
            turns.progress(f"turn {turn} of {rounds}: {name}")
            try:
                with turns.spending(spent, name):
                    gift = self._running[name][1].drive_within(limit, loop, *arguments)
            except PartyLost as error:
                why[name] = error.short
                self._close(name)
            else:
                given[name] += [gift] if turn else []
        turns.progress("")
        return {name: gifts for name, gifts in given.items() if name not in why}, why

    def close(self) -> None:
        """End all parties."""
        for name in list(self._running):
            self._close(name)

    def _close(self, name: str) -> None:
        self._running.pop(name)[0].close()


@contextmanager
def entered(entries: Mapping[str, Entry], lost: turns.Lost) -> Iterator[Field]:
    """Run a field during the block."""
    field = Field(entries, lost)
    try:
        yield field
    finally:
        field.close()


def local(kind: str, names: Sequence[str], workers: int) -> dict[str, Entry]:
    """Give the entries of these parties with `workers` workers on this machine."""
    return {name: Entry(kind, name, [workers]) for name in names}
