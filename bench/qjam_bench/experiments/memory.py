"""What a large data set costs in memory: the master while it sends, a host however many workers it has, a .npy file."""

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
        help=f"of {', '.join(hosts.ROUTES)}; default local,direct",
    )
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and tell; gives the exit status."""
    options.say(f"{arguments.megabytes} MiB, in the master's memory before; in MiB:")
    options.say("  sent: of the data set, to nodes; master: its peak over what it used before; relay: the same of the")
    options.say(
        "  process that holds the ssh connection; everything: what all processes and nodes' files use more after\n"
    )
    options.say(f"{'route':<8} {'workers':>7} " + " ".join(f"{name:>10}" for name in SHOWN) + "  copies")
    rows = []
    for route in arguments.route:
        for workers in arguments.workers:
            rows.append({"route": route, "workers": workers, **_measured(route, workers, arguments.megabytes)})
            shown = " ".join(f"{rows[-1][name] / MIB:>10.1f}" for name in SHOWN)
            options.say(f"{route:<8} {workers:>7} {shown}  {rows[-1]['everything'] / rows[-1]['bytes']:.2f}")
    options.say("\na .npy file that the host sees at the same path, in MiB:\n")
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
    """Give the footprint, taken in a process of its own: peaks do not come down."""
    turns.progress(f"{route}, {workers} workers")
    command = [sys.executable, "-m", "qjam_bench.experiments.footprint", route, str(workers), str(megabytes)]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    turns.progress("")
    if done.returncode:
        raise BenchError(f"{route}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_file(route: str, workers: int, megabytes: int) -> dict[str, Any]:
    """Give the bytes of a .npy file, and those of it that were sent when all workers have read their slices."""
    with tempfile.TemporaryDirectory(prefix="qjam-bench-") as folder:
        path = Path(folder, "data.npy")
        array = np.lib.format.open_memmap(
            path, "w+", np.float64, (megabytes * MIB // 8 // footprint.COLUMNS, footprint.COLUMNS)
        )
        array[:] = np.arange(float(len(array)))[:, None]  # whole numbers: sums are exact; no two slices are the same
        array.flush()
        with shipped() as module, hosts.pool(workers, route) as master:
            total = master.run(module.look, footprint.SUM, NumpyMatrixFileDataSet(path))[0]
            if total != array.sum():
                raise BenchError(f"a wrong sum: {total}, not {array.sum()}")
            return {"bytes": array.nbytes, "sent": master.stats().dataset_sent}
