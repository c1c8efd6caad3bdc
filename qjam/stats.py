"""Counters of a master: rounds, and bytes sent and received."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Counters since the master was created. Bytes are payload, without message headers.

    Attributes:
        rounds: rounds that returned a result.
        failed_rounds: rounds that ended with an exception, including cancelled ones.
        params_sent, dataset_sent, code_sent: bytes sent to all nodes.
        results_received, output_received: bytes received from all nodes (results; what user code printed).
        resent_slices: slices that were assigned again because a worker or node was lost.
    """

    rounds: int = 0
    failed_rounds: int = 0
    params_sent: int = 0
    dataset_sent: int = 0
    code_sent: int = 0
    results_received: int = 0
    output_received: int = 0
    resent_slices: int = 0
