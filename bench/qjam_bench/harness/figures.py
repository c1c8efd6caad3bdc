"""Figures and what is made of them: spreads, ratios to qjam, tables as text and markdown, rows for JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OURS = "qjam"


class BenchError(Exception):
    """Something cannot be measured; the text is one line for the user."""


class PartyLost(BenchError):
    """A party does not start, or has ended; the others can go on."""

    def __init__(self, name: str, why: str) -> None:
        """`why`: for the user, after the party's name. `short`: its last line, for a table."""
        super().__init__(f"{name} {why}")
        self.short = why.splitlines()[-1].strip()


class OverLimit(PartyLost):
    """A party took more time than it may; it has been ended."""


class Spread(NamedTuple):
    """The median and the quartiles of many figures."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        """Give the spread of one figure or more."""
        return cls(*(float(q) for q in np.percentile(figures, [50, 25, 75])))


class Figure(NamedTuple):
    """The seconds that one party took for one thing, one for each time."""

    what: str
    party: str
    seconds: list[float]
    nbytes: int = 0  # bytes moved in that time, if a rate is to be shown
    against: str = OURS  # the party to compare it with
    more: dict[str, Any] = {}  # noqa: RUF012  # for the JSON only
    calls: int = 0  # made in that time, if a rate is to be shown
    ideal: float = 0.0  # seconds that it would take without any overhead, if that is to be shown
    told: str = ""  # why there are no seconds

    @property
    def spread(self) -> Spread:
        """The spread of the seconds."""
        return Spread.of(self.seconds)


def ratio(figure: Figure, figures: Iterable[Figure]) -> float | None:
    """Give its median divided by that of the party to compare it with; None if that one was not measured."""
    same = [one for one in figures if (one.what, one.party) == (figure.what, figure.against) and one.seconds]
    return figure.spread.median / same[0].spread.median if same and figure.seconds else None


def row(figure: Figure, figures: Iterable[Figure]) -> dict[str, Any]:
    """Give the row for the JSON."""
    found: dict[str, Any] = {"what": figure.what, "party": figure.party}
    if figure.told:
        return {**found, "told": figure.told, "seconds": []}
    spread = figure.spread
    found["ms"] = {name: 1e3 * value for name, value in spread._asdict().items()}
    if figure.nbytes:
        found |= {"bytes": figure.nbytes, "mb_s": figure.nbytes / 1e6 / spread.median}
    if figure.calls:
        found |= {"calls": figure.calls, "calls_s": figure.calls / spread.median}
    if figure.ideal:
        found |= {"ideal": figure.ideal, "of_ideal": spread.median / figure.ideal}
    return {
        **found,
        "times": ratio(figure, figures),
        "to": figure.against,
        **figure.more,
        "seconds": figure.seconds,
    }


def table(figures: Sequence[Figure]) -> str:
    """Give the figures as a table of text."""
    widths = [max((len(one.what) for one in figures), default=0), max((len(one.party) for one in figures), default=0)]
    shown = [column for column in COLUMNS if any(column.text(one) for one in figures if one.seconds)]
    head = f"{'':<{widths[0]}}  {'':<{widths[1]}} {'median ms':>10} {'q1':>9} {'q3':>9} {'n':>5}"
    lines = [head + "".join(f" {column.title:>{column.width}}" for column in shown) + "  times"]
    for one in figures:
        line = f"{one.what:<{widths[0]}}  {one.party:<{widths[1]}} "
        if one.told:
            lines.append(line + " " + one.told)
            continue
        numbers = [f"{number(1e3 * value):>{width}}" for value, width in zip(one.spread, (10, 9, 9), strict=True)]
        line += f"{' '.join(numbers)} {len(one.seconds):>5}"
        line += "".join(f" {column.text(one):>{column.width}}" for column in shown)
        times = ratio(one, figures)
        lines.append(
            line + (f"  {times:.2f} of {one.against}" if times is not None and one.party != one.against else "")
        )
    return "\n".join(lines)


class Column(NamedTuple):
    """A column that a table has if a figure has something for it."""

    title: str
    width: int
    text: Callable[[Figure], str]


COLUMNS = (
    Column("MB/s", 7, lambda one: f"{one.nbytes / 1e6 / one.spread.median:,.0f}" if one.nbytes else ""),
    Column("calls/s", 8, lambda one: f"{one.calls / one.spread.median:,.0f}" if one.calls else ""),
    Column("of ideal", 8, lambda one: f"{one.spread.median / one.ideal:.3f}" if one.ideal else ""),
)


def number(value: float) -> str:
    """Format a number with three significant digits and without an exponent."""
    digits = max(0, 2 - int(np.floor(np.log10(value)))) if value > 0 else 0
    return f"{value:,.{min(digits, 3)}f}"


def markdown(groups: Sequence[tuple[str, Sequence[Figure]]]) -> str:
    """Give a table in markdown with a line for each thing of each group and a column for each party.

    The ratio to qjam stands in brackets.
    """
    measured = [one.party for _, figures in groups for one in figures if one.seconds]
    parties = [name for name in dict.fromkeys(measured) if name != OURS]
    lines = ["| | " + " | ".join([OURS, *parties]) + " |", "|---" * (len(parties) + 2) + "|"]
    for title, figures in groups:
        for what in dict.fromkeys(one.what for one in figures):
            cells = {one.party: one for one in figures if one.what == what}
            texts = [_cell(cells[party], figures) if party in cells else "" for party in (OURS, *parties)]
            lines.append(f"| {title}, {what} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _cell(figure: Figure, figures: Sequence[Figure]) -> str:
    if figure.told:
        return figure.told
    text = number(1e3 * figure.spread.median)
    times = ratio(figure, figures)
    return text if figure.party == OURS or times is None else f"{text} ({times:.1f}x)"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report to a file."""
    path.write_text(json.dumps(report) + "\n")


# Mean seconds per iteration in the paper of 2010, by patches and workers: ssh pipes, base64 JSON, 16 machines.
PAPER = {
    1_000: {1: 0.1458, 2: 0.1752, 4: 0.2634, 8: 0.5339, 16: 0.9969},
    10_000: {1: 0.7310, 2: 0.3321, 4: 0.3360, 8: 0.5251, 16: 1.0186},
    100_000: {1: 10.0282, 2: 4.6782, 4: 2.4858, 8: 1.8046, 16: 1.4376},
}


class Line(NamedTuple):
    """One line of the autoencoder's table: mean seconds per round or iteration, each the median over all runs.

    `efficiency` is the median over all turns of ideal / round, both from the same turn: other work on the machine comes
    and goes within seconds, and has then slowed both.
    """

    patches: int
    workers: int
    iteration: float
    total: float  # seconds of the run
    step: float  # the optimiser's own part of an iteration
    round: float
    pure: float  # a round in one process, slice by slice
    apart: float  # a round in one process per core, which do not talk to each other
    cores: int  # that the workers can use at once
    efficiency: float

    @property
    def what(self) -> str:
        """The name of this line's figures."""
        return f"{self.patches:,} patches, {self.workers} workers"

    @property
    def ideal(self) -> float:
        """The seconds of a round whose computing is spread evenly over the cores, without any overhead."""
        return self.pure / self.cores

    def row(self) -> dict[str, Any]:
        """Give the row for the JSON."""
        overhead = {"ideal": self.ideal, "overhead": self.round - self.ideal}
        return {**self._asdict(), **overhead, "paper": PAPER.get(self.patches, {}).get(self.workers)}
