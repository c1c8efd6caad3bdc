"""One round on one node: which slices its workers still have to map, and which worker is at what. No I/O."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, Callable, Optional

from qjam_worker.values.reduction import Span, Tree
from qjam_worker.wire.messages import LATE
from qjam_worker.wire.refs import Ref, of_code

from .folds import Fold, FoldPlan
from .results import Held

# An attempt at slices is late when it has taken LATE times as long as such slices typically take, and MIN_LATE seconds.
MIN_LATE = 0.05
# Seconds after which a fold is late: a round has too few folds to know how long they typically take.
FOLD_LATE = 10.0
# Of slices that may be uneven a worker takes no more at a time than typically take so many seconds, but one at least.
UNEVEN_SECONDS = 0.005


class NodeJob:
    """What a node knows of a job."""

    def __init__(self, number: int, entry: dict[str, Any]) -> None:
        self.number = number
        self.entry = entry
        self.folds = not entry.get("collect")  # whether anybody here folds results of different workers
        self.adds = self.folds and not entry["reduce"]  # whether the node may add results itself
        self.uneven = "each" in entry  # slices are of items, each a call that may take any time
        self.code = None if entry["code"] is None else of_code(entry["code"])
        self.rounds = 0  # that use it


class NodeData:
    """The slices that a node knows of: their refs by index. Where `number` is None there are none: a round's job runs
    `nslices` times, once on each worker of all nodes.
    """

    def __init__(self, number: Optional[int], nslices: int) -> None:
        self.number = number
        self.nslices = nslices
        self.refs: dict[int, Optional[Ref]] = {}
        self.order: list[int] = []  # the indices, sorted
        self.rounds = 0  # that use it

    def add(self, refs: dict[int, Optional[Ref]]) -> list[Ref]:
        """The master has named more slices. Gives the refs that are new here."""
        new = {ref for ref in refs.values() if ref is not None}.difference(self.refs.values())
        self.refs.update(refs)
        self.order = sorted(self.refs)
        return list(new)


class Work:
    """One attempt of one worker: at slices to map, or at a fold or one part of a fold. `began`: seconds."""

    __slots__ = ("began", "fold", "part", "slices")

    def __init__(self, began: float, slices: list[int], fold: Optional[Fold] = None, part: int = 0) -> None:
        self.began = began
        self.slices = slices
        self.fold = fold
        self.part = part

    def is_like(self, other: Work) -> bool:
        """Whether both attempts are at the same part of the same fold."""
        return self.fold is not None and self.fold is other.fold and self.part == other.part

    def __repr__(self) -> str:
        return f"<map {self.slices}>" if self.fold is None else f"<fold {list(self.fold)}>"


class NodeRound:
    """A round on one node. Workers `take` work from it and `put` results back, or `abandon` the work."""

    def __init__(self, number: int, job: NodeJob, data: NodeData, workers: int, began: float = 0.0) -> None:
        self.number = number
        self.began = began  # seconds
        self.job = job
        self.data = data
        self.workers = workers
        self.ready: list[int] = []  # slices that a worker can map now, sorted
        # Slices that can be mapped now and that another node was offered, which tries them as well: a worker takes them
        # when `ready` is empty.
        self.offered: list[int] = []
        self.waiting: dict[Ref, list[int]] = {}  # slices by the ref that the node does not have yet
        self.lacking: set[Ref] = set()  # code and params that the node does not have yet: no worker can begin
        self.owed: set[int] = set()  # slices without a result, those that workers are at included
        self.works: dict[int, Work] = {}  # by worker
        self.tree: Tree[Held] = Tree(data.nslices, folds=job.folds)
        self.folds = FoldPlan(self.tree, workers)
        self.attempts: dict[int, int] = {}  # slices that are not tried for the first time: how often with this one
        self.pinned: set[Ref] = set()  # refs that the store keeps for this round
        self.mapped, self.seconds = 0, 0.0  # slices that workers have mapped, and the seconds that took in all
        self._begun: set[int] = set()  # slices that a worker here was given
        self._shared: set[int] = set()  # slices that another node tries as well, begun here or not
        self._contested = False  # whether two may bring a result of the same slice

    def __repr__(self) -> str:
        return (
            f"<NodeRound {self.number}: {len(self.ready)} ready, {len(self.waiting)} refs on their way, "
            f"at work {self.works}, holds {self.tree.spans}>"
        )

    def add(self, indices: list[int], missing: Collection[Ref], attempts: Collection[int] = ()) -> None:
        """The master gives the node more slices; those whose ref is missing wait for it. `attempts`: how often each was
        given out with this time, unless it is the first time for all.

        Of slices that the node has already, mapped or not, it learns only that no other node tries them any more.
        """
        tried = dict(zip(indices, attempts))
        if self._contested or not self.owed.isdisjoint(indices):
            self._shared.difference_update(indices)
            self.again(index for index in self.offered if index in indices)
            self.offered = [index for index in self.offered if index not in indices]
            held = {index for lo, hi in self._spans for index in range(lo, hi)}
            indices = [index for index in indices if index not in self.owed and index not in held]
        if not self._begun.isdisjoint(indices):
            again = self._begun.intersection(indices)
            self.attempts.update((index, max(2, self.attempts.get(index, 1))) for index in again)
        if tried:
            self.attempts.update((index, max(tried[index], self.attempts.get(index, 1))) for index in indices)
        self.owed.update(indices)
        if not missing and not self.ready:
            self.ready = sorted(indices)
            return
        refs = self.data.refs
        for index in indices:
            ref = refs[index]
            if ref is not None and ref in missing:
                self.waiting.setdefault(ref, []).append(index)
            else:
                insort(self.ready, index)

    def arrived(self, ref: Ref) -> None:
        """The node has this ref now."""
        self.lacking.discard(ref)
        for index in self.waiting.pop(ref, ()):
            insort(self.ready, index)

    @property
    def has_data(self) -> bool:
        """Whether there are slices."""
        return self.data.number is not None

    def lacks(self, ref: Ref) -> bool:
        """Whether it waits for this ref."""
        return ref in self.waiting or ref in self.lacking

    @property
    def missing(self) -> list[Ref]:
        """The refs that the node does not have yet: first those without which no worker can begin."""
        return [*self.lacking, *self.waiting]

    @property
    def has_work(self) -> bool:
        """Whether `take` may find work; False only if it certainly finds none."""
        if self.lacking:
            return False
        if self.ready or self.offered or self.folds.has_part:
            return True
        return len(self.tree.values) > 1 and not self.owed

    # Taking

    def take(
        self, worker: int, now: float, together: Callable[[Held], bool], alike: Callable[[list[Held]], bool]
    ) -> Optional[Work]:
        """Work for an idle worker, which is at it from now on; None if there is none.

        `together`: whether a result is small enough to be folded with all others at once. `alike`: whether results can
        be folded in parts.
        """
        slices = self._take_map(worker)
        if slices:
            work = Work(now, slices)
            self._begun.update(slices)
        else:
            fold = None if self.owed and not self.folds.has_part else self.folds.take(together, alike)
            if fold is None:
                return None
            work = Work(now, slices, fold, fold.todo.pop(0))
        self.works[worker] = work
        return work

    def _take_map(self, worker: int) -> list[int]:
        """Consecutive slices. Without a data set worker k gets the node's k-th slice and no other: mapfunc runs once on
        each worker.
        """
        if not self.ready:
            return [self.offered.pop(0)] if self.offered else []
        owned = self.data.order
        if self.has_data:
            block = take_block(self.ready, owned[len(owned) * worker // self.workers], self.workers)
            if self.job.uneven:
                del block[max(1, int(UNEVEN_SECONDS / (self.typical_slice_seconds or UNEVEN_SECONDS))) :]
        else:
            block = [index for index in owned[worker :: self.workers] if index in self.ready][:1]
        if block:
            start = bisect_left(self.ready, block[0])
            del self.ready[start : start + len(block)]
        return block

    # Second attempts

    def late_at(self) -> Optional[float]:
        """When the next attempt becomes late; None if that is unknown."""
        twice, typical = self._twice(), self.typical_slice_seconds
        due = [self._late_at(work, typical) for work in self.works.values() if self._untried(work, twice)]
        return min((at for at in due if at is not None), default=None)

    @property
    def typical_slice_seconds(self) -> Optional[float]:
        """The mean over the slices that workers have mapped here; None before the first one."""
        return self.seconds / self.mapped if self.mapped else None

    def _late_at(self, work: Work, typical_slice_seconds: Optional[float]) -> Optional[float]:
        if work.fold is not None:
            return work.began + FOLD_LATE
        if typical_slice_seconds is None or not self.has_data:
            return None
        return work.began + max(MIN_LATE, LATE * typical_slice_seconds * len(work.slices))

    def _twice(self) -> set[int]:
        """The slices that two workers are at."""
        if not self._contested:
            return set()
        tried = Counter(index for work in self.works.values() for index in work.slices)
        return {index for index, times in tried.items() if times > 1}

    def _untried(self, work: Work, twice: set[int]) -> list[int]:
        """The slices of an attempt that nobody else is at; for a fold that nobody else is at, its first slice."""
        if work.fold is None:
            return [i for i in work.slices if i in self.owed and i not in twice and i not in self._shared]
        alone = not any(other is not work and other.is_like(work) for other in self.works.values())
        return [min(work.fold)[0]] if alone else []

    def take_second(self, worker: int, now: float) -> Optional[Work]:
        """A second attempt at what another worker is late with; None if none is late. Of a block of slices it takes the
        last one, which the other worker has most likely not begun.
        """
        twice, typical = self._twice(), self.typical_slice_seconds
        for work in self.works.values():
            slices = self._untried(work, twice)
            late_at = self._late_at(work, typical) if slices else None
            if late_at is None or late_at > now:
                continue
            self._contested = True
            second = self.works[worker] = Work(now, [] if work.fold else slices[-1:], work.fold, work.part)
            self._count(second.slices)
            return second
        return None

    def share(self, count: int, typical_slice_seconds: Optional[float], keep: bool, now: float) -> list[int]:
        """Offer slices to another node, which is idle: the last of those that no worker has begun, then those that
        workers are late with. `typical_slice_seconds`: what the other node takes for one.

        This node maps them as well, after all others. If `keep` is false, it gives away slices that no worker has begun
        and maps them no more.
        """
        waiting = [index for indices in self.waiting.values() for index in indices]
        unbegun = [index for index in [*waiting, *reversed(self.ready)] if index not in self._shared][:count]
        if not keep:
            self.drop(unbegun)
            return unbegun
        late: list[int] = []
        twice, typical = self._twice(), typical_slice_seconds or self.typical_slice_seconds
        for work in self.works.values():
            late_at = self._late_at(work, typical) if work.fold is None else None
            if late_at is not None and late_at <= now:
                late += self._untried(work, twice)
        late = late[: count - len(unbegun)]
        self._contested = True
        self._shared.update(unbegun, late)
        self.offered += [index for index in self.ready if index in self._shared]
        self.ready = [index for index in self.ready if index not in self._shared]
        return [*unbegun, *late]

    # Giving back

    def put(self, worker: int, roots: list[tuple[Span, Held]], now: float) -> list[int]:
        """A worker has done its work. Results that somebody else brought first are dropped. Gives the workers whose
        attempts are of no use any more.
        """
        work = self.works.pop(worker)
        if work.fold is not None:
            self.folds.put(work.fold, work.part, roots)
            return self._leave([other for other, its in self.works.items() if its.is_like(work)])
        self.mapped += len(work.slices)
        self.seconds += now - work.began
        for span, held in roots:
            self._put(span, held)
        return self._supersede() if self._contested else []

    def _put(self, span: Span, held: Held) -> None:
        before = len(self.owed)
        self.owed.difference_update(range(*span))
        if len(self.owed) == before:
            held.release()
            return
        if self._contested:
            for part in [part for part in self.tree.values if span[0] <= part[0] and part[1] <= span[1]]:
                self.tree.take(part).release()
        if not self.tree.add(span, held):
            held.release()

    def _supersede(self) -> list[int]:
        """Forget the attempts whose slices all have results; gives their workers."""
        for unbegun in (self.ready, self.offered):
            unbegun[:] = [index for index in unbegun if index in self.owed]
        return self._leave(
            [w for w, work in self.works.items() if work.fold is None and self.owed.isdisjoint(work.slices)]
        )

    def _leave(self, workers: list[int]) -> list[int]:
        for worker in workers:
            del self.works[worker]
        return workers

    def abandon(self, worker: int) -> list[int]:
        """The worker has stopped without a result. Its fold can be taken again. Gives the slices that nobody here is at
        or is to map now.
        """
        work = self.works.pop(worker, None)
        if work is None:
            return []
        if work.fold is not None:
            if not any(other.is_like(work) for other in self.works.values()):
                self.folds.give_back(work.fold, work.part)
            return []
        others = {index for other in self.works.values() for index in other.slices}.union(self.offered)
        left = [index for index in work.slices if index in self.owed and index not in others]
        self._count(left)
        return left

    def _count(self, indices: Iterable[int]) -> None:
        """These slices are to be tried once more."""
        self.attempts.update((index, self.attempts.get(index, 1) + 1) for index in indices)

    def again(self, indices: Iterable[int]) -> None:
        """Map these slices here after all."""
        for index in indices:
            insort(self.ready, index)

    def drop(self, indices: Iterable[int]) -> list[int]:
        """Other nodes map these slices, or have. Gives the workers whose attempts are of no use any more."""
        gone = set(indices)
        self.owed -= gone
        self._contested = True
        for ref, waiting in list(self.waiting.items()):
            self.waiting[ref] = left = [index for index in waiting if index not in gone]
            if not left:
                del self.waiting[ref]
        return self._supersede()

    @property
    def _spans(self) -> list[Span]:
        """The spans of all results of this round, those included that workers are folding."""
        return [*self.tree.values, *(span for fold in self._folds for span in fold)]

    @property
    def _folds(self) -> list[Fold]:
        folds = {id(work.fold): work.fold for work in self.works.values() if work.fold is not None}
        if self.folds.in_parts is not None:
            folds[id(self.folds.in_parts)] = self.folds.in_parts
        return list(folds.values())

    @property
    def held(self) -> list[Held]:
        """All results of this round, those included that workers are folding."""
        folds = self._folds
        folding = [held for fold in folds for held in fold.values()]
        return [*self.tree.values.values(), *folding, *(fold.out for fold in folds if fold.out is not None)]

    @property
    def settled(self) -> bool:
        """Whether every slice that the node owed is mapped and everything that can be folded here is folded."""
        return not (self.owed or self.works or self.folds.in_parts is not None or self.tree.pairs())


def take_block(ready: list[int], home: int, workers: int) -> list[int]:
    """Consecutive slices from `home` on (from the start if there are none), fewer as fewer are left.

    A worker keeps to its own part of the data, which it has mapped, until that is done; then it helps the others.
    Blocks shrink as the work runs out (guided self-scheduling, Polychronopoulos and Kuck 1987): many tiny slices cost
    few messages, and the last ones still spread over all workers.
    """
    if not ready:
        return []
    start = bisect_left(ready, home) % len(ready)
    most = max(1, len(ready) // (2 * workers))
    block = [ready[start]]
    for index in ready[start + 1 : start + most]:
        if index != block[-1] + 1:
            break
        block.append(index)
    return block
