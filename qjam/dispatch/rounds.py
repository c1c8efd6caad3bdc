"""The state of jobs and rounds: what is mapped over what, which node owes which slices, which results are here."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qjam.data.file_slices import InFile
from qjam.data.leases import Lease
from qjam_worker.values.codec import Encoded
from qjam_worker.values.reduction import Tree

from .holdings import Data
from .states import DONE, QUEUED, SENT, SLICE_TRANSITIONS

MAX_ATTEMPTS = 1_000_000

_RESULT = {before: after for (before, event), after in SLICE_TRANSITIONS.items() if event == "result"}


@dataclass(frozen=True)
class JobSpec:
    """What a round runs. Specs with equal keys are one job, which each node is told once. `code_bytes`: of code that
    nodes have to be sent. `lease`: that of the data.
    """

    key: Hashable
    entry: dict[str, Any]
    refs: list[str] | None
    nslices: int
    file: InFile | None = None
    lease: Lease | None = None
    code_bytes: int = 0


class Share(NamedTuple):
    """The slices of one node, in order and as a set; rounds share it and never change it."""

    indices: list[int]
    slices: frozenset[int]


@dataclass(eq=False)
class Job:
    """User code mapped over a data set. `refs` is None where it runs once on each worker, without data."""

    number: int
    spec: JobSpec
    homes: dict[int, str] = field(default_factory=dict)  # slice -> the node that has its data, or will have
    placed_for: int = -1  # the membership that `homes` was made for
    plan: dict[str, Share] = field(default_factory=dict)  # what each node gets of a new round
    planned_for: int = -1  # the version of the roster that `plan` was made for
    announced: dict[str, frozenset[int]] = field(default_factory=dict)  # the slices that each node knows of
    typical_slice_seconds: float = 0.0  # as the fastest node measured last; 0: unknown
    rounds: int = 0  # in flight
    data: Data | None = None

    def __post_init__(self) -> None:
        self.entry, self.refs, self.nslices = self.spec.entry, self.spec.refs, self.spec.nslices
        self.file = self.spec.file  # where slices lie that a host may have without being sent them

    def note_slice_seconds(self, seconds: float) -> None:
        """Take this as the typical time of a slice; 0, where nothing was mapped, changes nothing."""
        self.typical_slice_seconds = seconds or self.typical_slice_seconds

    def move_home(self, indices: Iterable[int], name: str) -> None:
        """Assign these slices to this node from the next round on."""
        self.homes.update(dict.fromkeys(indices, name))
        self.planned_for = -1


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
        elif not job.rounds:
            del self._unused[spec.key]
        job.rounds += 1
        return job

    def end(self, job: Job) -> None:
        """A round of this job is over."""
        job.rounds -= 1
        if not job.rounds:
            self._unused[job.spec.key] = job

    def forget(self, kept: int, code_kept: int) -> Iterator[Job]:
        """Forget unused jobs, the oldest first, until at most `kept` of them and so many bytes of code are left; yields
        them.
        """
        while (len(self._jobs) > kept or self._code_bytes > code_kept) and self._unused:
            yield self._forget(next(iter(self._unused)))

    def forget_those_of(self, data: Data) -> Iterator[Job]:
        """Forget all jobs with this data, which no round uses; yields them."""
        for key in [key for key, job in self._unused.items() if job.data is data]:
            yield self._forget(key)

    def _forget(self, key: Hashable) -> Job:
        del self._unused[key]
        self._code_bytes -= self._jobs[key].spec.code_bytes
        return self._jobs.pop(key)


class Round:
    """One run. It calls `owe(node, more)` whenever the number of slices that a node owes changes."""

    def __init__(self, number: int, job: Job, began: float, owe: Callable[[str, int], None]) -> None:
        n = job.nslices
        self.number, self.job, self.began = number, job, began
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
        return f"<Round {self.number} of job {self.job.number}: {self.progress}>"

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


def share(indices: Sequence[int]) -> Share:
    """A share of these slices, which must be in order."""
    return Share(list(indices), frozenset(indices))
