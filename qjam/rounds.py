"""The books of jobs and rounds: what is mapped over what, who owes which slices, what has come in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from qjam_worker.reducing import Tree

from .infile import InFile
from .states import DONE, QUEUED, SENT, SLICE_TRANSITIONS


@dataclass(frozen=True)
class JobSpec:
    """What a round runs: equal keys are the same job, which nodes are told of once."""

    key: Hashable
    entry: dict[str, Any]
    refs: list[str] | None
    nslices: int
    file: InFile | None = None


@dataclass
class Job:
    """A module mapped over a data set; `refs` is None for a round on each worker without data."""

    number: int
    entry: dict[str, Any]
    refs: list[str] | None
    nslices: int
    file: InFile | None = None  # where slices lie that a host may have without being sent them
    homes: dict[int, str] = field(default_factory=dict)  # slice -> the node that has its data, or will have
    placed_for: int = -1  # the membership that `homes` was made for
    usual: float = 0.0  # seconds that a worker takes for a slice, as the fastest node has told last; 0: unknown


@dataclass
class Round:
    """One run."""

    number: int
    job: Job
    params: tuple[Any, ...]
    params_ref: str | None
    deadline: float | None
    began: float
    tree: Tree = field(init=False)
    states: list[str] = field(init=False)
    owners: list[tuple[str, ...]] = field(init=False)  # by slice: the nodes that have been given it and owe it
    debts: dict[str, set[int]] = field(default_factory=dict)  # the other way round; all nodes that know of the round
    given: dict[str, set[int]] = field(default_factory=dict)  # what each node may speak of: all that it was ever given
    deaths: Counter[int | None] = field(default_factory=Counter)  # by the slice at fault; None: while reducing

    def __post_init__(self) -> None:
        self.tree = Tree(self.job.nslices)
        self.states = [QUEUED] * self.job.nslices
        self.owners = [()] * self.job.nslices

    def move(self, index: int, event: str) -> None:
        self.states[index] = SLICE_TRANSITIONS[self.states[index], event]

    @property
    def queued(self) -> list[int]:
        """The slices that nobody has been given."""
        return [index for index, state in enumerate(self.states) if state == QUEUED]

    def give(self, name: str, indices: Iterable[int]) -> None:
        """A node owes these slices from now on; another one may do so as well."""
        self.debts.setdefault(name, set()).update(indices)
        self.given.setdefault(name, set()).update(indices)
        for index in indices:
            self.owners[index] += (name,)
            if self.states[index] == QUEUED:
                self.states[index] = SENT

    def take_back(self, name: str, indices: Iterable[int]) -> list[int]:
        """A node will not bring these. Gives those that nobody owes now; they are queued again."""
        debts = self.debts.get(name, set())
        nobodys = []
        for index in sorted(debts.intersection(indices)):
            debts.discard(index)
            self.owners[index] = tuple(owner for owner in self.owners[index] if owner != name)
            if not self.owners[index]:
                self.move(index, "lost")
                nobodys.append(index)
        return nobodys

    def settle(self, index: int) -> tuple[str, ...]:
        """The result of a slice is here. Gives the nodes that owed it."""
        self.move(index, "result")
        owners = self.owners[index]
        for owner in owners:
            self.debts[owner].discard(index)
        self.owners[index] = ()
        return owners

    def single(self, name: str) -> list[int]:
        """What this node owes and no other one tries."""
        return sorted(index for index in self.debts.get(name, ()) if len(self.owners[index]) == 1)

    @property
    def progress(self) -> str:
        """For whoever waits for it."""
        return f"{sum(state == DONE for state in self.states)} of {len(self.states)} slices were done"
