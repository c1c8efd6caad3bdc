"""Facts about the machine, for whoever compares figures from different machines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import zmq

from qjam_bench.ends import CHECKOUT
from qjam_bench.rivals import PARTIES


def facts() -> dict[str, Any]:
    """Give facts about the machine, the versions of python and of all installed parties, and the commit."""
    return {
        "platform": platform.platform(),
        "kernel": platform.release(),
        "cpu": _cpu() or platform.processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {**versions(), "libzmq": zmq.zmq_version()},
        "mpi": _first_line("mpiexec", "--version"),
        "revision": _first_line("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """Give the versions of the parties' packages that are installed."""
    found = {}
    for name in (name for rival in PARTIES.values() for name in rival.distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def _first_line(*command: str) -> str:
    """Give the first line that a program prints; "" if it is not installed or fails."""
    try:
        done = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0]
