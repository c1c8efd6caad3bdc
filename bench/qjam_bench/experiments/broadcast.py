"""Send large params to all workers of this machine; in a second experiment get as much back from each, summed."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import numpy as np

from qjam_bench import rivals
from qjam_bench.ends import work
from qjam_bench.harness import options
from qjam_bench.harness.figures import Figure
from qjam_bench.rivals import turns

from . import report

MIB = 1 << 20
THINGS = {"broadcast": "touch", "broadcast, map, reduce": "scale"}  # each with the function that the workers compute
BATCH = turns.Batches(1, most=3, settle=1, budget=1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.count, default=8, metavar="N", help="workers (8)")
    parser.add_argument("--megabytes", type=options.count, default=64, metavar="N", help="MiB of the params (64)")
    parser.add_argument(
        "--rounds", type=options.count, default=30, metavar="N", help="of a fast party; a slow one plays fewer (30)"
    )
    rivals.add_against(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    options.say(f"{arguments.megabytes} MiB of params to {arguments.workers} workers. broadcast: each returns a number")
    options.say("that needs every page of them; broadcast, map, reduce: each returns as much as came, summed\n")
    return report.finish(arguments, measure(arguments), f"{arguments.megabytes} MiB to {arguments.workers} workers")


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Give a figure for each party and thing."""
    size, workers = arguments.megabytes * MIB, arguments.workers
    params = np.random.default_rng(0).integers(0, 1 << 20, size // 8).astype(np.float64)  # whole: sums are exact
    batches = BATCH._replace(number=-(-arguments.rounds // BATCH.most))
    figures: list[Figure] = []
    lost = rivals.absent(arguments.against)
    for what, function in THINGS.items():
        expected = work(function)(params, None) * workers
        with ExitStack() as stack:
            parties = turns.started(stack, rivals.chosen(arguments.against), function, workers, lost=lost)
            turns.interleave(parties, turns.Batches(1, most=1, settle=0), params, expected, lost)
            seconds = turns.interleave(parties, batches, params, expected, lost)
        figures += turns.figures(what, seconds, lost)
    return figures
