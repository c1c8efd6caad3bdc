"""What the nodes of test_node_process run."""

from __future__ import annotations

from gates import announce, wait_at


def pass_gates(gates, part):
    """Says that it is there, waits to be let on, and gives the number of elements."""
    announce(gates[0])
    wait_at(gates[1])
    return len(part)
