"""How a node wakes its workers: one by its pipe, and the others sleep on; several by one write to the broadcast."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qjam
from qjam_worker.ipc.mailbox import ALONE, ONE, counter
from qjam_worker.node.pool import Pool


class WakeOnly:
    """A worker's channel that only notes whether it was used to wake the worker."""

    def __init__(self) -> None:
        self.woken = False

    def wake(self) -> None:
        self.woken = True


@pytest.mark.parametrize(
    ("assigned", "workers", "by_broadcast"), [(1, 1, False), (1, 2, False), (2, 2, True), (2, 16, True), (16, 16, True)]
)
def test_one_worker_is_woken_by_its_pipe_and_several_by_the_broadcast(
    assigned: int, workers: int, by_broadcast: bool
) -> None:
    handles = [SimpleNamespace(channel=WakeOnly(), seq=int(k < assigned), status=[-1] * 7) for k in range(workers)]
    broadcast = counter()
    pool: Any = SimpleNamespace(workers=handles, _assigned=handles[:assigned], _broadcast=broadcast)
    try:
        os.write(broadcast, ONE)  # so that it can be read in any case
        Pool.wake(pool)
        writes = int.from_bytes(os.read(broadcast, 8), "little") - 1
    finally:
        os.close(broadcast)
    assert writes == by_broadcast
    assert [handle.channel.woken for handle in handles] == [not by_broadcast] * assigned + [False] * (
        workers - assigned
    )
    assert pool._assigned == []
    assert [handle.status[ALONE] for handle in handles[:assigned]] == [int(assigned == 1)] * assigned


def _naps(worker: qjam.RemoteWorker) -> int:
    """How often its process has gone to sleep so far."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_a_worker_without_work_sleeps_on() -> None:
    with qjam.Master(2) as master:
        master.run(_one, None)  # on both: they are up
        single = qjam.DataSet([1], slice_size=1)
        assert master.run(_one, None, single) == 1
        before = [_naps(worker) for worker in master.workers]
        assert sum(master.run(_one, None, single) for _ in range(20)) == 20
        assert min(_naps(worker) - naps for worker, naps in zip(master.workers, before, strict=True)) < 5


def _one(params: Any, part: Any) -> int:
    return 1
