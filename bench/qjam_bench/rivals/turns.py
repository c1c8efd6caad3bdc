"""Measure parties in small batches, in turns, forwards and backwards, so that other work slows all parties alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from qjam_bench.ends import loops
from qjam_bench.harness.figures import OURS, BenchError, Figure, PartyLost
from qjam_bench.harness.party import Party

from . import BY_VALUE, seat


class Batches(NamedTuple):
    """How a party's rounds are cut: `number` batches of at most `most` counted rounds that begin within `budget`."""

    number: int
    most: int = 25
    settle: int = 2  # rounds at the start of a batch that do not count
    budget: float = 0.5  # seconds

    @classmethod
    def of(cls, rounds: int) -> Batches:
        """Give the batches in which a fast party plays at least `rounds` rounds."""
        most = min(rounds, cls._field_defaults["most"])
        return cls(-(-rounds // most), most)


def order(names: Sequence[str], turns: int) -> Iterator[tuple[int, str]]:
    """Yield (turn, name): each name once per turn, every second turn backwards. So none always follows another."""
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            yield turn, name


def progress(text: str) -> None:
    """On a terminal, show what is being done, in place of the text before; elsewhere show nothing."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


Lost = dict[str, str]
"""Why parties are left out, by name."""


def started(
    stack: ExitStack, names: Sequence[str], function: str, workers: int, route: str = "local", lost: Lost | None = None
) -> dict[str, Party]:
    """Start these parties, each in a process of its own; closing the stack ends them.

    `lost`: leave out the rivals in it, and put each rival into it that does not start.
    """
    parties: dict[str, Party] = {}
    for name in names:
        if lost and name in lost:
            continue
        progress(f"starting {name} with {workers} workers")
        rests = name not in (OURS, BY_VALUE) or route == "local"
        try:
            parties[name] = stack.enter_context(seat.seated(name, function, workers, route, rests=rests))
        except PartyLost as error:
            _lose(name, error, lost)
    return parties


def interleave(
    parties: Mapping[str, Party], batches: Batches, params: Any, expected: Any, lost: Lost | None = None
) -> dict[str, list[float]]:
    """Let the parties take turns; give the seconds of each one's counted rounds. Checks every sum.

    `lost`: as for `started`, of rivals that end.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parties if not (lost and name in lost)}
    for turn, name in order(list(seconds), batches.number):
        progress(f"batch {turn + 1} of {batches.number}: {name}")
        if name not in seconds:
            continue
        try:
            seconds[name] += parties[name].drive(
                loops.timed_rounds, params, expected, batches.settle, batches.most, batches.budget
            )
        except PartyLost as error:
            _lose(name, error, lost)
            del seconds[name]
        except ArithmeticError as error:  # only parties of this process raise it
            raise BenchError(f"{name}: {error}") from error
    progress("")
    return seconds


def take_turns(
    parties: Mapping[str, Callable[[], Any]], turns: int, warm: int = 1, lost: Lost | None = None
) -> dict[str, list[Any]]:
    """Call each party `warm` times uncounted, then `turns` times; give the results of the latter.

    `lost`: as for `started`.
    """
    given: dict[str, list[Any]] = {name: [] for name in parties if not (lost and name in lost)}
    for turn, name in order(list(given), warm + turns):
        progress(f"turn {turn + 1} of {warm + turns}: {name}")
        if name not in given:
            continue
        try:
            gift = parties[name]()
        except PartyLost as error:
            _lose(name, error, lost)
            del given[name]
        else:
            given[name] += [gift] if turn >= warm else []
    progress("")
    return given


@contextmanager
def spending(spent: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block takes."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[name] += time.perf_counter() - began


def figures(what: str, taken: Mapping[str, list[float]], lost: Lost) -> list[Figure]:
    """Give a figure for each party that was measured, and one that tells why for each that was not."""
    return [Figure(what, name, seconds) for name, seconds in taken.items()] + [
        Figure(what, name, [], told=why) for name, why in lost.items()
    ]


def _lose(name: str, error: PartyLost, lost: Lost | None) -> None:
    """Note that this rival is left out; raise the error if there can be no table without the party."""
    if lost is None or name == OURS:
        raise error
    progress("")
    lost[name] = error.short
