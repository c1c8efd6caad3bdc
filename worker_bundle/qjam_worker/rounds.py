"""What one node still has to do for a round: which slices are to be mapped, by whom, and what is to be folded. No I/O."""

from __future__ import annotations

from bisect import bisect_left
from typing import Callable, NamedTuple, Optional

from .reducing import Span, Tree, is_span, sibling

__all__ = ["Held", "NodeJob", "NodeRound", "take_block"]


class NodeJob(NamedTuple):
    """The part of a job that a node knows: its slices by index, None for a round without a data set."""

    number: int
    entry: dict[str, object]
    nslices: int
    refs: dict[int, Optional[str]]
    user_reduce: bool


class Held:
    """A result that the node holds: flat bytes (its own, or a mapped file's), or a value that it has folded itself."""

    __slots__ = ("flat", "path", "plain", "value")

    def __init__(self, flat: Optional[memoryview], plain: bool, path: Optional[str] = None, value: object = None) -> None:
        self.flat = flat
        self.plain = plain
        self.path = path  # the file to remove when the result is used up
        self.value = value


class NodeRound:
    """A round on one node. Workers take maps and folds from it and put results back."""

    def __init__(self, number: int, job: NodeJob, workers: int) -> None:
        self.number = number
        self.job = job
        self.workers = workers
        self.pending: list[int] = []  # sorted
        self.mapping: dict[int, list[int]] = {}  # worker -> slices
        self.folding: dict[int, dict[Span, Held]] = {}  # worker -> what it folds
        self.tree = Tree(job.nslices)
        self.pinned: set[str] = set()  # refs that the store keeps for it

    def __repr__(self) -> str:
        return (
            f"<NodeRound {self.number}: {len(self.pending)} pending, mapping {self.mapping}, "
            f"folding {list(self.folding)}, holds {self.tree.spans}>"
        )

    def add(self, indices: list[int]) -> None:
        self.pending = sorted({*self.pending, *indices})

    def take_map(self, worker: int, present: Callable[[int], bool]) -> list[int]:
        """Slices for an idle worker, consecutive ones, counted as running from now on; empty when there is nothing.

        Without a data set worker k gets the k-th of the node's slices and no other: mapfunc runs once on each.
        """
        if not self.pending:
            return []
        owned = sorted(self.job.refs)
        if self.job.refs[owned[0]] is None:
            block = [index for index in self.pending if owned.index(index) % self.workers == worker][:1]
        else:
            home = owned[len(owned) * worker // self.workers]
            block = take_block([i for i in self.pending if present(i)], home, self.workers)
        if block:
            self.pending = [index for index in self.pending if index not in block]
            self.mapping[worker] = block
        return block

    def take_fold(self, worker: int, together: Callable[[Held], bool]) -> dict[Span, Held]:
        """Results for an idle worker to fold: all small ones at once, or one pair; out of the tree until put back."""
        pairs = self._pairs()
        if not pairs or (self.pending or self.mapping):
            return {}
        spans = set(pairs[0])
        if all(together(held) for held in self.tree.values.values()):
            spans = set(self.tree.values)
        self.folding[worker] = {span: self.tree.values.pop(span) for span in sorted(spans)}
        return self.folding[worker]

    def _pairs(self) -> list[tuple[Span, Span]]:
        return self.tree.pairs() if len(self.tree.values) > 1 else []

    def put(self, worker: int, roots: list[tuple[Span, Held]]) -> list[Held]:
        """Results of what a worker had taken. Gives what it has folded and nobody needs any more."""
        self.mapping.pop(worker, None)
        used = list(self.folding.pop(worker, {}).values())
        for span, held in roots:
            if not is_span(span[0], span[1], self.job.nslices):
                raise ValueError(f"worker {worker} gave a result for {span}, which is no part of the tree")
            self.tree.add(span, held)
        return used

    def lose(self, worker: int) -> list[int]:
        """The worker is gone: what it folded can be folded again; the slices that it was mapping are given back."""
        for span, held in self.folding.pop(worker, {}).items():
            self.tree.add(span, held)
        return self.mapping.pop(worker, [])

    def fold_from(self, span: Span, fold: Callable[[Held, Held], Optional[Held]]) -> None:
        """Fold upward from a new result as far as `fold` is willing (it gives None where a worker has to do it)."""
        values = self.tree.values
        while True:
            other = sibling(span, self.job.nslices)
            if other is None or other not in values or span not in values:
                return
            left, right = min(span, other), max(span, other)
            folded = fold(values[left], values[right])
            if folded is None:
                return
            del values[left], values[right]
            span = (left[0], right[1])
            values[span] = folded

    @property
    def settled(self) -> bool:
        """Whether every slice given to this node is mapped and all that can be folded here is folded."""
        return not (self.pending or self.mapping or self.folding or self._pairs())


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
