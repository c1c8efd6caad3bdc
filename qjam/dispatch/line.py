"""Rounds that were submitted and have not begun: first in, first out.

A round costs its nodes memory and a descriptor for its params, however many wait there. So a node has no more of them
than keep its workers busy while a result is on its way; the master keeps the others.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from .assignment import forget, plan, release
from .commands import Command
from .data import Data
from .holdings import Holdings
from .jobs import Job, Jobs
from .nodes import NodeRecord, Roster
from .rounds import RoundSpec

# The number of jobs that the master and its nodes remember.
JOBS_KEPT = 64
# The bytes of code of these that nodes keep.
CODE_KEPT = 64 * 1024 * 1024
# The rounds that may be at a node: so many for each of its workers, and so many at least.
EACH, LEAST = 4, 32


class Waiting(NamedTuple):
    """A round that has not begun."""

    number: int
    job: Job
    data: Data


class Line:
    """The rounds that wait for their turn. None overtakes another one. `jobs`, `holdings`: what all rounds use."""

    def __init__(self, roster: Roster, jobs: Jobs, holdings: Holdings) -> None:
        self._roster, self._jobs, self._holdings = roster, jobs, holdings
        self._waiting: OrderedDict[int, Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, number: int, spec: RoundSpec) -> None:
        """Put a round at the end."""
        holdings, lease = self._holdings, spec.lease
        job = self._jobs.begin(spec.job)
        data = holdings.once(spec.nslices) if lease is None else holdings.begin(lease, spec.file)
        self._waiting[number] = Waiting(number, job, data)
        forget(self._jobs.forget(JOBS_KEPT, CODE_KEPT), self._roster)

    def drop(self, number: int) -> Waiting | None:
        """Take a round out that is not to begin; None if it does not wait."""
        return self._waiting.pop(number, None)

    def next(self) -> Waiting | None:
        """The first round, if its nodes have room for it, or nobody will ever do it; it waits no longer."""
        if not self._waiting or not self._fits(next(iter(self._waiting.values())).data):
            return None
        return self._waiting.popitem(last=False)[1]

    def end(self, job: Job, data: Data, now: float) -> list[Command]:
        """A round with these is over, or will not begin."""
        self._jobs.end(job)
        return self.release(self._holdings.end(data, now))

    def release(self, dropped: list[Data]) -> list[Command]:
        """Tell nodes of data that is not kept any longer."""
        for data in dropped:
            self._jobs.forget_times(data.number)
        return [command for data in dropped for command in release(data, self._roster)]

    def _fits(self, data: Data) -> bool:
        roster = self._roster
        if not roster.useful:
            return not roster.somebody_comes
        return all(_has_room(roster.nodes[name]) for name in plan(data, roster))


def _has_room(node: NodeRecord) -> bool:
    return node.rounds < max(LEAST, EACH * node.workers)
