"""Measure the real dispatcher with many simulated nodes: CPU per task event, its growth, memory per idle node.

A task event is one slice given out, or one slice's result taken. The CPU includes all calls that the engine makes to
Dispatch: joins, rounds, results, losses, timers, and `next_deadline` after every message. The time to pack and unpack
the same messages is measured separately (after the +). docs/scale.md has figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qjam.data.leases import Lease
from qjam.dispatch.jobs import JobSpec
from qjam.dispatch.rounds import RoundSpec

from .swarm import ENTRY, Swarm

SIZES = (10, 100, 1_000, 10_000)
WORKERS = 16
IN_FLIGHT = 8  # rounds that run at the same time
TOOK = 0.1  # seconds of simulated time in which the results of all slices come, for any number of nodes
LOST, LATE = 0.02, 0.1  # part of the nodes that is lost during a round; that does not answer or is late
MAX_TASK_SECONDS = 20e-6  # CPU per task event: the goal


@dataclass
class Figure:
    """What one play took; seconds are of CPU."""

    nodes: int
    what: str
    events: int
    messages: int
    seconds: float
    wire_seconds: float

    def each(self, seconds: float) -> float:
        """Give microseconds per task event, or per message if there were no events."""
        return 1e6 * seconds / max(1, self.events or self.messages)


Play = Callable[[Swarm, RoundSpec], None]


def job(nodes: int, key: str = "data") -> RoundSpec:
    """Give a job with one slice per worker; each `key` has slices of its own."""
    nslices = nodes * WORKERS
    lease = Lease(tuple(f"{key}{index:032x}" for index in range(nslices)), 0)
    return RoundSpec(JobSpec(key, ENTRY), nslices, lease)


def _a_round(swarm: Swarm, spec: RoundSpec, *, each: bool = False) -> None:
    swarm.submit(spec)
    swarm.deliver(swarm.results(each=each, order=random.Random(0)))
    swarm.settle()


def _several(swarm: Swarm, spec: RoundSpec) -> None:
    for _ in range(IN_FLIGHT):
        swarm.submit(spec)
    swarm.deliver(swarm.results(order=random.Random(1)))
    swarm.settle()


def _churn(swarm: Swarm, spec: RoundSpec) -> None:
    """While a round runs, nodes are lost and others join, one by one."""
    swarm.submit(spec)
    names = [name for name, _ in swarm.tasks]
    random.Random(2).shuffle(names)
    lost = names[: max(1, int(LOST * len(names)))]
    for name in lost:
        swarm.deliver(swarm.results(names.pop() for _ in range(min(4, len(names) - len(lost)))))
        swarm.lose([name])
        swarm.settle()
    swarm.deliver(swarm.results())
    swarm.settle()


def _stragglers(swarm: Swarm, spec: RoundSpec) -> None:
    """Some nodes do not answer: the master asks them to share, then suspects them, and others do their slices."""
    number = swarm.submit(spec)
    names = [name for name, _ in swarm.tasks]
    late = set(random.Random(3).sample(names, max(1, int(LATE * len(names)))))
    swarm.deliver(swarm.results(name for name in names if name not in late))
    while number not in swarm.done:
        swarm.wait(0.1)
        helped = swarm.results({name for name, _ in swarm.tasks if name not in late})
        swarm.deliver(helped)
    swarm.settle()


def _at_it(swarm: Swarm, spec: RoundSpec) -> None:
    """Some nodes are late and have nothing to share; the master asks them on behalf of every idle node."""
    swarm.submit(spec)
    names = [name for name, _ in swarm.tasks]
    late = set(random.Random(4).sample(names, max(1, int(LATE * len(names)))))
    swarm.shares = False
    swarm.deliver(swarm.results(name for name in names if name not in late))
    swarm.wait(2.0)
    swarm.shares = True
    swarm.deliver(swarm.results())
    swarm.settle()


def _liveness(swarm: Swarm, spec: RoundSpec) -> None:
    """All nodes work for three seconds, and answer each PING."""
    swarm.submit(spec)
    swarm.wait(3.0)
    swarm.deliver(swarm.results())
    swarm.settle()


PLAYS: dict[str, Play] = {
    "round, a RESULT a node": _a_round,
    "round, a RESULT a slice": lambda swarm, spec: _a_round(swarm, spec, each=True),
    f"{IN_FLIGHT} rounds in flight": _several,
    f"{LOST:.0%} lost, as many join": _churn,
    f"{LATE:.0%} do not answer": _stragglers,
    f"{LATE:.0%} are late, nothing to share": _at_it,
    "at work for 3 s": _liveness,
}


def play(nodes: int, repeats: int, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Yield the figures of every play with `nodes` nodes, each the median of `repeats`.

    Each repeat has a job of its own, which the nodes already know: where slices end up in one does not change the next.
    """
    swarm = Swarm(WORKERS, moment=TOOK / (nodes * WORKERS), wire=True)
    tell(f"{nodes} nodes: joins")
    yield _measured(swarm, nodes, "node joins", lambda: swarm.join(nodes))
    first = []
    for what, one in PLAYS.items():
        found = []
        for repeat in range(repeats):
            tell(f"{nodes} nodes: {what}, {repeat + 1} of {repeats}")
            spec = job(nodes, f"{what} {repeat}")
            first.append(_measured(swarm, nodes, "first round: JOB and TASK", partial(_a_round, swarm, spec)))
            found.append(_measured(swarm, nodes, what, partial(one, swarm, spec)))
        yield _median(found)
    yield _median(first)
    if swarm.failed or swarm.dispatch.rounds:
        raise RuntimeError(f"some rounds failed or did not end: {swarm.failed[:1]} {swarm.dispatch.rounds}")


