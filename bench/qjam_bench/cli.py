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
    "rounds": "an optimiser's loop: small params out, small results back",
    "bulk": "a large data set, from here to the workers of a host",
    "broadcast": "large params to all workers, and as much back, summed",
    "start": "from nothing to the first answer: here, and ssh hosts, cold and warm",
    "autoencoder": "the paper's table: a sparse autoencoder by L-BFGS",
    "memory": "what a large data set costs the master and a host in memory",
    "scale": "the dispatcher with up to 10,000 simulated nodes",
    "stragglers": "one slow worker, and what it costs a loop",
    "table": "rounds, bulk, broadcast and start as a table in markdown",
}


def program() -> int:
    """Be qjam-bench."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` ends what it began
    ends.prepare()
    return main(sys.argv[1:])


def main(words: Sequence[str]) -> int:
    """Read the command line and run one subcommand; gives the exit status."""
    parser = argparse.ArgumentParser(prog="qjam-bench", description="Measure qjam beside its rivals here.")
    choices = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, text in SUBCOMMANDS.items():
        options = choices.add_parser(name, help=text, description=text)
        if name in words[:1]:  # only what is asked for is imported
            _experiment(name).add_arguments(options)
    arguments = parser.parse_args(words)
    try:
        status: int = _experiment(arguments.subcommand).main(arguments)
    except (BenchError, QjamError, RuntimeError) as error:  # also a host that does not start, or a private sshd
        sys.stderr.write(f"qjam-bench: {error}\n")
        return 1
    return status


def _experiment(name: str) -> Any:
    return importlib.import_module(f"{__package__}.experiments.{name}")
