"""Hosts with networks of their own on this machine: sshds in network namespaces, whose links have a rate."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .figures import BenchError
from .hosts import checkout_sshd, same_python, support

TRIPS = 300
SIZE = 64  # bytes of a round trip
ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    with server.accept()[0] as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := link.recv(4096):
            link.sendall(data)
"""


@contextmanager
def hosts(number: int, rate: str) -> Iterator[tuple[list[dict[str, Any]], str, Any]]:
    """Run `number` ssh hosts, each at the far end of a link of this rate (as tc knows it) from this machine.

    Yields the arguments of a HostSpec for each, with one worker, the file of an ssh_config, and the first's namespace.
    BenchError if they cannot be here.
    """
    sshd, namespaces = checkout_sshd(), support("namespaces")
    if lacks := namespaces.namespaces_work():
        raise BenchError(lacks)
    with tempfile.TemporaryDirectory(prefix="qjam-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        networks = [stack.enter_context(namespaces.namespace()) for _ in range(number)]
        for network in networks:
            _shape(network, rate)
        running = [
            stack.enter_context(
                sshd.private_sshd(folder, name=f"testhost{index}", address=network.host, namespace=network.name)
            )
            for index, network in enumerate(networks)
        ]
        config = sshd.write_config(folder / "ssh_config", running)
        specs = [{"host": one.name, "python": same_python(), "workers": 1} for one in running]
        yield specs, str(config), networks[0]


def _shape(network: Any, rate: str) -> None:
    limits = ["root", "tbf", "rate", rate, "burst", "128kb", "limit", "16mb"]
    near = ["tc", "qdisc", "add", "dev", network.name, *limits]
    far = network.command("tc", "qdisc", "add", "dev", "eth0", *limits)
    for command in (near, far):
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BenchError(f"no link of {rate}: {getattr(error, 'stderr', '') or error}") from error


def round_trips(network: Any) -> list[float]:
    """Give the seconds of each of many round trips of a small message, over TCP, to a process in a namespace."""
    command = network.command(sys.executable, "-c", ECHO, network.host)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with socket.create_connection((network.host, port)) as link:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return [_trip(link) for _ in range(TRIPS)]
        finally:
            process.kill()


def _trip(link: socket.socket) -> float:
    began = time.perf_counter()
    link.sendall(bytes(SIZE))
    left = SIZE
    while left:
        left -= len(link.recv(left))
    return time.perf_counter() - began
