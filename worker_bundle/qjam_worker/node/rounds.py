"""What one node still has to do for a round: what is to be mapped, by whom, and what is to be folded. No I/O."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, Callable, Optional

from qjam_worker.values.reduction import Span, Tree
from qjam_worker.wire.refs import Ref, of_code

from .folds import Fold, FoldPlan
from .results import Held

# An attempt is late when it takes this many times as long as the others have, and at least so many seconds.
LATE, MIN_LATE = 2.0, 0.05
# The same for folding, of which there is too little to know what is usual.
FOLD_LATE = 10.0


class NodeJob:
    """The part of a job that a node knows: its slices, the ref of each by index, None where there is no data set."""

    def __init__(self, number: int, entry: dict[str, Any], nslices: int, user_reduce: bool) -> None:
        self.number = number
        self.entry = entry
        self.nslices = nslices
        self.user_reduce = user_reduce
        self.code = None if entry["code"] is None else of_code(entry["code"])
        self.refs: dict[int, Optional[Ref]] = {}
        self.order: list[int] = []  # the indices, sorted
        self.has_data = False

    def add(self, refs: dict[int, Optional[Ref]]) -> None:
        """Learn of more slices."""
        self.refs.update(refs)
        self.order = sorted(self.refs)
        self.has_data = self.refs[self.order[0]] is not None


class Work:
    """One attempt of one worker: slices to map, or results to fold or a part of them, since `began` (seconds)."""

    __slots__ = ("began", "fold", "part", "slices")

    def __init__(self, began: float, slices: list[int], fold: Optional[Fold] = None, part: int = 0) -> None:
        self.began = began
        self.slices = slices
        self.fold = fold
        self.part = part

    def is_like(self, other: Work) -> bool:
        """Whether another attempt is at the same part of the same fold."""
        return self.fold is not None and self.fold is other.fold and self.part == other.part

    def __repr__(self) -> str:
        return f"<map {self.slices}>" if self.fold is None else f"<fold {list(self.fold)}>"


class NodeRound:
    """A round on one node. Workers take maps and folds from it and put results back."""

    def __init__(self, number: int, job: NodeJob, workers: int, began: float = 0.0) -> None:
        self.number = number
        self.began = began  # seconds
        self.job = job
        self.workers = workers
        self.ready: list[int] = []  # slices that can be mapped now, sorted
        self.offered: list[int] = []  # slices that another node tries as well: for when there is nothing else
        self.waiting: dict[Ref, list[int]] = {}  # ref on its way -> slices
        self.lacking: set[Ref] = set()  # code and params on their way: without them nothing can start
        self.owed: set[int] = set()  # slices that are not mapped yet, those that are being mapped included
        self.works: dict[int, Work] = {}  # worker -> what it is at
        self.tree: Tree[Held] = Tree(job.nslices)
        self.folds = FoldPlan(self.tree, workers)
        self.pinned: set[Ref] = set()  # refs that the store keeps for it
        self.mapped, self.seconds = 0, 0.0  # how many slices, and how long workers have taken for them
        self._shared: set[int] = set()  # slices that another node tries as well
        self._contested = False  # whether somebody else may have done what a worker brings

    def __repr__(self) -> str:
        return (
            f"<NodeRound {self.number}: {len(self.ready)} ready, {len(self.waiting)} refs on their way, "
            f"at work {self.works}, holds {self.tree.spans}>"
        )

    def add(self, indices: list[int], missing: Collection[Ref]) -> None:
        """Give the node more slices to map; those whose ref is missing wait for it. What it owes or holds already it
        ignores, but for that nobody else tries it any longer.
        """
        if self._contested or not self.owed.isdisjoint(indices):
            self._shared.difference_update(indices)
            self.again(index for index in self.offered if index in indices)
            self.offered = [index for index in self.offered if index not in indices]
            held = {index for lo, hi in self._spans for index in range(lo, hi)}
            indices = [index for index in indices if index not in self.owed and index not in held]
        self.owed.update(indices)
        if not missing and not self.ready:
            self.ready = sorted(indices)
            return
        refs = self.job.refs
        for index in indices:
            ref = refs[index]
            if ref is not None and ref in missing:
                self.waiting.setdefault(ref, []).append(index)
            else:
                insort(self.ready, index)

    def arrived(self, ref: Ref) -> None:
        """A ref is here."""
        self.lacking.discard(ref)
        for index in self.waiting.pop(ref, ()):
            insort(self.ready, index)

    @property
    def missing(self) -> list[Ref]:
        """What is still on its way, in the order in which it is of use."""
        return [*self.lacking, *self.waiting]

    @property
    def has_work(self) -> bool:
        """Whether an idle worker may find something to do."""
        if self.lacking:
            return False
        if self.ready or self.offered or self.folds.has_part:
            return True
        return len(self.tree.values) > 1 and not self.owed

    # Taking

    def take(
        self, worker: int, now: float, together: Callable[[Held], bool], alike: Callable[[list[Held]], bool]
    ) -> Optional[Work]:
        """Something for an idle worker to do, counted as running from now on; None when there is nothing.

        `together`: whether a result is small enough to be folded with all others at once. `alike`: whether results can
        be folded in parts.
        """
        slices = self._take_map(worker)
        if slices:
            work = Work(now, slices)
        else:
            fold = None if self.owed and not self.folds.has_part else self.folds.take(together, alike)
            if fold is None:
                return None
            work = Work(now, slices, fold, fold.todo.pop(0))
        self.works[worker] = work
        return work

    def _take_map(self, worker: int) -> list[int]:
        """Consecutive slices. Without a data set worker k gets the k-th of the node's slices and no other: mapfunc runs
        once on each.
        """
        if not self.ready:
            return [self.offered.pop(0)] if self.offered else []
        owned = self.job.order
        if self.job.has_data:
            block = take_block(self.ready, owned[len(owned) * worker // self.workers], self.workers)
        else:
            block = [index for index in owned[worker :: self.workers] if index in self.ready][:1]
        if block:
            start = bisect_left(self.ready, block[0])
            del self.ready[start : start + len(block)]
        return block

    # Second attempts

    def late_at(self) -> Optional[float]:
        """When the next attempt will be late, as far as that can be told."""
        twice = self._twice()
        due = [self._late_at(work) for work in self.works.values() if self._untried(work, twice)]
        return min((at for at in due if at is not None), default=None)

    def _late_at(self, work: Work, usual: Optional[float] = None) -> Optional[float]:
        if work.fold is not None:
            return work.began + FOLD_LATE
        usual = usual or (self.seconds / self.mapped if self.mapped else None)
        if usual is None or not self.job.has_data:
            return None
        return work.began + max(MIN_LATE, LATE * usual * len(work.slices))

    def _twice(self) -> set[int]:
        """Slices that two workers are at."""
        if not self._contested:
            return set()
        tried = Counter(index for work in self.works.values() for index in work.slices)
        return {index for index, times in tried.items() if times > 1}

    def _untried(self, work: Work, twice: set[int]) -> list[int]:
        """What of an attempt nobody else is at, by the lowest slice; for a fold its first."""
        if work.fold is None:
            return [i for i in work.slices if i in self.owed and i not in twice and i not in self._shared]
        alone = not any(other is not work and other.is_like(work) for other in self.works.values())
        return [min(work.fold)[0]] if alone else []

    def take_second(self, worker: int, now: float) -> Optional[Work]:
        """A second attempt at what another worker is late with: the last slice of its block, for that is likely not to
        have begun. None when nobody is late.
        """
        twice = self._twice()
        for work in self.works.values():
            slices = self._untried(work, twice)
            late_at = self._late_at(work) if slices else None
            if late_at is None or late_at > now:
                continue
            self._contested = True
            second = self.works[worker] = Work(now, [] if work.fold else slices[-1:], work.fold, work.part)
            return second
        return None

    def share(self, count: int, usual: Optional[float], keep: bool, now: float) -> list[int]:
        """Slices for another node, which is idle and has taken `usual` seconds for one: of those that nobody has begun
        the last ones, and those that workers are late with. This node does them as well, when all others are done,
        unless `keep` is false: then it gives those away that nobody has begun.
        """
        waiting = [index for indices in self.waiting.values() for index in indices]
        unbegun = [index for index in [*waiting, *reversed(self.ready)] if index not in self._shared][:count]
        if not keep:
            self.drop(unbegun)
            return unbegun
        late: list[int] = []
        twice = self._twice()
        for work in self.works.values():
            late_at = self._late_at(work, usual) if work.fold is None else None
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
        """Results of what a worker had taken. What came sooner from somebody else is dropped. Gives the workers whose
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
        """Forget the attempts at maps that can bring nothing new, and give their workers."""
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
        """The worker is at it no more, without a result. What it folded can be folded again. Gives the slices that are
        now nobody's here.
        """
        work = self.works.pop(worker, None)
        if work is None:
            return []
        if work.fold is not None:
            if not any(other.is_like(work) for other in self.works.values()):
                self.folds.give_back(work.fold, work.part)
            return []
        others = {index for other in self.works.values() for index in other.slices}.union(self.offered)
        return [index for index in work.slices if index in self.owed and index not in others]

    def again(self, indices: Iterable[int]) -> None:
        """Map these slices here after all."""
        for index in indices:
            insort(self.ready, index)

    def drop(self, indices: Iterable[int]) -> list[int]:
        """Others do these slices, or have done them. Gives the workers whose attempts are of no use any more."""
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
        """What the results that are here are of, those included that a worker is folding."""
        return [*self.tree.values, *(span for fold in self._folds for span in fold)]

    @property
    def _folds(self) -> list[Fold]:
        folds = {id(work.fold): work.fold for work in self.works.values() if work.fold is not None}
        if self.folds.in_parts is not None:
            folds[id(self.folds.in_parts)] = self.folds.in_parts
        return list(folds.values())

    @property
    def held(self) -> list[Held]:
        """All results that are here, those included that a worker is folding."""
        folds = self._folds
        folding = [held for fold in folds for held in fold.values()]
        return [*self.tree.values.values(), *folding, *(fold.out for fold in folds if fold.out is not None)]

    @property
    def settled(self) -> bool:
        """Whether every slice given to this node is mapped and all that can be folded here is folded."""
        return not (self.owed or self.works or self.folds.in_parts is not None or self.tree.pairs())


def take_block(ready: list[int], home: int, workers: int) -> list[int]:
    """Consecutive slices from `home` on (else from the start), fewer the fewer are left.

    A worker keeps to its own part of the data, whose pages it has mapped, until that is used up; then it helps out.
    The block shrinks as the work runs out (guided self-scheduling, Polychronopoulos and Kuck 1987), so that many
    tiny slices cost few doorbells and the last ones still spread over all workers.
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
