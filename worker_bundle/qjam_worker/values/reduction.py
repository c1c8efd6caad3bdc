"""Adding up results along one fixed tree, so that any sharing-out of the work gives bitwise the same sum."""

from __future__ import annotations

import array
import functools
import numbers
import operator
from collections import UserList, UserString, deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Span = tuple[int, int]  # [lo, hi): the slices that one node of the tree stands for

NUMBERS = "fiuc"  # the kinds of dtypes whose arrays add up number by number, to an array of the same dtype

_HINT = (
    "define reduce(a, b) in the module, or pass reduce=, to say how its results add up; or use collect, which gives a "
    "list of the results"
)
_PLAIN = frozenset([int, float, complex, np.float64])
_COUNTS = np.dtype(np.int64)
# The + of these types works element by element here; that of the others joins, which is not a sum.
_BY_ELEMENT = (list.__add__, tuple.__add__)
_JOINING = (
    str.__add__, bytes.__add__, bytearray.__add__, deque.__add__, array.array.__add__, UserString.__add__,
    UserList.__add__, *_BY_ELEMENT,
)  # fmt: skip


def summand(result: Any) -> Any:
    """A result of mapfunc as `default_reduce` adds it: its bools are counted, as Python's own are.

    A bool is an int, `numpy.bool_` an `int64`, an array of bools one of int64, also in lists and tuples at any depth;
    so the sum over one slice has the types of that over many. TypeError for None.
    """
    if result is None:
        raise TypeError(
            "mapfunc returned None, which cannot be added: return a value, or use collect, which adds nothing; only a "
            "reduce(a, b) of yours is given None"
        )
    try:
        return _counted(result)
    except RecursionError:  # it contains itself, or is nested deeply
        return result


def _counted(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is bool:
        return int(value)
    if isinstance(value, (np.ndarray, np.bool_)):
        return value.astype(_COUNTS) if value.dtype.kind == "b" else value
    if not _is_by_element(value) or _PLAIN.issuperset(map(type, value)):
        return value
    items = [_counted(item) for item in value]
    return value if all(map(operator.is_, items, value)) else _like(value, items)


def default_reduce(a: Any, b: Any) -> Any:
    """The sum of two results, as used where there is no reduce(a, b).

    Numbers (Python's and numpy's) and arrays of exactly the same shape are added with +; lists and tuples of the same
    type and length element by element, to any depth; objects of any other class with their own +. TypeError, which says
    what was found, for what has no +, and where it would not be a sum: text, bytes and queues would be joined, a number
    spread over an array. A dict has no one way to be added.
    """
    return _add(a, b, "")


def _add(a: Any, b: Any, where: str) -> Any:
    if type(a) is type(b) is np.ndarray and a.shape == b.shape and a.dtype.kind in NUMBERS and a.shape:
        return _plus(a, b, where)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape:
            raise _error(a, b, where, "their shapes differ")
        if a.dtype.kind in "SUT" or b.dtype.kind in "SUT":
            raise _error(a, b, where, "text is not added")
        total = _plus(a, b, where)
        return total if a.shape else np.asanyarray(total)  # numpy's + turns two 0-d arrays into a scalar
    if _is_number(a) and _is_number(b):
        return _plus(a, b, where)
    if _is_by_element(a) and type(a) is type(b):
        if len(a) != len(b):
            raise _error(a, b, where, "their lengths differ")
        return _like(a, [_add(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b))])
    if _has_own_sum(a) and _has_own_sum(b):
        return _plus(a, b, where)
    raise _error(
        a,
        b,
        where,
        "they are of different kinds, or of one that has no sum: numbers, arrays, lists and tuples of them, and "
        "objects with + have",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Number, np.generic)) and not isinstance(value, np.flexible)


