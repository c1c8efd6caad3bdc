"""Where slices live: by example, and what holds for whatever nodes come and go."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from qjam.dispatch.assignment import place, spread

NODES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9), min_size=1)
SLICES = st.integers(1, 300)


def placed(nslices: int, *memberships: dict[str, int]) -> dict[int, str]:
    """The homes after these nodes have been there, one membership after the other."""
    homes: dict[int, str] = {}
    for workers in memberships:
        homes = place(nslices, homes, workers)
    return homes


def by_node(homes: dict[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index in sorted(homes):
        found.setdefault(homes[index], []).append(index)
    return found


# ---- by example -----------------------------------------------------------------------------------------------


def test_neighbours_live_together_by_the_number_of_workers() -> None:
    assert by_node(placed(8, {"a": 1, "b": 3})) == {"a": [0, 1], "b": [2, 3, 4, 5, 6, 7]}


def test_a_node_that_comes_takes_the_last_slices_of_those_that_have_too_many() -> None:
    homes = placed(8, {"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 2})
    assert by_node(homes) == {"a": [0, 1], "c": [2, 3, 6, 7], "b": [4, 5]}


def test_what_a_node_had_that_goes_is_shared_by_those_that_stay() -> None:
    homes = placed(12, {"a": 1, "b": 1, "c": 1}, {"b": 1, "c": 1})
    assert by_node(homes) == {"b": [0, 1, 4, 5, 6, 7], "c": [2, 3, 8, 9, 10, 11]}


def test_a_node_that_comes_back_under_another_name_gets_as_much_as_it_had() -> None:
    without = placed(12, {"a": 1, "b": 1, "c": 1}, {"b": 1, "c": 1})
    homes = place(12, without, {"b": 1, "c": 1, "a2": 1})
    assert by_node(homes) == {"b": [0, 1, 4, 5], "c": [2, 3, 8, 9], "a2": [6, 7, 10, 11]}


def test_fewer_slices_than_workers_leave_some_nodes_without() -> None:
    homes = placed(2, {"a": 4, "b": 4, "c": 4})
    assert len(homes) == 2
    assert set(homes.values()) < {"a", "b", "c"}


def test_homes_that_nobody_has_any_more_count_for_nothing() -> None:
    assert place(4, {0: "gone", 3: "gone"}, {"a": 1}) == dict.fromkeys(range(4), "a")


def test_slices_without_a_home_are_spread_in_their_order() -> None:
    assert spread([3, 4, 9, 10], {"a": 1, "b": 1}) == {"a": [3, 4], "b": [9, 10]}


def test_fewer_slices_than_workers_go_to_several_nodes() -> None:
    assert spread([3, 4], {"a": 2, "b": 2}) == {"a": [3], "b": [4]}


def test_nothing_to_spread_goes_to_nobody() -> None:
    assert spread([], {"a": 1}) == {}


# ---- what always holds ----------------------------------------------------------------------------------------


def check(nslices: int, homes: dict[int, str], workers: dict[str, int]) -> None:
    """Every slice has a home, and every node its share within one."""
    assert sorted(homes) == list(range(nslices))
    assert set(homes.values()) <= set(workers)
    counts = Counter(homes.values())
    for name, count in workers.items():
        assert abs(counts[name] - Fraction(nslices * count, sum(workers.values()))) < 1


@given(SLICES, st.lists(NODES, min_size=1, max_size=6))
def test_every_slice_has_a_home_and_every_node_its_share(nslices: int, memberships: list[dict[str, int]]) -> None:
    check(nslices, placed(nslices, *memberships), memberships[-1])


@given(SLICES, st.dictionaries(st.integers(0, 299), st.sampled_from("abcdefghxyz")), NODES)
def test_wherever_slices_have_been_they_have_homes(
    nslices: int, homes: dict[int, str], workers: dict[str, int]
) -> None:
    check(nslices, place(nslices, homes, workers), workers)


@given(SLICES, st.lists(NODES, min_size=1, max_size=6))
def test_nothing_moves_that_need_not(nslices: int, memberships: list[dict[str, int]]) -> None:
    before = placed(nslices, *memberships[:-1])
    after = place(nslices, before, memberships[-1])
    quota = Counter(after.values())
    kept = Counter(after[index] for index in before if before[index] == after[index])
    for name, had in Counter(before.values()).items():
        assert kept[name] == min(had, quota[name])  # it gives up what is beyond its share, and nothing else
    for name, indices in by_node(before).items():
        stay = [index for index in indices if after[index] == name]
        assert stay == indices[: len(stay)]  # the last ones go


@given(SLICES, st.lists(NODES, min_size=1, max_size=6))
def test_while_nobody_comes_or_goes_nothing_moves(nslices: int, memberships: list[dict[str, int]]) -> None:
    homes = placed(nslices, *memberships)
    assert place(nslices, homes, memberships[-1]) == homes


@given(SLICES, NODES)
def test_at_first_every_node_has_neighbours(nslices: int, workers: dict[str, int]) -> None:
    for indices in by_node(placed(nslices, workers)).values():
        assert indices == list(range(indices[0], indices[-1] + 1))


@given(st.sets(st.integers(0, 500)).map(sorted), NODES)
def test_whatever_is_spread_goes_to_one_node_each_in_proportion(indices: list[int], workers: dict[str, int]) -> None:
    found = spread(indices, workers)
    assert [index for name in workers for index in found.get(name, ())] == indices
    for name, count in workers.items():
        share = Fraction(len(indices) * count, sum(workers.values()))
        assert abs(len(found.get(name, ())) - share) < 1
