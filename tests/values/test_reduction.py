"""default_reduce adds what can be added one way; the tree gives one result, however its parts come in."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjam_worker.values.reduction import STAYS, Tree, default_reduce, is_span, parent, sibling

Pair = collections.namedtuple("Pair", "cost grad")


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(np.all(a == b))


# ---- default_reduce ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "total"),
    [
        (42, 42, 84),
        (1.5, 2, 3.5),
        (1j, 1, 1 + 1j),
        (True, True, 2),
        (2**200, 1, 2**200 + 1),
        (np.float32(1), np.float32(2), np.float32(3)),
        (np.int64(1), 2.5, np.float64(3.5)),
        (np.timedelta64(1, "s"), np.timedelta64(2, "s"), np.timedelta64(3, "s")),
        (decimal.Decimal("1.5"), 1, decimal.Decimal("2.5")),
        (fractions.Fraction(1, 3), fractions.Fraction(1, 3), fractions.Fraction(2, 3)),
    ],
)
def test_numbers_are_added(a: Any, b: Any, total: Any) -> None:
    assert same(default_reduce(a, b), total)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_arrays_of_one_shape_are_added(shape: tuple[int, ...]) -> None:
    total = default_reduce(np.ones(shape), np.ones(shape))
    assert type(total) is np.ndarray
    assert total.shape == shape
    assert np.all(total == 2)


def test_lists_and_tuples_are_added_element_by_element() -> None:
    total = default_reduce((1.0, [np.ones(2), (1,)]), (2.0, [np.ones(2), (2,)]))
    assert type(total) is tuple
    assert total[0] == 3.0
    assert type(total[1]) is list
    assert np.array_equal(total[1][0], [2, 2])
    assert total[1][1] == (3,)
    assert default_reduce([], []) == []
    assert default_reduce((), ()) == ()


def test_a_namedtuple_stays_one() -> None:
    assert default_reduce(Pair(1, 2.5), Pair(3, 4.5)) == Pair(4, 7.0)
    assert type(default_reduce(Pair(1, 2.5), Pair(3, 4.5))) is Pair


def test_the_operands_are_left_as_they_were() -> None:
    a, b = np.ones(3), np.ones(3)
    a.flags.writeable = b.flags.writeable = False
    default_reduce([a], [b])
    assert np.array_equal(a, [1, 1, 1])


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ("a", "b", "str and str"),
        (b"a", b"b", "bytes and bytes"),
        ({"a": 1}, {"a": 1}, "dict and dict"),
        (None, None, "NoneType and NoneType"),
        ({1}, {2}, "set and set"),
        (1, None, "int and NoneType"),
        (1, "1", "int and str"),
        ([1], [1, 2], "list of length 1 and list of length 2: their lengths differ"),
        ((1,), [1], "tuple of length 1 and list of length 1"),
        (np.ones(2), np.ones(3), "shape (2,) and ndarray of float64 with shape (3,): their shapes differ"),
        (np.ones((1, 3)), np.ones((3, 1)), "their shapes differ"),
        (1.0, np.ones(3), "float and ndarray"),
        (np.ones(3), np.float64(1), "ndarray of float64 with shape (3,) and float64"),
        (1.0, np.array(1.0), "float and ndarray"),
        ([1.0], np.ones(1), "list of length 1 and ndarray"),
        (np.str_("a"), np.str_("b"), "str_ and str_"),
        (np.array(["a"]), np.array(["b"]), "text is not added"),
        (np.datetime64("2020-01-01"), np.datetime64("2020-01-01"), "datetime64"),
        (datetime.date(2020, 1, 1), datetime.date(2020, 1, 1), "date and date"),
        (decimal.Decimal(1), 1.5, "Decimal and float"),
        (np.zeros(1, "i4,f4"), np.zeros(1, "i4,f4"), "ndarray"),
    ],
)
def test_anything_else_is_a_type_error_that_says_what_was_found(a: Any, b: Any, found: str) -> None:
    with pytest.raises(TypeError) as caught:
        default_reduce(a, b)
    assert found in str(caught.value)
    assert "define reduce(a, b) in the module" in str(caught.value)


def test_the_error_says_where_in_the_result() -> None:
    with pytest.raises(TypeError, match=r"at result\[1\]\[0\]: str and str"):
        default_reduce((1, ["x"]), (1, ["y"]))


# ---- the tree ---------------------------------------------------------------------------------------------


def levels(n: int) -> list[list[tuple[int, int]]]:
    """The tree as DESIGN tells it: pairs, then pairs of pairs, an odd one moves up."""
    level = [(i, i + 1) for i in range(n)]
    every = [level]
    while len(level) > 1:
        level = [(pair[0][0], pair[-1][1]) for pair in (level[i : i + 2] for i in range(0, len(level), 2))]
        every.append(level)
    return every


def naive(values: list[Any]) -> Any:
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [join(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return values[0]


def join(a: str, b: str) -> str:
    """Neither commutative nor associative: what it gives tells how it was made."""
    return f"({a}{b})"


@pytest.mark.parametrize("n", range(1, 41))
def test_the_spans_are_those_of_pairing_level_by_level(n: int) -> None:
    nodes = {span for level in levels(n) for span in level}
    assert nodes == {(lo, hi) for lo in range(-1, n + 2) for hi in range(-1, n + 2) if is_span(lo, hi, n)}


@pytest.mark.parametrize("n", range(1, 41))
def test_parent_and_sibling_are_those_of_pairing_level_by_level(n: int) -> None:
    assert sibling((0, n), n) is None
    assert parent((0, n), n) == (0, n)
    for level in levels(n):
        for left, right in zip(level[::2], level[1::2]):  # an odd one at the end has no pair here
            assert (sibling(left, n), sibling(right, n)) == (right, left)
            assert parent(left, n) == parent(right, n) == (left[0], right[1])


@pytest.mark.parametrize("span", [(0, 3), (1, 3), (-1, 0), (2, 2), (4, 6), (3, 2)])
def test_what_is_no_node_is_refused(span: tuple[int, int]) -> None:
    for call in (lambda: sibling(span, 5), lambda: parent(span, 5), lambda: Tree(5).add(span, 0)):
        with pytest.raises(ValueError, match="not a node of the reduction tree over 5 slices"):
            call()


def test_a_tree_needs_a_slice() -> None:
    with pytest.raises(ValueError, match="at least one slice"):
        Tree(0)


@given(st.integers(1, 40), st.data())
def test_the_result_is_the_same_in_whatever_order_slices_come_in(n: int, data: st.DataObject) -> None:
    tree = Tree(n)
    for i in data.draw(st.permutations(range(n))):
        tree.add((i, i + 1), str(i))
        if data.draw(st.booleans()):
            tree.fold(join)
    tree.fold(join)
    assert tree.complete
    assert tree.spans == [(0, n)]
    assert tree.values[0, n] == naive([str(i) for i in range(n)])


@given(st.integers(1, 24), st.data())
def test_each_slice_counts_once_whatever_comes_twice_or_in_parts(n: int, data: st.DataObject) -> None:
    every = [span for level in levels(n) for span in level]
    tree = Tree(n)
    sent = data.draw(st.lists(st.sampled_from(every), max_size=40)) + [(i, i + 1) for i in range(n)]
    for lo, hi in sent:
        tree.add((lo, hi), part(lo, hi, n))
        if data.draw(st.booleans()):
            tree.fold(join)
        held = [i for lo, hi in tree.spans for i in range(lo, hi)]
        assert len(held) == len(set(held))
    tree.fold(join)
    assert tree.values == {(0, n): naive([str(i) for i in range(n)])}


def part(lo: int, hi: int, n: int) -> str:
    """The value of one node: its slices pair up among themselves as they do in the whole tree."""
    return naive([str(i) for i in range(lo, hi)])


def test_pairs_are_what_can_be_folded_now_left_before_right() -> None:
    tree = Tree(6)
    for i in (5, 3, 2, 4, 0):
        tree.add((i, i + 1), i)
    assert tree.pairs() == [((2, 3), (3, 4)), ((4, 5), (5, 6))]
    assert not tree.complete


def test_folding_from_each_result_as_it_comes_is_folding_all() -> None:
    tree = Tree(5)
    for i in (4, 1, 0, 3, 2):
        tree.add((i, i + 1), str(i))
        tree.fold_from((i, i + 1), join)
    assert tree.values == {(0, 5): naive(list("01234"))}


def test_folding_from_a_span_leaves_other_pairs_alone() -> None:
    tree = Tree(4)
    for i in range(4):
        tree.add((i, i + 1), str(i))
    tree.fold_from((0, 1), join)
    assert tree.spans == [(0, 2), (2, 3), (3, 4)]
    tree.fold_from((0, 1), join)  # gone already
    assert tree.spans == [(0, 2), (2, 3), (3, 4)]


def test_a_reduce_may_leave_its_operands_where_they_are() -> None:
    tree = Tree(4)
    for i in range(4):
        tree.add((i, i + 1), str(i))
    tree.fold(lambda a, b: STAYS if a == "0" else join(a, b))
    assert tree.values == {(0, 1): "0", (1, 2): "1", (2, 4): "(23)"}


def test_the_slices_that_are_covered_are_counted() -> None:
    tree = Tree(8)
    spans = [(1, 2), (0, 4), (2, 4), (6, 7), (4, 8), (6, 7)]
    told = [(tree.add(span, "x"), tree.covered) for span in spans]
    assert told == [(True, 1), (True, 4), (False, 4), (True, 5), (True, 8), (False, 8)]


def test_a_result_that_is_taken_away_may_come_again() -> None:
    tree = Tree(4)
    tree.add((0, 2), "01")
    assert tree.take((0, 2)) == "01"
    assert (tree.covered, tree.values) == (0, {})
    assert tree.add((1, 2), "1")


def test_one_slice_is_complete_without_a_reduce() -> None:
    tree = Tree(1)
    tree.add((0, 1), "x")
    tree.fold(join)
    assert tree.complete
    assert tree.values[0, 1] == "x"


def test_the_first_of_two_results_for_a_span_stays() -> None:
    tree = Tree(2)
    tree.add((0, 1), "first")
    tree.add((0, 1), "second")
    assert tree.values == {(0, 1): "first"}


def test_a_larger_part_replaces_those_in_it_and_covers_those_that_come_late() -> None:
    tree = Tree(8)
    tree.add((1, 2), "1")
    tree.add((2, 4), "23")
    tree.add((4, 5), "4")
    tree.add((0, 4), "0123")
    tree.add((3, 4), "3")
    assert tree.values == {(0, 4): "0123", (4, 5): "4"}


def test_a_reduce_that_raises_leaves_its_operands() -> None:
    tree = Tree(4)
    for i in range(4):
        tree.add((i, i + 1), i)

    def reduce(a: int, b: int) -> int:
        if a == 2:
            raise RuntimeError("no")
        return a + b

    with pytest.raises(RuntimeError):
        tree.fold(reduce)
    assert tree.values == {(0, 2): 1, (2, 3): 2, (3, 4): 3}


def test_a_repr_tells_what_is_held() -> None:
    tree = Tree(3)
    tree.add((2, 3), 0)
    assert repr(tree) == "<Tree over 3 slices, holds [(2, 3)]>"


@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_whatever_overlaps_is_taken_as_one_that_looks_through_all_would_take_it(n: int, random: Any) -> None:
    every = [span for level in levels(n) for span in level]
    tree: Tree = Tree(n)
    plain: dict[tuple[int, int], int] = {}
    for number in range(30):
        lo, hi = random.choice(every)
        covered = any(low <= lo and hi <= high for low, high in plain)
        assert tree.add((lo, hi), number) is not covered
        if not covered:
            plain = {(low, high): value for (low, high), value in plain.items() if not (lo <= low and high <= hi)}
            plain[lo, hi] = number
        assert tree.values == plain
        assert tree.covered == sum(high - low for low, high in plain)
