"""Measure how much memory a large data set takes in master and host, and how much of a .npy file is sent."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qjam import NumpyMatrixFileDataSet
from qjam_bench.harness import hosts, options
from qjam_bench.harness.figures import BenchError
from qjam_bench.rivals import turns
from qjam_bench.rivals.qjam import shipped

from . import footprint, report

MIB = 1 << 20
SHOWN = ("sent", "master", "relay", "everything")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.counts, default="1,8", metavar="N,N", help="of the host (1,8)")
    parser.add_argument("--megabytes", type=options.count, default=1024, metavar="N", help="MiB of the data set (1024)")
    parser.add_argument(
        "--route",
        type=options.routes,
        default="local,direct",
        metavar="R,R",
        help=f"routes, from {', '.join(hosts.ROUTES)} (local,direct)",
    )
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    options.say(f"A data set of {arguments.megabytes} MiB, in the master's memory from the start. In MiB:")
    options.say("  sent: how much of it went to nodes; master: the master's peak minus what it used before; relay: the")
    options.say(
        "  same for the process that holds the ssh connection; everything: all processes and the nodes' files, after\n"
        "  minus before. copies: everything / size of the data set\n"
    )
    options.say(f"{'route':<8} {'workers':>7} " + " ".join(f"{name:>10}" for name in SHOWN) + "  copies")
    rows = []
    for route in arguments.route:
        for workers in arguments.workers:
            rows.append({"route": route, "workers": workers, **_measured(route, workers, arguments.megabytes)})
            shown = " ".join(f"{rows[-1][name] / MIB:>10.1f}" for name in SHOWN)
            options.say(f"{route:<8} {workers:>7} {shown}  {rows[-1]['everything'] / rows[-1]['bytes']:.2f}")
    options.say("\nA .npy file that the host sees at the same path, in MiB:\n")
    options.say(f"{'route':<8} {'workers':>7} {'size':>10} {'sent':>10}")
    files = []
    for route in arguments.route:
        files.append({"route": route, **of_file(route, max(arguments.workers), arguments.megabytes)})
        shown = " ".join(f"{files[-1][name] / MIB:>10.1f}" for name in ("bytes", "sent"))
        options.say(f"{route:<8} {max(arguments.workers):>7} {shown}")
    report.keep(arguments, rows, {"files": files})
    if arguments.plot:
        from qjam_bench.harness import plots

        plots.memory(arguments.plot, rows, SHOWN)
    return 0


def _measured(route: str, workers: int, megabytes: int) -> dict[str, Any]:
    """Give the footprint, measured in a new process, because a peak does not come down again."""
    turns.progress(f"{route}, {workers} workers")
    command = [sys.executable, "-m", "qjam_bench.experiments.footprint", route, str(workers), str(megabytes)]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    turns.progress("")
    if done.returncode:
        raise BenchError(f"{route}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_file(route: str, workers: int, megabytes: int) -> dict[str, Any]:
    """Give the size of a .npy file, and how many of its bytes are sent until all workers have read their slices."""
    with tempfile.TemporaryDirectory(prefix="qjam-bench-") as folder:
        path = Path(folder, "data.npy")
        array = np.lib.format.open_memmap(
            path, "w+", np.float64, (megabytes * MIB // 8 // footprint.COLUMNS, footprint.COLUMNS)
        )
        array[:] = np.arange(float(len(array)))[:, None]  # whole numbers, so sums are exact; no two slices are equal
        array.flush()
        with shipped() as module, hosts.pool(workers, route) as master:
            total = master.run(module.look, footprint.SUM, NumpyMatrixFileDataSet(path))[0]
            if total != array.sum():
                raise BenchError(f"a wrong sum: {total}, not {array.sum()}")
            return {"bytes": array.nbytes, "sent": master.stats().dataset_sent}
