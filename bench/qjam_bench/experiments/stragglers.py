"""Measure how much one slow worker slows a loop down: with and without second attempts, on one host and on two."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qjam import DataSet, Master
from qjam_bench.harness import options
from qjam_bench.harness.figures import BenchError, Figure
from qjam_bench.harness.hosts import checkout_sshd, private_hosts, same_python
from qjam_bench.harness.party import Party
from qjam_bench.rivals import turns
from qjam_bench.rivals.qjam import shipped

from . import report

EVEN = "all even"
PARTIES = {EVEN: (False, True), "one slow": (True, True), "one slow, no speculation": (True, False)}
STRAGGLING = """
import os, time
import numpy as np

def mapfunc(params, dataset):
    seconds, cpu, slow, factor = params
    times = factor if os.getpid() in slow else 1
    if cpu:
        end = time.thread_time() + seconds * times
        while time.thread_time() < end:
            pass
    else:
        time.sleep(seconds * times)
    return float(np.sum(dataset))
"""


class Straggling(Party):
    """Rounds of a master whose last worker may be slow."""

    def __init__(self, master: Master, module: Any, slow: bool, work: tuple[float, bool, int], data: Any) -> None:
        """`work`: seconds per slice, whether that is CPU time, and how many times slower the slow worker is."""
        self._master = master
        self._module = module
        seconds, cpu, factor = work
        self._params = (seconds, cpu, [master.workers[-1].pid] if slow else [], factor)
        self._data = data

    def round(self, params: Any) -> Any:
        """Play one round with this party's own params; `params` is ignored."""
        return self._master.run(self._module, self._params, self._data)

    def _load(self, data: Any) -> None:
        raise NotImplementedError("the first round sends the slices")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.count, default=4, metavar="N", help="workers, one of them slow (4)")
    parser.add_argument("--slices", type=options.count, default=4, metavar="N", help="slices per worker (4)")
    parser.add_argument(
        "--factor", type=options.count, default=10, metavar="N", help="how many times slower the slow worker is (10)"
    )
    parser.add_argument("--ms", type=options.count, default=20, metavar="N", help="milliseconds per slice (20)")
    parser.add_argument("--rounds", type=options.count, default=50, metavar="N", help="counted, of each party (50)")
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    workers = arguments.workers
    options.say(f"{workers * arguments.slices} slices of {arguments.ms} ms each on {workers} workers, one of them")
    options.say(f"{arguments.factor} times slower\n")
    return report.finish(arguments, measure(arguments), "one slow worker")


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Give one figure per kind of work, number of hosts and party."""
    workers, nslices = arguments.workers, arguments.workers * arguments.slices
    array = np.arange(nslices * 1000.0).reshape(nslices, 1000)
    data = DataSet(array, slice_size=1)
    batches = turns.Batches(-(-arguments.rounds // 5), min(5, arguments.rounds), budget=60)
    figures = []
    with ExitStack() as stack:
        module = stack.enter_context(shipped(STRAGGLING))
        masters = {"one host": {on: stack.enter_context(_master(f"local*{workers}", on)) for on in (True, False)}}
        if workers > 1 and _has_sshd():
            hosts = stack.enter_context(private_hosts(2, same_python()))
            specs = [replace(host.spec, workers=workers // 2) for host in hosts]
            two = {on: stack.enter_context(_master(specs, on, hosts[0].config)) for on in (True, False)}
            masters["two hosts"] = two
        for work, cpu in (("sleeping", False), ("computing", True)):
            for where, pair in masters.items():
                spec = arguments.ms / 1e3, cpu, arguments.factor
                parties = {name: Straggling(pair[on], module, slow, spec, data) for name, (slow, on) in PARTIES.items()}
                seconds = turns.interleave(parties, batches, None, float(array.sum()))
                figures += [Figure(f"{work}, {where}", name, taken, 0, EVEN) for name, taken in seconds.items()]
    return figures


def _has_sshd() -> bool:
    try:
        checkout_sshd()
    except BenchError as error:
        options.say(f"one host only: {error}")
        return False
    return True


def _master(hosts: Any, speculation: bool, config: Path | None = None) -> Master:
    return Master(hosts, ssh_config=config, speculation=speculation)
