"""The folds of one round on one node: which results workers fold next, as a whole or in parts. No I/O."""

from __future__ import annotations

from typing import Callable, Optional

from qjam_worker.values.reduction import Span, Tree

from .results import Held


class Fold(dict[Span, Held]):
    """Results that are folded into one, as a whole or in several parts; the parts are written to `out`."""

    def __init__(self, items: dict[Span, Held], parts: int = 1) -> None:
        super().__init__(items)
        self.parts = parts
        self.todo = list(range(parts))  # no worker is at these
        self.left = set(self.todo)
        self.out: Optional[Held] = None

    @property
    def root(self) -> Span:
        """The span of all of them together."""
        return min(self)[0], max(hi for _, hi in self)


class FoldPlan:
    """Takes results out of the tree to be folded, and puts the sums back."""

    def __init__(self, tree: Tree[Held], workers: int) -> None:
        self._tree = tree
        self._workers = workers
        self.in_parts: Optional[Fold] = None  # the fold that several workers are at; there is one at a time
        self.unfoldable = False  # user code has raised in a fold here: no worker folds again

    @property
    def has_part(self) -> bool:
        """Whether a part waits for a worker."""
        return self.in_parts is not None and bool(self.in_parts.todo)

    def take(self, together: Callable[[Held], bool], alike: Callable[[list[Held]], bool]) -> Optional[Fold]:
        """The next fold: all small results at once, all alike results of a group in parts, or one pair.

        `together`: whether a result is small enough to be folded with all others at once. `alike`: whether results can
        be folded in parts. The results leave the tree until `put` or `give_back`.
        """
        if self.unfoldable:
            return None
        if self.has_part:
            return self.in_parts
        pairs = self._tree.pairs()
        if not pairs:
            return None
        if all(together(held) for held in self._tree.values.values()):
            return self._fold(self._tree.spans)
        if self.in_parts is None and self._workers > 1:
            for group in self._tree.groups():
                if len(group) > 1 and alike([self._tree.values[span] for span in group]):
                    self.in_parts = self._fold(group, self._workers)
                    return self.in_parts
        return self._fold(list(pairs[0]))

    def _fold(self, spans: list[Span], parts: int = 1) -> Fold:
        return Fold({span: self._tree.take(span) for span in spans}, parts)

    def put(self, fold: Fold, part: int, roots: list[tuple[Span, Held]]) -> None:
        """A worker has folded this part. When it was the last one, the sum takes the place of the results."""
        fold.left.discard(part)
        if fold.left:
            return
        if fold.out is not None:
            self.in_parts = None
            roots = [(fold.root, fold.out)]
        for held in fold.values():
            held.release()
        for span, held in roots:
            self._tree.add(span, held)

    def give_back(self, fold: Fold, part: int) -> None:
        """No worker is at this part any more: it can be folded again."""
        if fold is self.in_parts:
            fold.todo.append(part)
        else:
            for span, held in fold.items():
                self._tree.add(span, held)
