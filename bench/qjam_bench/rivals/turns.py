"""Measure parties in small batches, in turns, forwards and backwards, so that other work slows all parties alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from qjam_bench.ends import loops
from qjam_bench.harness.figures import OURS, BenchError
from qjam_bench.harness.party import Party

from . import seat


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


def started(
    stack: ExitStack, names: Sequence[str], function: str, workers: int, route: str = "local"
) -> dict[str, Party]:
    """Start these parties, each in a process of its own; closing the stack ends them."""
    parties = {}
    for name in names:
        progress(f"starting {name} with {workers} workers")
        rests = name != OURS or route == "local"
        parties[name] = stack.enter_context(seat.seated(name, function, workers, route, rests=rests))
    return parties


def interleave(parties: Mapping[str, Party], batches: Batches, params: Any, expected: Any) -> dict[str, list[float]]:
    """Let the parties take turns; give the seconds of each one's counted rounds. Checks every sum."""
    seconds: dict[str, list[float]] = {name: [] for name in parties}
    for turn, name in order(list(parties), batches.number):
        progress(f"batch {turn + 1} of {batches.number}: {name}")
        try:
            seconds[name] += parties[name].drive(
                loops.timed_rounds, params, expected, batches.settle, batches.most, batches.budget
            )
        except ArithmeticError as error:  # only parties of this process raise it
            raise BenchError(f"{name}: {error}") from error
    progress("")
    return seconds


def take_turns(parties: Mapping[str, Callable[[], Any]], turns: int, warm: int = 1) -> dict[str, list[Any]]:
    """Call each party `warm` times uncounted, then `turns` times; give the results of the latter."""
    given: dict[str, list[Any]] = {name: [] for name in parties}
    for turn, name in order(list(parties), warm + turns):
        progress(f"turn {turn + 1} of {warm + turns}: {name}")
        gift = parties[name]()
        if turn >= warm:
            given[name].append(gift)
    progress("")
    return given
