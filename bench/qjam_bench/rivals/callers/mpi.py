"""mpi4py.futures: MPIPoolExecutor, whose workers MPI starts beside this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qjam_bench.harness.caller import Caller, Futures

# For Open MPI: as root; more processes than cores, which then yield the core while they wait.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


@contextmanager
def party(workers: int) -> Iterator[Caller]:
    """Run its processes."""
    os.environ.update(SETTINGS)  # before MPI starts, at the import
    from mpi4py.futures import MPIPoolExecutor

    with MPIPoolExecutor(workers, main=False) as executor:
        executor.bootup(wait=True)
        yield Futures(executor)
