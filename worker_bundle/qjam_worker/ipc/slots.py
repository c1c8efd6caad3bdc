"""The names and the size of what a worker writes results to: a slot for small ones, a file for each large one."""

from __future__ import annotations

# Bytes of the largest value that is copied through a slot; a larger one gets a file of its own, which user code may
# keep mapped. To copy 256 KiB takes about 25 us, to make and map a file about 60.
SLOT = 256 * 1024

SLOTS = "slots"  # the file that has the slots of all workers


def result_prefix(worker: int, pid: int) -> str:
    """The prefix of the names of the files that a worker process makes for results too large for its slot."""
    return f"result{worker}-{pid}-"