def _is_by_element(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and type(value).__add__ in _BY_ELEMENT


def _like(value: Any, items: list[Any]) -> Any:
    """A list or tuple of the type of `value` with these items."""
    make = getattr(type(value), "_make", type(value))  # a namedtuple takes its fields one by one
    return make(items)


def _has_own_sum(value: Any) -> bool:
    """Whether it is an object of a class with a + that is its own affair."""
    if isinstance(value, (numbers.Number, np.generic, np.ndarray)):
        return False
    plus = getattr(type(value), "__add__", getattr(type(value), "__radd__", None))
    return plus is not None and plus not in _JOINING


def _plus(a: Any, b: Any, where: str) -> Any:
    try:
        return a + b
    except TypeError as error:  # datetime64 + datetime64, Decimal + float, records
        raise _error(a, b, where, str(error)) from error


def _error(a: Any, b: Any, where: str, why: str) -> TypeError:
    place = f" at result{where}" if where else ""
    return TypeError(f"cannot add two results{place}: {_kind(a)} and {_kind(b)}: {why}; {_HINT}")


def _kind(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, np.ndarray):
        return f"{name} of {value.dtype} with shape {value.shape}"
    if isinstance(value, (list, tuple)):
        return f"{name} of length {len(value)}"
    return name


# The tree. Slices pair up as (0,1)(2,3)..., the pairs pair up again, and an odd one moves up as it is. So the
# j-th node of level k stands for [j * 2**k, min((j + 1) * 2**k, n)), which is all the arithmetic below.


def _level(size: int) -> int:
    """The lowest level whose nodes can hold `size` slices."""
    return (size - 1).bit_length()


def is_span(lo: int, hi: int, n: int) -> bool:
    """Whether [lo, hi) is a node of the tree over n slices."""
    if not 0 <= lo < hi <= n:
        return False
    width = 1 << (hi - lo - 1).bit_length()
    return lo % width == 0 and (hi - lo == width or hi == n)


def sibling(span: Span, n: int) -> Span | None:
    """The node that `span` is added to, left or right of it; None for the root. ValueError for no node."""
    return _sibling(_checked(span, n), n)


@functools.lru_cache(16384)  # the same ones each round
def _sibling(span: Span, n: int) -> Span | None:
    lo, hi = span
    width = 1 << (hi - lo - 1).bit_length()
    while width < n:
        if lo & width:
            return lo - width, lo
        if lo + width < n:
            return lo + width, min(lo + 2 * width, n)
        width *= 2  # an odd one moves up
    return None


def parent(span: Span, n: int) -> Span:
    """The node that `span` and its sibling make together; the root is its own parent."""
    other = sibling(span, n)
    if other is None:
        return span
    return min(span[0], other[0]), max(span[1], other[1])


def _checked(span: Span, n: int) -> Span:
    if span[1] - span[0] == 1 and 0 <= span[0] < n:  # most of them
        return span
    if not is_span(span[0], span[1], n):
        raise ValueError(f"{span} is not a node of the reduction tree over {n} slices")
    return span


V = TypeVar("V")
STAYS = object()  # what a reduce function gives to leave its two operands where they are


class Tree(Generic[V]):
    """The results over n slices that have come in so far, each for a node of the tree, no slice twice.

    A worker's tree holds values, a node's `Held` results, the master's encoded ones. `folds`: whether results make
    pairs; those of a job that collects them stay as they came.
    """

    def __init__(self, n: int, *, folds: bool = True) -> None:
        if n < 1:
            raise ValueError(f"a reduction needs at least one slice, not {n}")
        self.n = n
        self.folds = folds
        self.values: dict[Span, V] = {}
        self.covered = 0  # slices
        self._seen = bytearray(n)

    def __repr__(self) -> str:
        return f"<Tree over {self.n} slices, holds {self.spans}>"

    @property
    def spans(self) -> list[Span]:
        """The nodes that are held, from the lowest slice to the highest."""
        return sorted(self.values)

    @property
    def complete(self) -> bool:
        """Whether everything is folded into the root; `values[0, n]` is then the result."""
        return (0, self.n) in self.values

    def add(self, span: Span, value: V) -> bool:
        """Take the result of `span`, in place of results of parts of it; drop it (False) if it is covered.

        So a slice that was computed twice still counts once. ValueError for a span that is not of the tree.
        """
        lo, hi = _checked(span, self.n)
        if self._seen.find(1, lo, hi) >= 0:
            if self._is_covered(lo, hi):
                return False
            for part in self._parts(lo, hi):
                self.take(part)
        self._seen[lo:hi] = b"\x01" * (hi - lo)
        self.covered += hi - lo
        self.values[span] = value
        return True

    def _is_covered(self, lo: int, hi: int) -> bool:
        """Whether this node, or one above it, is held."""
        width = 1 << _level(hi - lo)
        while (lo, hi) not in self.values and hi - lo < self.n:
            width *= 2
            lo -= lo % width
            hi = min(lo + width, self.n)
        return (lo, hi) in self.values

    def _parts(self, lo: int, hi: int) -> list[Span]:
        """The nodes below this one that are held."""
        found, below = [], [(lo, hi)]
        while below:
            lo, hi = below.pop()
            if (lo, hi) in self.values:
                found.append((lo, hi))
            elif hi - lo > 1 and self._seen.find(1, lo, hi) >= 0:
                middle = lo + (1 << (_level(hi - lo) - 1))
                below += [(lo, middle), (middle, hi)]
        return found

    def conclude(self, value: V) -> None:
        """All that is here, which is all, has been folded into this."""
        self.values = {(0, self.n): value}

    def take(self, span: Span) -> V:
        """Give the result of `span` away, as if it had never come."""
        lo, hi = span
        self._seen[lo:hi] = bytes(hi - lo)
        self.covered -= hi - lo
        return self.values.pop(span)

    def pairs(self) -> list[tuple[Span, Span]]:
        """The (left, right) nodes that are both here and can be folded now, from left to right."""
        if len(self.values) < 2 or not self.folds:
            return []
        found = ((span, _sibling(span, self.n)) for span in self.spans)
        return [(span, other) for span, other in found if other in self.values and span < other]

    def fold_from(self, span: Span, reduce: Callable[[Any, Any], Any]) -> None:
        """Fold upward from a result that has just been added, as far as the siblings are here.

        The left operand has the lower slices. When `reduce` raises or gives STAYS, both are still here.
        """
        values = self.values
        while (other := _sibling(span, self.n)) in values and span in values:
            assert other is not None
            left, right = (span, other) if span < other else (other, span)
            total = reduce(values[left], values[right])
            if total is STAYS:
                return
            del values[left], values[right]
            span = left[0], right[1]
            values[span] = total

    def groups(self) -> list[list[Span]]:
        """The nodes that are here, those together that can be folded into one."""
        nodes: Tree[list[Span]] = Tree(self.n)
        for span in self.values:
            nodes.add(span, [span])
        nodes.fold(lambda left, right: left + right)
        return [nodes.values[span] for span in nodes.spans]

    def fold(self, reduce: Callable[[Any, Any], Any]) -> None:
        """Fold all that can be folded."""
        for span in self.spans:
            self.fold_from(span, reduce)
