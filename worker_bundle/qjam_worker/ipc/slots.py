"""Where a worker puts its results: small ones in a slot that is used again, each large one in a file of its own."""

from __future__ import annotations

# A value of at most this size is copied through a slot that is used again and again; a larger one gets a file of
# its own, which user code may hold on to. 256 KiB: a copy takes about 25 us, making and mapping a file about 60.
SLOT = 256 * 1024

SLOTS = "slots"  # the file that has the slots of all workers


def out_slot(worker: int) -> str:
    """The name of a file with the slot of one worker alone."""
    return f"out{worker}"


def result_prefix(worker: int, pid: int) -> str:
    """How the names of the files begin that a worker process makes for results too large for its slot."""
    return f"result{worker}-{pid}-"
