"""How the start of each host went: its phases with their times, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PHASES = ("resolve", "connect", "host key", "auth", "python", "bundle", "way back", "ready")

_GREEN, _RED, _DIM, _PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


@dataclass
class HostReport:
    """The start of one host.

    Attributes:
        host: as the user wrote it.
        phases: seconds that each phase took that is over, of resolve, connect, host key, auth, python, bundle, way
            back, ready; a host without ssh has `ready` alone.
        route: how the host reaches the master: local, direct, tunnel or stdio; empty before that is known.
        failed: the phase that failed; None while none has.
        why: the reason.
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
        """Whether its workers were up."""
        return "ready" in self.phases

    def __str__(self) -> str:
        if self.failed is None:
            return f"{self.host}: {'ready' if self.ready else 'starting'}"
        return f"{self.host}: {self.failed}: {self.why}" if self.failed else f"{self.host}: {self.why}"


def table(reports: Sequence[HostReport], *, colour: bool = False, more: Sequence[Sequence[str]] = ()) -> str:
    """A line a host: its name, the seconds of each phase, its route; below, why a phase failed.

    `more` are further columns, each with its heading first.
    """
    paint = _painted if colour else _plain
    rows = [["host", *PHASES, "route", *(column[0] for column in more)]]
    for number, report in enumerate(reports):
        cells = [_cell(report, phase) for phase in PHASES]
        rows.append([report.host, *cells, report.route or "-", *(column[number + 1] for column in more)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        first, *rest = [
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        if number == 0:
            lines.append(paint("  ".join([first, *rest]), _DIM))
            continue
        report = reports[number - 1]
        cells = [paint(cell, _RED) if cell.strip() == "failed" else cell for cell in rest]
        lines.append("  ".join([paint(first, _RED if report.failed is not None else _GREEN), *cells]))
    for report in reports:
        if report.failed is not None:
            lines.append(paint(str(report), _RED))
            lines += [f"    | {line}" for line in report.stderr]
    return "\n".join(line.rstrip() for line in lines)


def _cell(report: HostReport, phase: str) -> str:
    if phase in report.phases:
        return f"{report.phases[phase]:.2f}"
    return "failed" if phase == report.failed else "-"


def _plain(text: str, colour: str) -> str:
    return text


def _painted(text: str, colour: str) -> str:
    return f"{colour}{text}{_PLAIN}"


def failures(reports: Iterable[HostReport]) -> list[HostReport]:
    """Those that did not start."""
    return [report for report in reports if report.failed is not None]
