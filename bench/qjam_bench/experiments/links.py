"""Measure what a real link costs the master, for docs/scale.md: `python -m qjam_bench.experiments.links`.

The figures are the CPU of a TASK to a node and its RESULT back (3,934 float64 each way, TCP and CURVE, libzmq's thread
included), memory and descriptors of an idle link, and the CPU to decode a root and to add it to another one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import zmq

from qjam.engine.router import Keys, Router
from qjam_worker.values import codec
from qjam_worker.values.reduction import default_reduce
from qjam_worker.wire.frames import Buffer, Kind, pack

VALUES = 3934  # float64
PATIENCE = 60.0  # seconds for all nodes to answer


def _echo(endpoint: str, keys: dict[str, Keys]) -> None:
    """Play all nodes, in a process of its own: send back every message, until killed."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, len(keys) + 16)
    poller = zmq.Poller()
    for name, (server, public, secret) in keys.items():
        socket = context.socket(zmq.DEALER)
        socket.identity = name.encode()
        socket.curve_serverkey, socket.curve_publickey = server.encode(), public.encode()
        socket.curve_secretkey = secret.encode()
        socket.connect(endpoint)
        socket.send(b"hello")
        poller.register(socket, zmq.POLLIN)
    while True:
        for socket, _ in poller.poll():
            socket.send_multipart(socket.recv_multipart(copy=False), copy=False)


def measure(nodes: int, rounds: int) -> dict[str, float]:
    """Give the figures by name."""
    router = Router()
    endpoint = router.bind("127.0.0.1")
    before = _resident(), _descriptors()
    keys = {f"host{number}/1": router.admit(f"host{number}/1") for number in range(nodes)}
    process = multiprocessing.get_context("spawn").Process(target=_echo, args=(endpoint, keys), daemon=True)
    process.start()
    try:
        _receive(router, nodes)
        held, opened = _resident() - before[0], _descriptors() - before[1]
        value = codec.encode(np.arange(float(VALUES)))
        frames: list[Buffer] = [value.header, *value.buffers]
        header = {"job": 1, "round": 1, "indices": list(range(16)), "params": "inline"}
        began, clock = time.process_time(), time.perf_counter()
        for _ in range(rounds):
            for name in keys:
                router.send(name, pack(Kind.TASK, header, frames))
            _receive(router, nodes)
        spent, took = time.process_time() - began, time.perf_counter() - clock
    finally:
        process.kill()
        process.join()
        router.close()
    return {
        "us of CPU to send a TASK and receive as much": 1e6 * spent / (rounds * nodes),
        "us of wall clock for the same, with the nodes on another core": 1e6 * took / (rounds * nodes),
        "bytes of memory per idle link": held / nodes,
        "descriptors per link": opened / nodes,
        "us of CPU to decode a root": _each(lambda: codec.decode(value.header, value.buffers, copy=True)),
        "us of CPU to add two roots": _each(lambda: default_reduce(sums, sums)),
    }


sums = np.arange(float(VALUES))


def _receive(router: Router, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while count:
        router.answer_zap()
        router.link.stir()
        while router.receive() is not None:
            count -= 1
        if count and not router.link.socket.poll(1) and time.monotonic() > deadline:
            raise RuntimeError(f"{count} nodes do not answer")


def _each(call: Callable[[], object], times: int = 2000) -> float:
    began = time.process_time()
    for _ in range(times):
        call()
    return 1e6 * (time.process_time() - began) / times


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> int:
    """Measure and print; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qjam_bench.experiments.links", description=__doc__)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    for what, value in measure(arguments.nodes, arguments.rounds).items():
        sys.stdout.write(f"{value:12,.1f}  {what}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
