"""The MPI program: mpiexec -n W python ranks.py ADDRESS FUNCTION. Rank 0 is both the root and a worker.

Between loops every rank sleeps at a socket of its own, since waiting inside MPI burns a core. What is timed is
timed by rank 0 and holds the collectives and the function alone.
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
    """What a rank does when it is told to; each method is called in all ranks at once."""

    def __init__(self, name: str) -> None:
        """`name`: that of the function in qjam_bench_work."""
        self.function = getattr(qjam_bench_work, name)
        self.part: Any = None
        self.total = np.empty(0)

    def load(self, shape: tuple[int, int], data: Any) -> float:
        """Scatter the rows of an array that rank 0 has; gives the seconds until all have theirs."""
        rows = [len(part) for part in np.array_split(np.empty((shape[0], 0)), COMM.Get_size())]
        counts = np.array(rows) * shape[1]
        COMM.Barrier()
        began = time.perf_counter()
        self.part = np.empty((rows[RANK], shape[1]))
        COMM.Scatterv([data, counts, MPI.DOUBLE] if RANK == 0 else None, self.part)
        COMM.Barrier()
        return time.perf_counter() - began

    def drive(self, loop: str, size: int, *arguments: Any) -> Any:
        """Run a loop in rank 0, over rounds with `size` params; the others take part until they are told the end."""
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
        """One round: the sum is in a buffer that the next one uses again."""
        COMM.Bcast(params)
        result = self.function(params, self.part)
        if self.total.shape != result.shape:
            self.total = np.empty_like(result)
        COMM.Reduce(result, self.total)
        return self.total


def main(address: str, name: str) -> None:
    """Do what the socket says until it closes; rank 0 answers with what it got, or an error."""
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
