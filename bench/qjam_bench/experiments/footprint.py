"""Measure how much memory one data set takes, in a process that has nothing but the master in it.

python -m qjam_bench.experiments.footprint ROUTE WORKERS MEGABYTES prints what `of` gives, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qjam import DataSet
from qjam_bench import ends
from qjam_bench.harness import hosts
from qjam_bench.harness.processes import below, proc_text
from qjam_bench.rivals.qjam import shipped

MIB = 1 << 20
COLUMNS = 64
LOOK, SUM = np.zeros(1), np.ones(1)
OURS = re.compile(r"(/\S*/qjam-(?!bench)[^/\s]+)/\S*$", re.MULTILINE)  # folders of nodes, in /proc/PID/maps


def of(route: str, workers: int, megabytes: int) -> dict[str, Any]:
    """Send the slices of an array that is in memory here to all workers; give how much memory grows, in bytes.

    bytes: the size of the array. sent: how much of it went to nodes. master: the peak of this process's resident memory
    minus what it was before. relay: the same for the process that holds the ssh connection. everything: what all
    processes and the nodes' files use, each page counted once, after minus before.
    """
    data = np.random.default_rng(0).integers(0, 1 << 20, megabytes * MIB // 8).astype(np.float64).reshape(-1, COLUMNS)
    with shipped() as module, hosts.pool(workers, route) as master:
        master.run(module.look, SUM, np.ones((4 * workers, COLUMNS)))  # starts everything; only the data is missing
        leases = [pid for pid in below(os.getpid()) if "qjam.launch.host_process" in proc_text(pid, "cmdline")]
        for pid in (os.getpid(), *leases):
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak
        before = {pid: _status(pid, "VmRSS") for pid in (os.getpid(), *leases)}
        whole, sent = _everything(), master.stats().dataset_sent
        total = master.run(module.look, SUM, DataSet(data))[0]
        grown = {pid: _status(pid, "VmHWM") - was for pid, was in before.items()}
        if total != data.sum():
            raise SystemExit("a wrong sum")
        return {
            "bytes": data.nbytes,
            "sent": master.stats().dataset_sent - sent,
            "master": grown.pop(os.getpid()),
            "relay": max(grown.values(), default=0),
            "everything": _everything() - whole,
        }


def _everything() -> int:
    """Give the bytes that this process, its descendants and the nodes' files use, each page counted once.

    Pages of programs and libraries do not count: their share (Pss_File) falls when any other process maps them too.
    """
    pids = {os.getpid(), *below(os.getpid())}
    used = 0
    folders: set[Path] = set()
    for pid in pids:
        fields = dict(line.split(":", 1) for line in proc_text(pid, "smaps_rollup").splitlines()[1:])
        used += int(fields["Pss_Anon"].split()[0]) * 1024 if "Pss_Anon" in fields else 0
        folders |= {Path(found) for found in OURS.findall(proc_text(pid, "maps"))}
    return used + sum(file.stat().st_blocks * 512 for folder in folders for file in folder.iterdir())


def _status(pid: int, name: str) -> int:
    """Give one line of /proc/PID/status, in bytes."""
    return next(
        int(line.split()[1]) * 1024 for line in proc_text(pid, "status").splitlines() if line.startswith(f"{name}:")
    )


if __name__ == "__main__":
    ends.prepare()
    sys.stdout.write(json.dumps(of(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))) + "\n")
