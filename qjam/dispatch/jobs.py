"""Jobs: code that nodes are told of once, whatever it is applied to. Master and nodes remember those used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class JobSpec:
    """User code. Specs with equal keys are one job. `code_bytes`: of code that nodes have to be sent."""

    key: Hashable
    entry: dict[str, Any]
    code_bytes: int = 0


@dataclass(eq=False)
class Job:
    """User code that nodes know by a number."""

    number: int
    spec: JobSpec
    told: set[str] = field(default_factory=set)  # the nodes that know it
    users: int = 0  # rounds in flight
    typical_seconds: dict[int, float] = field(default_factory=dict)  # of a slice, by the number of its data

    @property
    def entry(self) -> dict[str, Any]:
        """What nodes are told of it."""
        return self.spec.entry


class Jobs:
    """The jobs in use, and those used last."""

    def __init__(self) -> None:
        self._made = 0
        self._code_bytes = 0
        self._jobs: dict[Hashable, Job] = {}
        self._unused: OrderedDict[Hashable, Job] = OrderedDict()

    def __len__(self) -> int:
        return len(self._jobs)

    def begin(self, spec: JobSpec) -> Job:
        """The job of a round that begins."""
        job = self._jobs.get(spec.key)
        if job is None:
            self._made += 1
            job = self._jobs[spec.key] = Job(self._made, spec)
            self._code_bytes += spec.code_bytes
        elif not job.users:
            del self._unused[spec.key]
        job.users += 1
        return job

    def end(self, job: Job) -> None:
        """A round of this job is over."""
        job.users -= 1
        if not job.users:
            self._unused[job.spec.key] = job

    def forget(self, kept: int, code_kept: int) -> Iterator[Job]:
        """Forget unused jobs, the oldest first, until at most `kept` of them and so many bytes of code are left; yields
        them.
        """
        while (len(self._jobs) > kept or self._code_bytes > code_kept) and self._unused:
            key, job = self._unused.popitem(last=False)
            self._code_bytes -= job.spec.code_bytes
            del self._jobs[key]
            yield job

    def forget_times(self, data: int) -> None:
        """There is no data of this number any more."""
        for job in self._jobs.values():
            job.typical_seconds.pop(data, None)
