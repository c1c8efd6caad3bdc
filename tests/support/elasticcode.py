"""What the hosts of test_elastic run."""

from __future__ import annotations

import os
import signal
import time

from gates import announce


def scaled(factor, part):
    """Sums that are not the same when they are added in another order."""
    return (factor * part).sum(axis=0)


def take_a_while(params, part):
    """So long that a slice that is on its way for the first time is not late."""
    time.sleep(0.3)
    return len(part)


def linger_elsewhere(params, part):
    """Gives the sum where the master has started the fork server; elsewhere it says that it is there, and stays."""
    gate, master = params
    with open(f"/proc/{os.getppid()}/stat") as file:
        if int(file.read().rpartition(")")[2].split()[1]) == master:
            return sum(part)
    announce(gate)
    while True:
        signal.pause()
