"""Measure grid searches of scikit-learn: on this machine beside other back-ends of joblib, and on two ssh hosts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np

from qjam_bench import rivals
from qjam_bench.ends import searches
from qjam_bench.harness import networks, options
from qjam_bench.harness.figures import OURS, BenchError, Figure, markdown
from qjam_bench.rivals import field, turns

from . import report

ONE_HOST, TWO_HOSTS = "qjam, 1 host", "qjam, 2 hosts"
RATE = "1gbit"
PLACES = ("here", "hosts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.count, default=2, metavar="N", help="workers (2)")
    parser.add_argument("--turns", type=options.count, default=5, metavar="N", help="counted turns of each party (5)")
    parser.add_argument("--limit", type=options.count, default=60, metavar="N", help="seconds for one search (60)")
    parser.add_argument(
        "--searches",
        type=partial(options.routes, known=searches.SEARCHES),
        default="short fits,large array",
        metavar="NAME,NAME",
        help=f"from {', '.join(searches.SEARCHES)} (short fits,large array)",
    )
    parser.add_argument(
        "--places",
        type=partial(options.routes, known=PLACES),
        default=",".join(PLACES),
        metavar="NAME,NAME",
        help=f"from {', '.join(PLACES)} (all)",
    )
    rivals.add_against(parser, rivals.SEARCHERS)
    options.add_markdown(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    options.say(f"Grid searches of scikit-learn on {arguments.workers} workers; hosts have one worker each\n")
    figures = measure(arguments)
    status = report.finish(arguments, figures, "grid searches")
    if arguments.markdown:
        options.say("\n" + markdown([("grid search (ms)", figures)]))
    return status


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Give a figure for each search and party."""
    if lacks := rivals.SEARCHERS[OURS].lacking():
        raise BenchError(f"not installed: {', '.join(lacks)}; ./scripts/bench makes an environment that has them")
    found: list[Figure] = []
    if "here" in arguments.places:
        lost = rivals.absent(arguments.against, rivals.SEARCHERS)
        entries = field.local("searches", rivals.chosen(arguments.against, rivals.SEARCHERS), arguments.workers)
        found += _searched("", entries, OURS, lost, arguments)
    if "hosts" in arguments.places:
        try:
            with networks.hosts(2, RATE) as (hosts, config, _):
                entries = {
                    name: field.Entry("searches", OURS, [1, hosts[:number], config], rests=False)
                    for number, name in enumerate((ONE_HOST, TWO_HOSTS), 1)
                }
                found += _searched(f", hosts at {RATE}", entries, ONE_HOST, {}, arguments)
        except BenchError as error:
            options.say(f"no searches on ssh hosts: {error}\n")
    return found


def _searched(
    where: str, entries: dict[str, field.Entry], reference: str, lost: turns.Lost, arguments: argparse.Namespace
) -> list[Figure]:
    found = []
    with field.entered(entries, lost) as parties:
        for name in arguments.searches:
            results, why = parties.play(arguments.turns, arguments.limit, searches.search, name)
            _same(results)
            found += [
                Figure(name + where, party, [one.seconds for one in taken], against=reference)
                for party, taken in results.items()
            ]
            found += [Figure(name + where, party, [], told=text) for party, text in (why | parties.lost).items()]
    return found


def _same(results: dict[str, list[searches.Searched]]) -> None:
    """Raise BenchError unless all searches came to the same scores."""
    every: Sequence[tuple[str, list[float]]] = [(name, one.scores) for name, taken in results.items() for one in taken]
    for name, scores in every:
        if not np.allclose(scores, every[0][1]):
            raise BenchError(f"{name} came to other scores than {every[0][0]}")
