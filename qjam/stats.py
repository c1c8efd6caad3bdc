"""The figures that rounds leave behind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Figures since the master was made; bytes are payload, without headers.

    Attributes:
        rounds: rounds that gave a result.
        failed_rounds: rounds that ended with an exception, cancelled ones included.
        params_sent, dataset_sent, code_sent: bytes to all nodes.
        results_received, output_received: bytes from all nodes (results, what user code printed).
        resent_slices: slices that were given out again because a worker or node was lost.
    """

    rounds: int = 0
    failed_rounds: int = 0
    params_sent: int = 0
    dataset_sent: int = 0
    code_sent: int = 0
    results_received: int = 0
    output_received: int = 0
    resent_slices: int = 0
