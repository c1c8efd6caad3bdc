"""What the nodes of test_node_process and test_hash_seed run."""

from __future__ import annotations

import os

from gates import announce, wait_at


def pass_gates(gates, part):
    """Says that it is there, waits to be let on, and gives the number of elements."""
    announce(gates[0])
    wait_at(gates[1])
    return len(part)


def hash_of_a_text(part):
    """It, the variable that decides it, and the pid of the fork server."""
    return hash("qjam"), os.environ["PYTHONHASHSEED"], os.getppid()
