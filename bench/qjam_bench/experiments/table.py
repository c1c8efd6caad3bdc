"""Print the README's table in markdown: rounds, bulk, broadcast and start beside all rivals."""

from __future__ import annotations

import argparse
import importlib
from typing import Any, NamedTuple

from qjam_bench import rivals
from qjam_bench.harness import figures as fig
from qjam_bench.harness import options

from . import report


class Part(NamedTuple):
    """One subcommand of the table: the title of its lines, its options, and those for a short run."""

    title: str
    options: tuple[str, ...] = ()
    short: tuple[str, ...] = ()


PARTS = {
    "rounds": Part("round (ms)", short=("--rounds", "150")),
    "bulk": Part("distribution (ms)", ("--route", "local"), short=("--turns", "2")),
    "broadcast": Part("64 MiB to 8 workers (ms)", short=("--rounds", "9")),
    "start": Part("start (ms)", short=("--turns", "2")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--short", action="store_true", help="fewer rounds and turns: takes minutes, less precise")
    rivals.add_against(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure all four subcommands, print each one's figures, then the table; gives the exit status."""
    groups: list[tuple[str, list[fig.Figure]]] = []
    drawn: list[fig.Figure] = []
    for name, part in PARTS.items():
        figures = importlib.import_module(f"{__package__}.{name}").measure(_arguments(name, part, arguments))
        options.say(f"{name}\n{fig.table(figures)}\n")
        groups.append((part.title, figures))
        drawn += [one._replace(what=f"{name}\n{one.what}") for one in figures]
    options.say(fig.markdown(groups))
    report.keep(
        arguments, [{"subcommand": title, **fig.row(one, figures)} for title, figures in groups for one in figures]
    )
    if arguments.plot:
        from qjam_bench.harness import plots

        plots.bars(arguments.plot, "qjam and its rivals", drawn)
    return 0


def _arguments(name: str, part: Part, ours: argparse.Namespace) -> Any:
    """Give the arguments for another subcommand, with the same rivals."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"{__package__}.{name}").add_arguments(parser)
    found = parser.parse_args([*part.options, *(part.short if ours.short else ())])
    found.against = ours.against
    return found
