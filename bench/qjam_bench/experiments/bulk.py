"""Distribute a large data set to the workers of a host."""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qjam import DataSet
from qjam_bench import rivals
from qjam_bench.ends import loops
from qjam_bench.harness import options
from qjam_bench.harness.figures import BenchError, Figure, Spread, number
from qjam_bench.harness.hosts import ROUTES
from qjam_bench.harness.party import Party
from qjam_bench.rivals import OURS, raw_bulk, turns
from qjam_bench.rivals.seat import seated

from . import report

MIB = 1 << 20
COLUMNS = 64
MEMORY = {"touched": "written to and freed before each turn", "as-is": "in whatever state the system has it"}
TOUCHED = 6  # times the size of the data: the pipe to a party's process takes memory as well
RAW: dict[str, Callable[[], AbstractContextManager[Party]]] = {
    "raw-tcp": raw_bulk.raw_tcp,
    "raw-zmq": partial(raw_bulk.raw_zmq, curve=False),
    "raw-curve": partial(raw_bulk.raw_zmq, curve=True),
}
HERE, SUM = np.zeros(1), np.ones(1)  # params: look at the first and last row of the slice; add all of it up


class Sent(NamedTuple):
    """Seconds of one distribution of a data set: until all workers have it, and of qjam's hashes alone."""

    seconds: float
    hashing: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.count, default=8, metavar="N", help="workers of the host (8)")
    parser.add_argument("--megabytes", type=options.count, default=512, metavar="N", help="MiB of the data set (512)")
    parser.add_argument("--turns", type=options.count, default=5, metavar="N", help="counted turns of each party (5)")
    parser.add_argument(
        "--route",
        type=partial(options.routes, known=ROUTES),
        default="local,direct",
        metavar="R,R",
        help=f"routes of qjam, from {', '.join(ROUTES)} (local,direct)",
    )
    parser.add_argument(
        "--memory",
        choices=MEMORY,
        default="touched",
        help="touched (default): write to free memory before each turn; as-is: do not. See docs/benchmarks.md",
    )
    rivals.add_against(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    options.say(
        f"{arguments.megabytes} MiB, new each time, until {arguments.workers} workers of one host have answered"
    )
    options.say("that they have their slices. raw-tcp, raw-zmq, raw-curve: to one process over loopback.")
    options.say(f"Free memory is {MEMORY[arguments.memory]}.\n")
    figures = measure(arguments)
    title = f"{arguments.megabytes} MiB to {arguments.workers} workers"
    status = report.finish(arguments, figures, title, {"memory": arguments.memory})
    hashing = [second for one in figures if one.party.startswith(OURS) for second in one.more["hashing"]]
    options.say(f"\nqjam's hashes of the whole data set alone take {number(1e3 * Spread.of(hashing).median)} ms")
    return status


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Give one figure per party; qjam counts as one party per route."""
    workers, size = arguments.workers, arguments.megabytes * MIB
    data = np.random.default_rng(0).integers(0, 1 << 20, size // 8).astype(np.float64).reshape(-1, COLUMNS)
    names = rivals.chosen(arguments.against)[:-1]
    parties = {name: open_raw for name, open_raw in RAW.items() if "raw-zmq" in names}
    parties |= {name: partial(seated, name, "look", workers) for name in names if name != "raw-zmq"}
    ours = {OURS if route == "local" else f"{OURS} {route}": route for route in arguments.route}
    parties |= {name: partial(seated, OURS, "look", workers, route) for name, route in ours.items()}
    lost = rivals.absent(arguments.against)
    touched = TOUCHED * size if arguments.memory == "touched" else 0
    sent = turns.take_turns(
        {name: partial(_turn, name, party, data, workers, touched) for name, party in parties.items()},
        arguments.turns,
        warm=0,
        lost=lost,
    )
    what = f"{size // MIB} MiB"
    figures = []
    for name, taken in sent.items():
        more = {"hashing": [each.hashing for each in taken]} if name in ours else {}
        seconds = [each.seconds for each in taken]
        figures.append(Figure(what, name, seconds, size, next(iter(ours)), more))
    return figures + turns.figures(what, {}, lost)


def _turn(name: str, party: Callable[[], AbstractContextManager[Party]], data: Any, workers: int, touched: int) -> Sent:
    """Run one party alone, since each keeps as many bytes as the data set has. It starts anew, with fresh memory."""
    data[:: raw_bulk.FRAME // data[0].nbytes] += 1  # new slices, which no worker knows
    with party() as running:
        running.load(np.ones((workers * raw_bulk.FRAME // 8 // COLUMNS, COLUMNS)))  # opens connections
        running.round(HERE), running.round(SUM)
        if touched:
            touch(touched)
        seconds = running.load(data) + running.drive(loops.timed_once, HERE)
        if (answer := running.round(SUM)[0]) != data.sum():  # whole numbers: the sum is exact
            raise BenchError(f"{name} gave a wrong sum: {answer!r}, not {data.sum()!r}")
    return Sent(seconds, _timed(lambda: DataSet(data).bind(workers).hash_list()) if name.startswith(OURS) else 0.0)


def touch(size: int) -> None:
    """Write to `size` bytes of memory and free them: for some seconds the next process gets memory fast.

    The host of a virtual machine may take free memory back. It returns a page when somebody writes to it, and 2 MiB
    then take 2 to 5 ms in place of 0.1 ms, unless another process has just freed some.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):  # of Linux
            memory.madvise(mmap.MADV_HUGEPAGE)  # hosts take back large pages only
        memory[:: mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
