"""`qjam doctor`: start qjam on hosts, tell how each phase of that went, and measure the way to those that start."""

from __future__ import annotations

import argparse
import logging
import operator
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

import qjam
from qjam.hosts import resolve
from qjam.report import NOTHING, failures, table

SUMMARY = "Start qjam on hosts, tell how each phase went, and measure the way to those that start."
LEGEND = """\
The table has the seconds of each phase of the start, which are those of `qjam.Master`: resolve (the name), connect,
host key, auth (the login), python (its start), bundle (what the host lacks is sent and imported), way back (from the
host to here), ready (its workers are up). route: local, direct, tunnel or stdio. version: that of python there.
ping: median of 11 small messages to the host's node and back. MB/s: 32 MiB of random data, sent once as the slice of
a data set, from the call of run to its result; on a slow line 1 MiB.
"""
EXAMPLES = """\
  %(prog)s alice@node1 node2:2222 "node3*8"
  %(prog)s --accept-new --route tunnel node4

The exit status is 1 when a host failed, and 2 for a wrong argument.
"""

PINGS = 11
MIB = 1 << 20
LARGE, SMALL = 32 * MIB, MIB
SLOW = 1.0  # seconds for the small one, after which the large one is not sent
ROUND_TIMEOUT = 120.0
TICK = 0.2  # seconds between two looks of the line that tells what is awaited
CLEAR_LINE = "\r\033[K"
HEADINGS = ("workers", "version", "ping ms", "MB/s")


def start(specs: list[qjam.HostSpec], options: Mapping[str, Any]) -> list[qjam.HostReport]:
    """Start all hosts as one master does, and stop them; how that went, host by host."""
    try:
        with qjam.Master(specs, **options) as master:
            return master.start_reports
    except qjam.BootstrapError as error:
        if not error.hosts:
            raise
        return error.hosts


def measure(spec: qjam.HostSpec, options: Mapping[str, Any]) -> list[str]:
    """What HEADINGS announce, of a host that has the line for itself. Raises QjamError or TimeoutError."""
    with qjam.Master(spec, **options) as master:
        # Functions of python's own, which every host finds by name: a function of this file would need qjam there, or
        # travel as byte code, which another version of python cannot read.
        version = ModuleType("version")
        version.__dict__.update(mapfunc=eval, reduce=max)
        python = master.run(version, "__import__('platform').python_version()", timeout=ROUND_TIMEOUT)
        ping = statistics.median(master.workers[0].ping() for _ in range(PINGS))
        seconds, size = _send(master, SMALL), SMALL
        if seconds < SLOW:
            seconds, size = _send(master, LARGE), LARGE
        rate = size / seconds / 1e6
        return [str(len(master.workers)), python, f"{ping * 1e3:.1f}", f"{rate:.{0 if rate >= 10 else 1}f}"]


def _send(master: qjam.Master, size: int) -> float:
    """Seconds for so many bytes to one worker, and for its word that it has them."""
    data = qjam.DataSet(np.random.default_rng().integers(0, 256, (1, size), np.uint8), slice_size=1)
    began = time.perf_counter()
    master.run(operator.is_not, None, data, timeout=ROUND_TIMEOUT)
    return time.perf_counter() - began


@contextmanager
def waiting(for_what: str) -> Iterator[None]:
    """Tell on a terminal what is awaited, and for how long already."""
    if not _terminal(sys.stderr):
        yield
        return
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while True:
            print(f"{CLEAR_LINE}{for_what}: {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
            if over.wait(TICK):
                break

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def examine(specs: list[qjam.HostSpec], options: Mapping[str, Any]) -> list[qjam.HostReport]:
    """Start and measure the hosts, and print the table; gives the reports."""
    count = f"{len(specs)} host{'' if len(specs) == 1 else 's'}"
    with waiting(f"starting {count}"):
        reports = start(specs, options)
    rows = []
    for number, (spec, report) in enumerate(zip(specs, reports, strict=True), 1):
        figures = [NOTHING] * len(HEADINGS)
        if report.failed is None:
            with waiting(f"measuring {spec.address} ({number} of {count})"):
                try:
                    figures = measure(spec, options)
                except (qjam.QjamError, TimeoutError) as error:
                    report.failed, report.why = "", f"it started, but then: {error}"
        rows.append(figures)
    columns = zip(HEADINGS, *rows, strict=True)
    print(table(reports, colour=_terminal(sys.stdout) and not os.environ.get("NO_COLOR"), more=list(columns)))
    return reports


def main(arguments: Sequence[str], program: str = "qjam-doctor") -> int:
    """Read the arguments of the command line, look at the hosts; gives the exit status. Errors begin with
    `program`.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=SUMMARY,
        epilog=f"{LEGEND}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("hosts", metavar="HOST", nargs="+", help='as for Master: "alice@node1:2222*8", "node2*auto"')
    parser.add_argument("--ssh-config", metavar="FILE", help="a file to read in place of ~/.ssh/config")
    parser.add_argument("--accept-new", action="store_true", help="add host keys that are not known to known_hosts")
    parser.add_argument("--route", choices=["direct", "tunnel", "stdio"], help="the one way back to try (default: all)")
    args = parser.parse_args(arguments)

    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter(f"{CLEAR_LINE if _terminal(sys.stderr) else ''}%(message)s"))
    logging.getLogger("qjam").addHandler(notes)
    options = {
        "echo": False,
        "host_keys": "accept-new" if args.accept_new else "known",
        "ssh_config": args.ssh_config,
        "route": args.route,
    }
    try:
        return 1 if failures(examine(resolve(args.hosts), options)) else 0
    except ValueError as error:  # names that are no hosts, a file that is not there
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except qjam.QjamError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
