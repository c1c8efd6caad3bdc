"""Measure many small independent calls beside the executors and pools that people use."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from qjam_bench import rivals
from qjam_bench.ends import calls as loops
from qjam_bench.harness import networks, options
from qjam_bench.harness.figures import OURS, BenchError, Figure, markdown
from qjam_bench.rivals import field

from . import report

ARRAY = 8_000_000  # bytes of the array that comes again in every call
MS = 0.001
FIRST = 2_000  # calls one at a time in a turn, at most
MIXTURES = {  # seconds of each call; seconds until all are done, if nothing gets in the way of 2 workers
    "0.5 s and 200 of 5 ms": ([0.5] + [0.005] * 200, 0.75),
    "50 of 20 ms": ([0.02] * 50, 0.5),
    "3,000 of 0.2 ms": ([0.0002] * 3_000, 0.3),
}
GROUPS = ("latency", "outstanding", "ms", "mixed", "array", "hosts")
RATE = "1gbit"
ARRAYS_OUTSTANDING = 8
MS_OUTSTANDING = 1_000


class Case(NamedTuple):
    """Something to measure: a loop of ends/calls.py, its arguments, and the figure that its results make."""

    what: str
    loop: Callable[..., Any]
    arguments: tuple[Any, ...]
    ideal: float = 0.0  # seconds, of a mixture or of one call

    def figure(self, party: str, results: Sequence[Any]) -> Figure:
        """Give the figure of one party's results, one for each turn."""
        if self.loop is loops.mixed:
            return Figure(self.what, party, list(results), ideal=self.ideal)
        if self.loop is loops.one_by_one:
            return Figure(self.what, party, [second for taken in results for second in taken])
        more = {"made": [one.calls for one in results]}
        return Figure(self.what, party, [one.seconds / one.calls for one in results], 0, OURS, more, 1, self.ideal)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.count, default=2, metavar="N", help="workers (2)")
    parser.add_argument(
        "--outstanding",
        type=options.counts,
        default="100,1000,10000,100000",
        metavar="N,N",
        help="calls that are under way at the same time (100,1000,10000,100000)",
    )
    parser.add_argument("--turns", type=options.count, default=5, metavar="N", help="counted turns of each party (5)")
    parser.add_argument("--ms", type=options.count, default=1_000, metavar="N", help="ms of a turn (1000)")
    parser.add_argument(
        "--limit",
        type=options.count,
        default=20,
        metavar="N",
        help="seconds that a party may take for one turn, and for all turns of a case after the first (20)",
    )
    parser.add_argument(
        "--cases",
        type=partial(options.routes, known=GROUPS),
        default=",".join(GROUPS),
        metavar="NAME,NAME",
        help=f"what to measure, from {', '.join(GROUPS)} (all)",
    )
    rivals.add_against(parser, rivals.CALLERS)
    options.add_markdown(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    options.say(f"Calls on {arguments.workers} workers. ms: of one call; of the mixtures: until all are done.")
    options.say("of ideal: that time, divided by the one without any overhead\n")
    figures = measure(arguments)
    status = report.finish(arguments, figures, f"calls on {arguments.workers} workers")
    if arguments.markdown:
        options.say("\n" + markdown([("call (ms)", figures)]))
    return status


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Give a figure for each case and party: first on this machine, then of qjam on two ssh hosts."""
    lost = rivals.absent(arguments.against, rivals.CALLERS)
    names = rivals.chosen(arguments.against, rivals.CALLERS)
    found: list[Figure] = []
    if here := cases(arguments):
        with field.entered(field.local("calls", names, arguments.workers), lost) as parties:
            found += played(parties, here, arguments)
    if "hosts" in arguments.cases:
        found += _on_hosts(arguments)
    return found


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Give the cases of this machine that --cases has chosen."""
    workers, budget = arguments.workers, arguments.ms / 1e3
    empty, nap = ("echo", ()), ("nap", (MS,))
    groups = {
        "latency": [
            Case("one at a time, empty", loops.one_by_one, (*empty, FIRST, budget)),
            Case("one at a time, 1 ms", loops.one_by_one, (*nap, FIRST, budget)),
        ],
        "outstanding": [
            Case(f"empty, {number:,} outstanding", loops.stream, (*empty, number, budget))
            for number in arguments.outstanding
        ],
        "ms": [
            Case(f"1 ms, {MS_OUTSTANDING:,} outstanding", loops.stream, (*nap, MS_OUTSTANDING, budget), MS / workers)
        ],
        "mixed": [Case(what, loops.mixed, (naps,), ideal * 2 / workers) for what, (naps, ideal) in MIXTURES.items()],
        "array": [Case("the same 8 MB in each", loops.stream_array, (ARRAY, ARRAYS_OUTSTANDING, budget))],
    }
    return [case for name, group in groups.items() if name in arguments.cases for case in group]


def played(parties: field.Field, chosen: Sequence[Case], arguments: argparse.Namespace) -> list[Figure]:
    """Give the figures of these cases, and for each party without one why that is so."""
    found = []
    for case in chosen:
        results, why = parties.play(arguments.turns, arguments.limit, case.loop, *case.arguments)
        found += [case.figure(name, gifts) for name, gifts in results.items()]
        found += [Figure(case.what, name, [], told=text) for name, text in (why | parties.lost).items()]
    return found


def _on_hosts(arguments: argparse.Namespace) -> list[Figure]:
    """Give the figures of two hosts with one worker each, and of a round trip to one of them."""
    budget = arguments.ms / 1e3
    try:
        with networks.hosts(2, RATE) as (hosts, config, network):
            entry = field.Entry("calls", OURS, [2, hosts, config], rests=False)
            trips = networks.round_trips(network)
            where = f"2 hosts at {RATE}"
            chosen = [
                Case(f"{where}: one at a time, empty", loops.one_by_one, ("echo", (), FIRST, budget)),
                *(
                    Case(f"{where}: empty, {number:,} outstanding", loops.stream, ("echo", (), number, budget))
                    for number in arguments.outstanding
                ),
            ]
            with field.entered({OURS: entry}, {}) as parties:
                found = played(parties, chosen, arguments)
    except BenchError as error:
        options.say(f"no calls on ssh hosts: {error}\n")
        return []
    return [Figure(chosen[0].what, "round trip of TCP", trips), *found]
