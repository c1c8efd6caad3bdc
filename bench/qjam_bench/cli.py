"""The command line of qjam-bench: a table of subcommands, each a module of experiments/ with add_arguments and main."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

from qjam import QjamError

from . import ends
from .harness.figures import BenchError

SUBCOMMANDS = {
    "rounds": "an optimiser's loop: small params to the workers, small results back",
    "calls": "many small independent calls, beside executors and pools",
    "joblib": "grid searches of scikit-learn through joblib, and on two ssh hosts against one",
    "bulk": "distribute a large data set to the workers of a host",
    "broadcast": "large params to all workers; results of the same size back, summed",
    "start": "from nothing to the first answer: on this machine, or on ssh hosts, cold and warm",
    "autoencoder": "the table of qjam's paper of 2010: L-BFGS trains a sparse autoencoder",
    "memory": "how much memory the master and a host use for a large data set",
    "scale": "CPU and memory of the dispatcher with up to 10,000 simulated nodes",
    "stragglers": "how much one slow worker slows a loop down",
    "table": "the README's table in markdown: rounds, bulk, broadcast and start",
}


def program() -> int:
    """Run qjam-bench with the arguments of this process; gives the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # sys.exit lets every `with` block clean up
    ends.prepare()
    return main(sys.argv[1:])


def main(words: Sequence[str]) -> int:
    """Read the command line and run one subcommand; gives the exit status."""
    parser = argparse.ArgumentParser(prog="qjam-bench", description="Measure qjam beside its rivals on this machine.")
    choices = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, text in SUBCOMMANDS.items():
        options = choices.add_parser(name, help=text, description=text)
        if name in words[:1]:  # import the chosen subcommand only
            _experiment(name).add_arguments(options)
    arguments = parser.parse_args(words)
    try:
        status: int = _experiment(arguments.subcommand).main(arguments)
    except (BenchError, QjamError, RuntimeError) as error:  # the last two: a host or a private sshd does not start
        sys.stderr.write(f"qjam-bench: {error}\n")
        return 1
    return status


def _experiment(name: str) -> Any:
    return importlib.import_module(f"{__package__}.experiments.{name}")
