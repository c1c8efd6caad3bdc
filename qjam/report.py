"""HostReport: how the start of a host went, phase by phase; and a table of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PHASES = ("resolve", "connect", "host key", "auth", "python", "bundle", "way back", "ready")

FAILED, NOTHING = "failed", "-"  # table cells that hold no time

_GREEN, _RED, _DIM, _PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


@dataclass
class HostReport:
    """The start of one host.

    Attributes:
        host: as the user wrote it.
        phases: the seconds of each finished phase: resolve, connect, host key, auth, python, bundle, way back, ready. A
            host without ssh has only `ready`.
        route: how the host reaches the master: local, direct, tunnel or stdio; empty until that is known.
        failed: the phase that failed; None if none did; empty if it failed outside a phase.
        why: the reason of the failure.
        stderr: the last lines that the host wrote to its stderr.
    """

    host: str
    phases: dict[str, float] = field(default_factory=dict)
    route: str = ""
    failed: str | None = None
    why: str = ""
    stderr: list[str] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether its workers started."""
        return "ready" in self.phases

    def __str__(self) -> str:
        if self.failed is None:
            return f"{self.host}: {'ready' if self.ready else 'starting'}"
        why = self.why.removeprefix(f"{self.host}: ")  # some reasons begin with the host
        return f"{self.host}: {self.failed}: {why}" if self.failed else f"{self.host}: {why}"


def table(reports: Sequence[HostReport], *, colour: bool = False, more: Sequence[Sequence[str]] = ()) -> str:
    """Return a table with one line per host: its name, the seconds of each phase, its route. Failures follow below.

    `more`: further columns, each with its heading first. Control characters in text from hosts become spaces.
    """
    paint = _painted if colour else _plain
    rows = [["host", *PHASES, "route", *(column[0] for column in more)]]
    for number, report in enumerate(reports, 1):
        cells = [_cell(report, phase) for phase in PHASES]
        rows.append([report.host, *cells, report.route or NOTHING, *(column[number] for column in more)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, colours in zip(rows, [[_DIM] * len(widths), *map(_colours, reports, rows[1:])], strict=True):
        name, *rest = row
        texts = [name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
        lines.append("  ".join(map(paint, texts, colours)).rstrip())
    for report in failures(reports):
        first, *others = _clean(str(report)).split("\n")
        lines += ["", paint(first, _RED), *others, *(f"    | {_clean(line)}" for line in report.stderr)]
    return "\n".join(lines)


def failures(reports: Iterable[HostReport]) -> list[HostReport]:
    """The reports of hosts that did not start."""
    return [report for report in reports if report.failed is not None]


def _cell(report: HostReport, phase: str) -> str:
    if phase == report.failed:
        return FAILED
    return f"{report.phases[phase]:.2f}" if phase in report.phases else NOTHING


def _colours(report: HostReport, row: Sequence[str]) -> list[str]:
    name = _GREEN if report.failed is None else _RED
    return [name, *({FAILED: _RED, NOTHING: _DIM}.get(cell, "") for cell in row[1:])]


def _clean(text: str) -> str:
    """Replace control characters: the text comes from another machine, and a terminal would obey them."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def _plain(text: str, colour: str) -> str:
    return text


def _painted(text: str, colour: str) -> str:
    return f"{colour}{text}{_PLAIN}" if colour else text
