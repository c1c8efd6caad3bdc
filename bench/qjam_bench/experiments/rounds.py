"""Measure rounds of an optimiser's loop: 3,934 float64 to each worker, as many back, summed."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import numpy as np

from qjam_bench import rivals
from qjam_bench.harness import options
from qjam_bench.harness.figures import Figure
from qjam_bench.harness.hosts import ROUTES
from qjam_bench.rivals import turns

from . import report

PARAMS = 3934  # float64, as many as the paper's 64-30-64 autoencoder has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.counts, default="2,8,16", metavar="N,N", help="workers (2,8,16)")
    parser.add_argument(
        "--rounds",
        type=options.count,
        default=1000,
        metavar="N",
        help="rounds of a fast party; a slow one plays fewer (1000)",
    )
    parser.add_argument(
        "--route", choices=ROUTES, default="local", help="local (default), or through ssh: direct, tunnel, stdio"
    )
    rivals.add_against(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    options.say(f"{PARAMS} float64 to each worker and back, summed")
    if arguments.route == "local":
        options.say("raw-zmq over ipc; qjam on this machine without ssh\n")
    else:
        options.say(f"raw-zmq over TCP on loopback, without CURVE; qjam on ssh, route {arguments.route}, CURVE\n")
    return report.finish(arguments, measure(arguments), "one round of 3,934 float64")


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Give one figure per party and number of workers."""
    params = np.random.default_rng(0).integers(0, 1 << 20, PARAMS).astype(np.float64)  # whole: sums are exact
    batches = turns.Batches.of(arguments.rounds)
    warm = turns.Batches(max(1, batches.number // 10), batches.most, budget=0.2)
    figures: list[Figure] = []
    lost = rivals.absent(arguments.against)
    names = [*rivals.chosen(arguments.against), rivals.BY_VALUE]
    for workers in arguments.workers:
        with ExitStack() as stack:
            parties = turns.started(stack, names, "scale", workers, arguments.route, lost)
            turns.interleave(parties, warm, params, params * workers, lost)
            seconds = turns.interleave(parties, batches, params, params * workers, lost)
        figures += turns.figures(f"{workers} workers", seconds, lost)
    return figures
