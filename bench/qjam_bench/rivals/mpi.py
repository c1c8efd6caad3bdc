"""mpi4py: Bcast and Reduce of buffers among as many ranks as there are workers; rank 0 is both root and worker.

The loop runs in rank 0, so that its times hold the collectives and no pipe. See ends/ranks.py.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qjam_bench import ends
from qjam_bench.ends import loops
from qjam_bench.harness.party import Party

# Allow more ranks than cores: Open MPI then yields the core while it waits.
MPIEXEC = ("mpiexec", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none")
START_S = 60.0  # seconds for a rank to connect


class Mpi(Party):
    """An MPI program, driven over one socket per rank."""

    def __init__(self, ranks: list[Any]) -> None:
        """`ranks`: their connections, rank 0's first."""
        self._ranks = ranks

    def load(self, data: Any) -> float:
        return float(self._all("load", data.shape, data))

    def drive(self, loop: Callable[..., Any], *arguments: Any) -> Any:
        return self._all("drive", loop.__name__, len(arguments[0]), *arguments)

    def round(self, params: Any) -> Any:
        return self.drive(loops.once, params)

    def _load(self, data: Any) -> None:
        self.load(data)

    def _all(self, method: str, *arguments: Any) -> Any:
        """Call a method in all ranks and give rank 0's answer; only rank 0 gets the arrays among the arguments."""
        small = [None if isinstance(argument, np.ndarray) else argument for argument in arguments]
        for rank in self._ranks[1:]:
            rank.send((method, small))
        self._ranks[0].send((method, arguments))
        answer = self._ranks[0].recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run an MPI program with `workers` ranks."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qjam-bench-"))
        address = os.path.join(folder, "mpi")
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen(workers)
        listener.settimeout(START_S)
        command = [*MPIEXEC, "-n", str(workers), *ends.program("ranks", address, function)]
        stack.enter_context(ends.child(command))
        found: dict[int, Any] = {}
        for _ in range(workers):
            accepted = listener.accept()[0]
            accepted.setblocking(True)
            rank = stack.enter_context(Connection(accepted.detach()))
            found[rank.recv()] = rank
        yield Mpi([found[number] for number in range(workers)])
