"""The state of rounds: what is mapped over what, which node owes which slices, which results are here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qjam.data.file_slices import InFile
from qjam.data.leases import Lease
from qjam_worker.values.codec import Encoded
from qjam_worker.values.reduction import Tree

from .data import Data, Share
from .jobs import Job, JobSpec
from .states import DONE, QUEUED, SENT, SLICE_TRANSITIONS

MAX_ATTEMPTS = 1_000_000

_RESULT = {before: after for (before, event), after in SLICE_TRANSITIONS.items() if event == "result"}


@dataclass(frozen=True)
class RoundSpec:
    """What a round runs: a job over the slices of a lease, or where there is none `nslices` times, once on each worker.
    `file`: where slices lie that hosts may have.
    """

    job: JobSpec
    nslices: int
    lease: Lease | None = None
    file: InFile | None = None

    @property
    def refs(self) -> tuple[str, ...]:
        """The hashes of the slices."""
        return () if self.lease is None else self.lease.key


class Round:
    """One run. It calls `owe(node, more)` whenever the number of slices that a node owes changes."""

    def __init__(self, number: int, job: Job, data: Data, began: float, owe: Callable[[str, int], None]) -> None:
        n = data.nslices
        self.number, self.job, self.data, self.began = number, job, data, began
        self._owe = owe
        self.tree: Tree[Encoded] = Tree(n)
        self.states: list[str] = [QUEUED] * n
        self.queued = set(range(n))  # slices that no node owes
        self.owners: list[tuple[str, ...]] = [()] * n  # by slice: the nodes that owe it
        self.shared: set[int] = set()  # the slices that several nodes owe
        self.debts: dict[str, set[int]] = {}  # what each node owes, of all nodes with a part in the round
        self.given: dict[str, frozenset[int]] = {}  # all slices that each node was ever given
        self.again: Counter[int] = Counter()  # by slice: how often it was given out beyond the first time
        self.deaths: defaultdict[int | None, int] = defaultdict(int)  # by the slice at fault; None: while reducing

    def __repr__(self) -> str:
        return f"<Round {self.number} of job {self.job.number} over data {self.data.number}: {self.progress}>"

    def is_like(self, other: Round) -> bool:
        """Whether both map the same over the same."""
        return self.job is other.job and self.data is other.data

    @property
    def typical_slice_seconds(self) -> float:
        """Of the job with this data, as the fastest node measured last; 0: unknown."""
        return self.job.typical_seconds.get(self.data.number, 0.0)

    def note_slice_seconds(self, seconds: float) -> None:
        """Take this as the typical time of a slice; 0, where nothing was mapped, changes nothing."""
        if seconds:
            self.job.typical_seconds[self.data.number] = seconds

    def move(self, index: int, event: str) -> None:
        self.states[index] = SLICE_TRANSITIONS[self.states[index], event]

    def give(self, name: str, share: Share) -> None:
        """A node owes these slices from now on; other nodes may owe them too."""
        indices, slices = share
        states, owners = self.states, self.owners
        if name in self.debts:
            before = len(self.debts[name])
            self.debts[name] |= slices
            if not self.given[name] >= slices:
                self.given[name] |= slices
            self._owe(name, len(self.debts[name]) - before)
        else:
            self.debts[name], self.given[name] = set(slices), slices
            self._owe(name, len(slices))
        mine = (name,)
        for index in indices:
            if states[index] == QUEUED:
                states[index], owners[index] = SENT, mine
            elif name not in owners[index]:
                owners[index] += mine
                self.shared.add(index)
                self.again[index] += 1
        self.queued -= slices

    def take_back(self, name: str, indices: Iterable[int]) -> list[int]:
        """A node will not do these slices. Returns those that no node owes now; they are queued again."""
        debts = self.debts.get(name, set())
        lost = sorted(debts.intersection(indices))
        debts.difference_update(lost)
        self._owe(name, -len(lost))
        nobodys = []
        for index in lost:
            self.owners[index] = tuple(owner for owner in self.owners[index] if owner != name)
            if len(self.owners[index]) == 1:
                self.shared.discard(index)
            if not self.owners[index]:
                self.move(index, "lost")
                self.queued.add(index)
                nobodys.append(index)
        return nobodys

    def settle(self, name: str, lo: int, hi: int) -> dict[str, list[int]]:
        """The results of these slices are here, from this node. Returns the other nodes that owed some of them."""
        span = range(lo, hi)
        owners, self.owners[lo:hi] = self.owners[lo:hi], [()] * (hi - lo)
        self.states[lo:hi] = map(_RESULT.__getitem__, self.states[lo:hi])
        if owners[0] == (name,) and owners.count(owners[0]) == hi - lo:  # the usual case
            self.debts[name].difference_update(span)
            self._owe(name, lo - hi)
            return {}
        self.queued.difference_update(span)
        self.shared.difference_update(span)
        owed: dict[str, list[int]] = {}
        for index, names in zip(span, owners, strict=True):
            for owner in names:
                owed.setdefault(owner, []).append(index)
        for owner, indices in owed.items():
            self.debts[owner].difference_update(indices)
            self._owe(owner, -len(indices))
        owed.pop(name, None)
        return owed

    def let_go(self, name: str) -> None:
        """The node has no part in the round any more; what it owed was taken back."""
        self.debts.pop(name, None)
        self.given.pop(name, None)

    def end(self) -> None:
        """The round is over: no node owes anything."""
        for name, indices in self.debts.items():
            if indices:
                self._owe(name, -len(indices))

    def single(self, name: str) -> list[int]:
        """The slices that this node alone owes."""
        return sorted(self.debts.get(name, set()) - self.shared)

    def count_single(self, name: str) -> int:
        """The number of these."""
        debts = self.debts.get(name, ())
        return len(debts) - len(self.shared.intersection(debts)) if self.shared else len(debts)

    @property
    def progress(self) -> str:
        """How far it has come, for the user."""
        return f"{self.states.count(DONE)} of {len(self.states)} slices were done"


def note_attempts(round_: Round, indices: list[int], attempts: Sequence[int]) -> None:
    """A node gives away slices that it has given to a worker before: the next attempt at each has this number at least.
    ValueError if it does not say so for each slice, or tells of more than can be.
    """
    if attempts and (len(attempts) != len(indices) or max(attempts) > MAX_ATTEMPTS):
        raise ValueError(f"{attempts} are not the attempts at {len(indices)} slices")
    for index, attempt in zip(indices, attempts, strict=bool(attempts)):
        round_.again[index] = max(round_.again[index], attempt - 1)
