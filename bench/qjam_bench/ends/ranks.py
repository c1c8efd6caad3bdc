"""The MPI program: mpiexec -n W python ranks.py ADDRESS FUNCTION. Rank 0 is both the root and a worker.

Between loops every rank sleeps at a socket of its own, since a rank that waits inside MPI occupies a core. Rank 0
measures the time, which is that of the collectives and of the function alone.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Client
from typing import Any

import loops
import numpy as np
import qjam_bench_work
from mpi4py import MPI

COMM = MPI.COMM_WORLD
RANK = COMM.Get_rank()


class Rank:
    """What a rank can do. All ranks call the same method at the same time."""

    def __init__(self, name: str) -> None:
        """`name`: of a function in qjam_bench_work."""
        self.function = getattr(qjam_bench_work, name)
        self.part: Any = None
        self.total = np.empty(0)

    def load(self, shape: tuple[int, int], data: Any) -> float:
        """Scatter the rows of an array that rank 0 has; gives the seconds until every rank has its rows."""
        rows = [len(part) for part in np.array_split(np.empty((shape[0], 0)), COMM.Get_size())]
        counts = np.array(rows) * shape[1]
        COMM.Barrier()
        began = time.perf_counter()
        self.part = np.empty((rows[RANK], shape[1]))
        COMM.Scatterv([data, counts, MPI.DOUBLE] if RANK == 0 else None, self.part)
        COMM.Barrier()
        return time.perf_counter() - began

    def drive(self, loop: str, size: int, *arguments: Any) -> Any:
        """Run a loop in rank 0, over rounds with `size` params; the other ranks take part until they receive NaN."""
        if RANK == 0:
            try:
                return getattr(loops, loop)(self.play, *arguments)
            finally:
                COMM.Bcast(np.full(size, np.nan))
        params = np.empty(size)
        while True:
            COMM.Bcast(params)
            if np.isnan(params[0]):
                return None
            COMM.Reduce(self.function(params, self.part), None)

    def play(self, params: Any) -> Any:
        """Play one round and give the sum, in a buffer that the next round overwrites."""
        COMM.Bcast(params)
        result = self.function(params, self.part)
        if self.total.shape != result.shape:
            self.total = np.empty_like(result)
        COMM.Reduce(result, self.total)
        return self.total


def main(address: str, name: str) -> None:
    """Call the methods that come over the socket until it closes; rank 0 sends back the answer, or the error."""
    rank = Rank(name)
    with Client(address, "AF_UNIX") as connection:
        connection.send(RANK)
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                break
            try:
                answer = getattr(rank, method)(*arguments)
            except ArithmeticError as error:
                answer = error
            if RANK == 0:
                connection.send(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
