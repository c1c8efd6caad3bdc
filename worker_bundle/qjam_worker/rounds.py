"""What one node still has to do for a round: what is to be mapped, by whom, and what is to be folded. No I/O."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection
from typing import Any, Callable, Optional

from .reducing import Span, Tree
from .results import Held

__all__ = ["Held", "NodeJob", "NodeRound", "take_block"]


class NodeJob:
    """The part of a job that a node knows: its slices, the ref of each by index, None where there is no data set."""

    def __init__(self, number: int, entry: dict[str, Any], nslices: int, user_reduce: bool) -> None:
        self.number = number
        self.entry = entry
        self.nslices = nslices
        self.user_reduce = user_reduce
        self.refs: dict[int, Optional[str]] = {}
        self.order: list[int] = []  # the indices, sorted
        self.has_data = False

    def add(self, refs: dict[int, Optional[str]]) -> None:
        """Learn of more slices."""
        self.refs.update(refs)
        self.order = sorted(self.refs)
        self.has_data = self.refs[self.order[0]] is not None


class NodeRound:
    """A round on one node. Workers take maps and folds from it and put results back."""

    def __init__(self, number: int, job: NodeJob, workers: int) -> None:
        self.number = number
        self.job = job
        self.workers = workers
        self.ready: list[int] = []  # slices that can be mapped now, sorted
        self.waiting: dict[str, list[int]] = {}  # ref on its way -> slices
        self.lacking: set[str] = set()  # code and params on their way: without them nothing can start
        self.mapping: dict[int, list[int]] = {}  # worker -> slices
        self.folding: dict[int, dict[Span, Held]] = {}  # worker -> what it folds
        self.tree = Tree(job.nslices)
        self.pinned: set[str] = set()  # refs that the store keeps for it

    def __repr__(self) -> str:
        return (
            f"<NodeRound {self.number}: {len(self.ready)} ready, {len(self.waiting)} refs on their way, "
            f"mapping {self.mapping}, folding {list(self.folding)}, holds {self.tree.spans}>"
        )

    def add(self, indices: list[int], missing: Collection[str]) -> None:
        """Give the node more slices to map; those whose ref is missing wait for it."""
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

    def arrived(self, ref: str) -> None:
        """A ref is here."""
        self.lacking.discard(ref)
        for index in self.waiting.pop(ref, ()):
            insort(self.ready, index)

    @property
    def missing(self) -> list[str]:
        """What is still on its way, in the order in which it is of use."""
        return [*self.lacking, *self.waiting]

    @property
    def has_work(self) -> bool:
        """Whether an idle worker may find something to do."""
        if self.lacking:
            return False
        return bool(self.ready) or (len(self.tree.values) > 1 and not self.mapping and not self.waiting)

    def take_map(self, worker: int) -> list[int]:
        """Slices for an idle worker, consecutive ones, counted as running from now on; empty when there is none.

        Without a data set worker k gets the k-th of the node's slices and no other: mapfunc runs once on each.
        """
        if not self.ready:
            return []
        owned = self.job.order
        if self.job.has_data:
            block = take_block(self.ready, owned[len(owned) * worker // self.workers], self.workers)
        else:
            block = [index for index in owned[worker :: self.workers] if index in self.ready][:1]
        if block:
            start = bisect_left(self.ready, block[0])
            del self.ready[start : start + len(block)]
            self.mapping[worker] = block
        return block

    def take_fold(self, worker: int, together: Callable[[Held], bool]) -> dict[Span, Held]:
        """Results for an idle worker to fold: all small ones at once, or one pair; out of the tree until put back."""
        if self.ready or self.waiting or self.mapping:
            return {}
        pairs = self.tree.pairs()
        if not pairs:
            return {}
        spans = list(pairs[0])
        if all(together(held) for held in self.tree.values.values()):
            spans = self.tree.spans
        self.folding[worker] = {span: self.tree.take(span) for span in spans}
        return self.folding[worker]

    def put(self, worker: int, roots: list[tuple[Span, Held]]) -> list[Held]:
        """Results of what a worker had taken. Gives what it has folded and nobody needs any more."""
        self.mapping.pop(worker, None)
        for span, held in roots:
            self.tree.add(span, held)
        return list(self.folding.pop(worker).values()) if worker in self.folding else []

    def lose(self, worker: int) -> list[int]:
        """The worker is gone: what it folded can be folded again; the slices that it was mapping are given back."""
        for span, held in self.folding.pop(worker, {}).items():
            self.tree.add(span, held)
        return self.mapping.pop(worker, [])

    @property
    def held(self) -> list[Held]:
        """All results that are here, those included that a worker is folding."""
        return [*self.tree.values.values(), *(held for fold in self.folding.values() for held in fold.values())]

    @property
    def settled(self) -> bool:
        """Whether every slice given to this node is mapped and all that can be folded here is folded."""
        return not (self.ready or self.waiting or self.mapping or self.folding or self.tree.pairs())


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