def _median(figures: list[Figure]) -> Figure:
    return sorted(figures, key=lambda figure: figure.each(figure.seconds))[len(figures) // 2]


def _measured(swarm: Swarm, nodes: int, what: str, call: Callable[[], Any]) -> Figure:
    gc.collect()
    before = swarm.given + swarm.taken, swarm.messages, swarm.spent, swarm.wired
    call()
    after = swarm.given + swarm.taken, swarm.messages, swarm.spent, swarm.wired
    events, messages, seconds, wired = (b - a for a, b in zip(before, after, strict=True))
    return Figure(nodes, what, int(events), int(messages), seconds, wired)


def memory(nodes: int) -> dict[str, float]:
    """Give bytes of Dispatch per node: of an idle one, and of one that has run one job."""
    tracemalloc.start()
    try:
        swarm, before = Swarm(WORKERS), tracemalloc.get_traced_memory()[0]
        swarm.join(nodes)
        gc.collect()
        idle = tracemalloc.get_traced_memory()[0]
        spec = job(nodes)
        with_spec = tracemalloc.get_traced_memory()[0]
        _a_round(swarm, spec)
        swarm.done.clear()
        swarm.wait(10.0)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return {"idle": (idle - before) / nodes, "with a job": (idle - before + after - with_spec) / nodes}


def growth(figures: Iterable[Figure]) -> dict[int, float]:
    """Give seconds of all plays / (n log2 n), n the task events, by number of nodes; relative to the fewest nodes."""
    totals: dict[int, tuple[int, float]] = {}
    for figure in figures:
        if figure.events:
            events, seconds = totals.get(figure.nodes, (0, 0.0))
            totals[figure.nodes] = events + figure.events, seconds + figure.seconds
    found = {nodes: seconds / (n * math.log2(n)) for nodes, (n, seconds) in totals.items()}
    first = found[min(found)]
    return {nodes: value / first for nodes, value in found.items()}


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--nodes", type=_numbers, default=SIZES, metavar="N,N", help="default 10,100,1000,10000")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="repeats of each play; the median counts (3)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and facts about the machine")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures (PNG)")


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status: 1 if a task event takes longer than 20 us."""
    figures: list[Figure] = []
    held: dict[int, dict[str, float]] = {}
    with _progress() as tell:
        for nodes in arguments.nodes:
            figures += play(nodes, arguments.repeats, tell)
            tell(f"{nodes} nodes: memory")
            held[nodes] = memory(nodes)
    sys.stdout.write(table(figures, held) + "\n")
    if arguments.json:
        rows = [{**asdict(one), "us_each": one.each(one.seconds)} for one in figures]
        report = {"machine": _facts(), "figures": rows, "bytes_a_node": held, "growth": growth(figures)}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(arguments.plot, figures)
    return int(any(one.events and one.seconds > MAX_TASK_SECONDS * one.events for one in figures))


def table(figures: list[Figure], held: dict[int, dict[str, float]]) -> str:
    """Give the figures with one line per play and one column per number of nodes: us per event, + those of the wire."""
    sizes = list(held)
    by = {(one.nodes, one.what): one for one in figures}
    rows = [["us of CPU per task event, + wire", *(f"{nodes:,} nodes" for nodes in sizes)]]
    for what in dict.fromkeys(one.what for one in figures):
        ours = [by[nodes, what] for nodes in sizes]
        unit = "" if ours[0].events else " (per message)"
        rows.append([what + unit, *(f"{one.each(one.seconds):.2f} + {one.each(one.wire_seconds):.2f}" for one in ours)])
    rows.append(["all / (n log n), first is 1", *(f"{value:.2f}" for value in growth(figures).values())])
    rows += [[f"bytes a node, {what}", *(f"{held[nodes][what]:,.0f}" for nodes in sizes)] for what in held[sizes[0]]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def plot(path: Path, figures: list[Figure]) -> None:
    """Draw microseconds per event over the number of nodes, one line per play."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for what in dict.fromkeys(one.what for one in figures if one.events):
        ours = [one for one in figures if one.what == what]
        axes.plot([one.nodes for one in ours], [one.each(one.seconds) for one in ours], marker="o", label=what)
    axes.axhline(1e6 * MAX_TASK_SECONDS, color="black", linestyle=":", label="goal")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"nodes of {WORKERS} workers")
    axes.set_ylabel("us of CPU per task event, without the wire")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    picture.savefig(path, format="png", dpi=120)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.isdecimal() and int(part) > 0]
    if len(numbers) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1 on")
    return numbers


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """On a terminal, show in one line what is being measured."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    yield lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)  # noqa: T201
    sys.stderr.write("\r\033[K")


def _facts() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m qjam_bench.experiments.scale", description=__doc__)
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
