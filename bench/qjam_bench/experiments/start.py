"""Measure the time from nothing to the first answer: of workers on this machine, and of ssh hosts, cold and warm."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from qjam import Master
from qjam_bench import rivals
from qjam_bench.harness import options
from qjam_bench.harness.figures import BenchError, Figure, PartyLost, Spread, number
from qjam_bench.harness.hosts import Host, named_host, private_hosts
from qjam_bench.rivals import turns
from qjam_bench.rivals.qjam import shipped

from . import report

HOSTS = 8  # started in parallel
CLEAN_PYTHON = "/usr/bin/python3 -I"  # for a cold start: it does not see the user's packages
BUNDLED = ("numpy", "zmq", "msgpack", "msgpack_numpy")  # what qjam sends to a host that lacks it
ONE = "def mapfunc(params, dataset):\n    return 1\n"


class Start(NamedTuple):
    """One start, in seconds: until the first answer, and the parts of that, if the party tells them."""

    seconds: float
    parts: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--workers", type=options.count, default=8, metavar="N", help="workers of the host (8)")
    parser.add_argument("--turns", type=options.count, default=5, metavar="N", help="counted turns of each party (5)")
    parser.add_argument(
        "--route", choices=("local", "ssh"), default="local", help="local (default): beside the rivals; ssh: ssh hosts"
    )
    parser.add_argument("--host", metavar="HOST", help="[user@]host[:port] (default: private sshds on this machine)")
    parser.add_argument("--ssh-config", type=Path, metavar="FILE", help="to read in place of ~/.ssh/config for --host")
    rivals.add_against(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    where = arguments.host or ("ssh hosts" if arguments.route == "ssh" else "this machine")
    options.say(f"from nothing to the first answer of {arguments.workers} workers, {where}\n")
    figures = measure(arguments)
    status = report.finish(arguments, figures, f"start, {where}")
    if told := [one for one in figures if one.more.get("parts")]:
        options.say(
            "\nparts of a start, median ms (of several hosts the median one; process: the start of the host process)"
        )
        for one in told:
            parts = [f"{part} {number(1e3 * Spread.of(seconds).median)}" for part, seconds in one.more["parts"].items()]
            options.say(f"{one.party:<12} {', '.join(parts)}")
    return status


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Give one figure per party or way to start."""
    if arguments.ssh_config and not arguments.host:
        raise BenchError("--ssh-config is for a --host; a private sshd has its own")
    return _ssh(arguments) if arguments.host or arguments.route == "ssh" else _local(arguments)


def _local(arguments: argparse.Namespace) -> list[Figure]:
    names = rivals.chosen(arguments.against)
    parties = {name: partial(_once, name, arguments.workers) for name in names}
    lost = rivals.absent(arguments.against)
    what = f"{arguments.workers} workers"
    starts = turns.take_turns(parties, arguments.turns, lost=lost)
    return _figures(what, starts, {}) + turns.figures(what, {}, lost)


def _once(name: str, workers: int) -> Start:
    """Start one party in a process of its own, apart from the threads and the memory of the others."""
    command = [sys.executable, "-m", "qjam_bench.rivals.once", name, str(workers)]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise PartyLost(name, f"does not start: {done.stderr.strip()[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return Start(told["seconds"], {"imports before": told["imports"]})


def _ssh(arguments: argparse.Namespace) -> list[Figure]:
    workers = arguments.workers
    with ExitStack() as stack:
        module = stack.enter_context(shipped(ONE))
        python = os.environ.get("QJAM_REMOTE_PYTHON") or CLEAN_PYTHON
        if arguments.host:
            hosts = [named_host(arguments.host, arguments.ssh_config)]
        else:
            hosts = stack.enter_context(private_hosts(HOSTS, python))
        one = hosts[0]
        parties = {"ssh true": partial(ssh_true, one), "warm": partial(qjam_start, [one], workers, module)}
        references = {}
        if not arguments.host:
            if lacks_bundled(python):
                parties["cold"] = partial(cold_start, one, workers, module)
            else:
                options.say(f"no cold start: {python} is not here or has one of {', '.join(BUNDLED)}")
            parties |= {
                "1 host": partial(qjam_start, [one], 1, module),
                "8 hosts": partial(qjam_start, hosts, 1, module),
            }
            references = {"8 hosts": "1 host"}
        starts = turns.take_turns(parties, arguments.turns)
    what = f"{one.spec}" if arguments.host else "a private sshd"
    return _figures(what, starts, {**dict.fromkeys(parties, "ssh true"), **references})


def _figures(what: str, starts: dict[str, list[Start]], references: dict[str, str]) -> list[Figure]:
    figures = []
    for name, taken in starts.items():
        parts = {part: [start.parts[part] for start in taken] for part in taken[0].parts}
        figure = Figure(what, name, [start.seconds for start in taken], more={"parts": parts})
        figures.append(figure._replace(against=references.get(name, figure.against)))
    return figures


def ssh_true(host: Host) -> Start:
    """Measure how long `ssh HOST true` takes."""
    began = time.perf_counter()
    done = subprocess.run(host.command("true"), check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise BenchError(f"ssh {host.spec} true: {done.stderr.strip()} (exit status {done.returncode})")
    return Start(seconds, {})


def qjam_start(hosts: Sequence[Host], workers: int, module: ModuleType) -> Start:
    """Measure a master from nothing to the first answer of `workers` workers on each of these hosts."""
    specs = [replace(host.spec, workers=workers) for host in hosts]
    began = time.perf_counter()
    with Master(specs, ssh_config=hosts[0].config) as master:
        started = time.perf_counter()
        answer = master.run(module)
        ended = time.perf_counter()
        if answer != workers * len(hosts):
            raise BenchError("qjam gave a wrong sum")
        reports = master.start_reports
    phases = {phase: float(np.median([report.phases[phase] for report in reports])) for phase in reports[0].phases}
    rest = started - began - max(sum(report.phases.values()) for report in reports)
    return Start(ended - began, {"process": rest, **phases, "answer": ended - started})


def cold_start(host: Host, workers: int, module: ModuleType) -> Start:
    """Measure the start of a host that has an empty home, and so no part of qjam."""
    assert host.home is not None
    shutil.rmtree(host.home)
    host.home.mkdir()
    taken = qjam_start([host], workers, module)
    if not any(host.home.glob(".cache/qjam/*")):
        raise BenchError("this was no cold start: the host has qjam's parts outside its home")
    return taken


def lacks_bundled(python: str) -> bool:
    """Whether this python, as run by a shell, lacks all packages of BUNDLED."""
    program = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(name) for name in {BUNDLED!r}))"
    command = ["/bin/sh", "-c", f"exec {python} -c {shlex.quote(program)}"]
    return not subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode
