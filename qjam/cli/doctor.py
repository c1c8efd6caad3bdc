"""`qjam doctor`: start qjam on hosts, report each phase of the start, and measure the connection to each host."""

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
from typing import Any

import numpy as np

import qjam
from qjam.hosts import resolve
from qjam.report import NOTHING, failures, table

SUMMARY = "Start qjam on hosts, report each phase of the start, and measure the connection to each host."
LEGEND = """\
The table has the seconds of each phase of the start, the same phases as for `qjam.Master`: resolve (the name),
connect, host key, auth (the login), python (it starts), bundle (missing packages are sent and imported), way back
(the host connects to this machine), ready (its workers start). route: local, direct, tunnel or stdio. version: of
python on the host. ping: median of 11 small messages to the host's node and back. MB/s: one slice of 32 MiB of random
data, from the call of run to its result; 1 MiB on a slow connection.
"""
EXAMPLES = """\
  %(prog)s alice@node1 node2:2222 "node3*8"
  %(prog)s --accept-new --route tunnel node4

The exit status is 1 if a host fails, and 2 for a wrong argument.
"""

PINGS = 11
MIB = 1 << 20
LARGE, SMALL = 32 * MIB, MIB
SLOW = 1.0  # seconds: if SMALL takes longer, LARGE is not sent
ROUND_TIMEOUT = 120.0
TICK = 0.2  # seconds between two updates of the progress line
CLEAR_LINE = "\r\033[K"
HEADINGS = ("workers", "version", "ping ms", "MB/s")


def start(specs: list[qjam.HostSpec], options: Mapping[str, Any]) -> list[qjam.HostReport]:
    """Start all hosts with one master, and stop them. Returns one report per host, also for those that failed."""
    try:
        with qjam.Master(specs, **options) as master:
            return master.start_reports
    except qjam.BootstrapError as error:
        if not error.hosts:
            raise
        return error.hosts


def measure(spec: qjam.HostSpec, options: Mapping[str, Any]) -> list[str]:
    """Start one host alone and return its cells for the columns HEADINGS. Raises QjamError or TimeoutError."""
    with qjam.Master(spec, **options) as master:
        # Built-in functions, which every host finds by name. A function of this file would need qjam on the host, or be
        # sent as byte code, which another version of python cannot read.
        python = master.run(eval, "__import__('platform').python_version()", reduce=max, timeout=ROUND_TIMEOUT)
        ping = statistics.median(master.workers[0].ping() for _ in range(PINGS))
        seconds, size = _send(master, SMALL), SMALL
        if seconds < SLOW:
            seconds, size = _send(master, LARGE), LARGE
        rate = size / seconds / 1e6
        return [str(len(master.workers)), python, f"{ping * 1e3:.1f}", f"{rate:.{0 if rate >= 10 else 1}f}"]


def _send(master: qjam.Master, size: int) -> float:
    """Return the seconds to send `size` bytes to one worker and get its answer."""
    data = qjam.DataSet(np.random.default_rng().integers(0, 256, (1, size), np.uint8), slice_size=1)
    began = time.perf_counter()
    master.run(operator.is_not, None, data, timeout=ROUND_TIMEOUT)
    return time.perf_counter() - began


@contextmanager
def waiting(for_what: str) -> Iterator[None]:
    """Show on a terminal what the block waits for, and for how long so far."""
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
    """Start and measure the hosts, and print the table. Returns the reports."""
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
                    report.failed, report.why = "", f"it started, but then failed: {error}"
        rows.append(figures)
    columns = zip(HEADINGS, *rows, strict=True)
    print(table(reports, colour=_terminal(sys.stdout) and not os.environ.get("NO_COLOR"), more=list(columns)))
    return reports


def main(arguments: Sequence[str], program: str = "qjam-doctor") -> int:
    """Parse the command line and examine the hosts. Returns the exit status. Errors begin with `program`."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=SUMMARY,
        epilog=f"{LEGEND}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("hosts", metavar="HOST", nargs="+", help='as for Master: "alice@node1:2222*8", "node2*auto"')
    parser.add_argument("--ssh-config", metavar="FILE", help="a file to read in place of ~/.ssh/config")
    parser.add_argument("--accept-new", action="store_true", help="add unknown host keys to known_hosts")
    parser.add_argument(
        "--route", choices=["direct", "tunnel", "stdio"], help="try only this route (default: all three)"
    )
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
    except ValueError as error:  # a wrong host, or a file that does not exist
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except qjam.QjamError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
