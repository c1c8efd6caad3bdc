"""What every experiment leaves: a table, and if asked for a JSON file with facts about the machine, and a plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qjam_bench.harness import figures as fig

from . import machine


def finish(
    arguments: argparse.Namespace, figures: Sequence[fig.Figure], title: str, more: dict[str, Any] | None = None
) -> int:
    """Print the figures as a table; write the JSON and the plot if asked for; gives the exit status."""
    sys.stdout.write(fig.table(figures) + "\n")
    keep(arguments, [fig.row(one, figures) for one in figures], more)
    if arguments.plot:
        from qjam_bench.harness import plots

        plots.bars(arguments.plot, title, figures)
    return 0


def keep(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]], more: dict[str, Any] | None = None) -> None:
    """Write the JSON if --json was given."""
    if arguments.json:
        report = {"arguments": sys.argv[1:], "machine": machine.facts(), "figures": list(rows), **(more or {})}
        fig.write_json(arguments.json, report)
