"""A node's books of one round: who maps what, what is folded when, what a lost worker leaves."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qjam_worker.node.results import Held
from qjam_worker.node.rounds import FOLD_LATE, MIN_LATE, NodeData, NodeJob, NodeRound, take_block
from qjam_worker.values.reduction import Span
from qjam_worker.wire.messages import LATE
from refs_as_text import ref, refs

JOB = NodeJob(1, {"code": None, "reduce": False})


def slices(*indices: int, nslices: int | None = None, data: bool = True) -> NodeData:
    made = NodeData(1 if data else None, nslices or len(indices))
    made.add({index: ref(f"ref{index}") if data else None for index in indices})
    return made


def begun(workers: int, *indices: int, missing: Collection[str] = (), **more: Any) -> NodeRound:
    """A round over these slices, which are all given to this node; the refs that are missing are on their way."""
    round_ = NodeRound(1, JOB, slices(*indices, **more), workers)
    round_.add(list(indices), missing)
    return round_


class Result(Held):
    """One that knows whether it is used up."""

    __slots__ = ("released",)

    def __init__(self, text: str) -> None:
        super().__init__(memoryview(text.encode()), True)
        self.released = False

    def release(self) -> None:
        assert not self.released, "released twice"
        self.released = True


def held(text: str = "") -> Result:
    return Result(text)


def together(held: Held) -> bool:
    return True


def one_by_one(held: Held) -> bool:
    return False


def never(results: list[Held]) -> bool:
    return False


def take_map(round_: NodeRound, worker: int, now: float = 0.0) -> list[int]:
    """The slices that a worker is given; empty when there are none."""
    work = round_.take(worker, now, together, never)
    assert work is None or work.fold is None
    return [] if work is None else work.slices


def take_fold(round_: NodeRound, worker: int, how: Any = together, now: float = 0.0) -> list[Span]:
    """The results that a worker is given to fold; empty when there are none."""
    work = round_.take(worker, now, how, never)
    assert work is None or not work.slices
    return [] if work is None or work.fold is None else list(work.fold)


def answer(round_: NodeRound, worker: int, now: float = 0.0) -> list[int]:
    """A worker brings the results of the slices that it has, one by one; gives whose attempts are of no use now."""
    return round_.put(worker, [((index, index + 1), held(str(index))) for index in round_.works[worker].slices], now)


def map_all(round_: NodeRound, worker: int = 0) -> None:
    """Have one worker map everything that it finds, without folding."""
    while round_.ready and take_map(round_, worker):
        answer(round_, worker)


# ---- the data -----------------------------------------------------------------------------------------------


def test_data_keeps_its_slices_in_order_and_tells_which_refs_are_new() -> None:
    made = slices(5, 1, nslices=8)
    assert made.add({3: ref("ref3"), 4: ref("ref3"), 1: ref("ref1")}) == [ref("ref3")]
    assert made.order == [1, 3, 4, 5]
    assert made.refs == {1: ref("ref1"), 3: ref("ref3"), 4: ref("ref3"), 5: ref("ref5")}


def test_a_round_has_data_when_its_slices_have_refs() -> None:
    assert begun(1, 0).has_data
    assert not begun(1, 0, data=False).has_data


# ---- maps ---------------------------------------------------------------------------------------------------


def test_a_worker_begins_with_its_own_part_of_the_data() -> None:
    round_ = begun(2, *range(8))
    assert take_map(round_, 1)[0] == 4
    assert take_map(round_, 0)[0] == 0


def test_the_part_of_a_worker_does_not_depend_on_who_asks_first() -> None:
    firsts = []
    for order in ([0, 1, 2], [2, 1, 0]):
        round_ = begun(3, *range(30))
        firsts.append({worker: take_map(round_, worker)[0] for worker in order})
    assert firsts[0] == firsts[1]


def test_a_worker_whose_part_is_used_up_helps_with_the_rest() -> None:
    round_ = begun(2, 0, 1, 2, 3)
    mapped: list[int] = []
    while round_.ready:
        mapped += take_map(round_, 1)
        answer(round_, 1)
    assert sorted(mapped) == [0, 1, 2, 3]


def test_what_a_worker_takes_is_owed_and_no_longer_ready() -> None:
    round_ = begun(1, 0, 1, 2, 3)
    block = take_map(round_, 0)
    assert round_.works[0].slices == block
    assert round_.ready == [index for index in range(4) if index not in block]
    assert round_.owed == {0, 1, 2, 3}


def test_there_is_nothing_to_take_when_nothing_is_ready() -> None:
    round_ = begun(1, 0)
    take_map(round_, 0)
    assert take_map(round_, 1) == []
    assert 1 not in round_.works


def test_a_slice_that_is_on_its_way_is_not_taken_before_it_is_here() -> None:
    round_ = begun(2, 0, 1, missing=refs(["ref1"]))
    assert round_.missing == refs(["ref1"])
    assert take_map(round_, 0) == [0]
    assert take_map(round_, 1) == []
    round_.arrived(ref("ref1"))
    assert round_.missing == refs([])
    assert take_map(round_, 1) == [1]


def test_slices_with_the_same_content_arrive_together() -> None:
    made = NodeData(1, 3)
    made.add({0: ref("same"), 1: ref("other"), 2: ref("same")})
    round_ = NodeRound(1, JOB, made, 1)
    round_.add([0, 1, 2], refs(["same"]))
    assert round_.ready == [1]
    round_.arrived(ref("same"))
    assert round_.ready == [0, 1, 2]


def test_what_arrives_for_another_round_changes_nothing() -> None:
    round_ = begun(1, 0)
    round_.arrived(ref("ref7"))
    assert round_.ready == [0]


def test_nothing_can_start_without_code_and_params() -> None:
    round_ = begun(1, 0)
    round_.lacking.update(refs(["code:1", "params:1"]))
    round_.arrived(ref("code:1"))
    assert not round_.has_work
    assert round_.missing == refs(["params:1"])
    round_.arrived(ref("params:1"))
    assert round_.has_work


def test_code_and_params_are_asked_for_before_slices() -> None:
    round_ = begun(1, 0, 1, missing=refs(["ref0", "ref1"]))
    round_.lacking.add(ref("code:1"))
    assert round_.missing == refs(["code:1", "ref0", "ref1"])


def test_without_data_each_worker_maps_its_own_slice_alone() -> None:
    round_ = begun(3, 4, 5, 6, nslices=8, data=False)
    assert [take_map(round_, worker) for worker in (2, 0, 1)] == [[6], [4], [5]]
    answer(round_, 0)
    assert take_map(round_, 0) == []


def test_without_data_a_worker_does_not_take_another_ones_slice() -> None:
    round_ = begun(2, 0, 1, data=False)
    assert take_map(round_, 0) == [0]
    answer(round_, 0)
    assert take_map(round_, 0) == []
    assert round_.ready == [1]


def test_without_data_a_node_that_took_over_slices_runs_them_all() -> None:
    round_ = begun(2, 0, 1, 2, 3, 4, data=False)
    map_all(round_, 0)
    map_all(round_, 1)
    assert not round_.owed
    assert round_.tree.spans == [(i, i + 1) for i in range(5)]


def test_slices_that_are_given_again_while_they_are_owed_are_not_mapped_twice() -> None:
    round_ = begun(2, 0, 1, 2, 3, missing=refs(["ref3"]))
    block = take_map(round_, 0)
    round_.add([0, 1, 2, 3], ())
    assert sorted([*block, *round_.ready]) == [0, 1, 2]
    assert round_.waiting == {ref("ref3"): [3]}


def test_slices_that_come_later_take_their_place_among_the_others() -> None:
    round_ = begun(1, 1, 3, nslices=6)
    round_.data.add({0: ref("ref0"), 2: ref("ref2"), 5: ref("ref5")})
    round_.add([0, 2, 5], refs(["ref5"]))
    assert round_.ready == [0, 1, 2, 3]
    round_.arrived(ref("ref5"))
    assert round_.ready == [0, 1, 2, 3, 5]


# ---- blocks -------------------------------------------------------------------------------------------------


def test_blocks_shrink_as_the_work_runs_out() -> None:
    ready, sizes = list(range(64)), []
    while block := take_block(ready, 0, 2):
        sizes.append(len(block))
        ready = ready[len(block) :]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (16, 1)


def test_a_block_has_no_gap() -> None:
    assert take_block([0, 1, 2, 6, 7, 8, 9, 10], 1, 1) == [1, 2]


def test_a_block_begins_anew_behind_the_last_slice() -> None:
    assert take_block([0, 1, 2, 3], 9, 2) == [0]


@given(
    st.sets(st.integers(0, 200), min_size=1).map(sorted),
    st.integers(0, 250),
    st.integers(1, 16),
)
def test_a_block_is_consecutive_and_ready_and_never_empty(ready: list[int], home: int, workers: int) -> None:
    block = take_block(ready, home, workers)
    assert block == list(range(block[0], block[0] + len(block)))
    assert set(block) <= set(ready)
    assert len(block) <= max(1, len(ready) // (2 * workers))


# ---- folds --------------------------------------------------------------------------------------------------


def test_nothing_is_folded_while_slices_are_ready_or_being_mapped() -> None:
    round_ = begun(2, 0, 1, 2)
    take_map(round_, 0)
    answer(round_, 0)
    take_map(round_, 0)
    answer(round_, 0)
    assert round_.tree.pairs()
    take_map(round_, 0)  # the last one
    assert take_fold(round_, 1) == []
    assert not round_.has_work


def test_nothing_is_folded_while_a_slice_is_on_its_way() -> None:
    round_ = begun(1, 0, 1, 2, missing=refs(["ref2"]))
    map_all(round_)
    assert take_fold(round_, 0) == []
    assert not round_.has_work
    assert not round_.settled


def test_small_results_are_folded_all_at_once() -> None:
    round_ = begun(1, 0, 1, 2)
    map_all(round_)
    assert take_fold(round_, 0) == [(0, 1), (1, 2), (2, 3)]


def test_large_results_are_folded_in_pairs_by_several_workers() -> None:
    round_ = begun(2, 0, 1, 2, 3)
    map_all(round_)
    assert take_fold(round_, 0, one_by_one) == [(0, 1), (1, 2)]
    assert take_fold(round_, 1, one_by_one) == [(2, 3), (3, 4)]
    assert take_fold(round_, 2, one_by_one) == []


def test_what_has_no_sibling_here_is_not_folded() -> None:
    round_ = begun(1, 1, 2, nslices=4)
    map_all(round_)
    assert take_fold(round_, 0) == []


def test_what_was_folded_is_released() -> None:
    round_ = begun(1, 0, 1)
    map_all(round_)
    used = list(round_.tree.values.values())
    take_fold(round_, 0)
    assert round_.put(0, [((0, 2), held("sum"))], 0.0) == []
    assert [it.released for it in used] == [True, True]
    assert round_.tree.complete


def test_a_map_releases_nothing() -> None:
    round_ = begun(1, 0)
    take_map(round_, 0)
    result = held("0")
    assert round_.put(0, [((0, 1), result)], 0.0) == []
    assert not result.released


def test_all_results_are_held_also_those_that_are_being_folded() -> None:
    round_ = begun(2, 0, 1, 2, 3)
    map_all(round_)
    results = list(round_.tree.values.values())
    take_fold(round_, 0, one_by_one)
    round_.take_second(1, FOLD_LATE)
    assert sorted(round_.held, key=id) == sorted(results, key=id)


# ---- a lost worker ------------------------------------------------------------------------------------------


def test_a_lost_worker_gives_back_the_slices_that_it_was_mapping() -> None:
    round_ = begun(1, 0, 1, 2, 3)
    block = take_map(round_, 0)
    assert round_.abandon(0) == block
    assert round_.works == {}
    assert not set(block) & set(round_.ready)  # the master sends them again
    round_.drop(block)
    assert not set(block) & round_.owed


def test_what_a_worker_has_left_is_mapped_here_when_nobody_is_told() -> None:
    round_ = begun(1, 0, 1, 2, 3)
    block = take_map(round_, 0)
    round_.again(round_.abandon(0))
    assert round_.ready == [0, 1, 2, 3]
    assert take_map(round_, 0) == block


def test_what_a_lost_worker_folded_can_be_folded_again() -> None:
    round_ = begun(1, 0, 1)
    map_all(round_)
    spans = take_fold(round_, 0)
    assert round_.abandon(0) == []
    assert take_fold(round_, 1) == spans


def test_an_idle_worker_that_is_lost_changes_nothing() -> None:
    round_ = begun(1, 0, 1)
    assert round_.abandon(0) == []
    assert round_.ready == [0, 1]


# ---- slices that others do ------------------------------------------------------------------------------------


def test_slices_that_are_done_elsewhere_are_not_mapped_here() -> None:
    round_ = begun(1, 0, 1, 2, 3, missing=refs(["ref2", "ref3"]))
    assert round_.drop([1, 2]) == []
    assert round_.ready == [0]
    assert round_.waiting == {ref("ref3"): [3]}
    assert round_.missing == refs(["ref3"])
    round_.arrived(ref("ref2"))
    assert round_.ready == [0]
    assert round_.owed == {0, 3}


def test_slices_with_the_same_content_are_done_elsewhere_one_by_one() -> None:
    made = NodeData(1, 2)
    made.add({0: ref("same"), 1: ref("same")})
    round_ = NodeRound(1, JOB, made, 1)
    round_.add([0, 1], refs(["same"]))
    round_.drop([0])
    assert round_.missing == refs(["same"])
    round_.arrived(ref("same"))
    assert round_.ready == [1]


def test_a_worker_with_nothing_but_what_is_done_elsewhere_is_stopped() -> None:
    round_ = begun(1, *range(8))
    block = take_map(round_, 0)
    assert len(block) > 1
    assert round_.drop(block[:1]) == []
    assert round_.drop(block[1:]) == [0]
    assert round_.works == {}


def test_when_the_rest_is_done_elsewhere_what_is_here_is_all() -> None:
    round_ = begun(1, 0, 1, nslices=2)
    take_map(round_, 0)
    answer(round_, 0)
    take_map(round_, 0)
    assert round_.drop([1]) == [0]
    assert round_.settled
    assert round_.tree.spans == [(0, 1)]


def test_a_late_result_of_what_is_done_elsewhere_is_released_and_of_the_rest_it_counts() -> None:
    round_ = begun(1, *range(8))
    block = take_map(round_, 0)
    assert block == [0, 1, 2, 3]
    round_.drop([0, 1])
    left, right = held(), held()
    round_.put(0, [((0, 2), left), ((2, 4), right)], 0.0)
    assert (left.released, right.released) == (True, False)
    assert round_.tree.spans == [(2, 4)]


# ---- second attempts ------------------------------------------------------------------------------------------


def late(*slices: int, workers: int = 4) -> NodeRound:
    """Every worker has a slice; all took 1 s, but worker 0, which is at the first one since 0.0."""
    round_ = begun(workers, *slices)
    for worker in range(len(slices)):
        take_map(round_, worker)
    for worker in range(1, len(slices)):
        answer(round_, worker, 1.0)
    return round_


def test_without_any_result_nobody_is_late() -> None:
    round_ = begun(2, 0, 1)
    take_map(round_, 0)
    assert round_.late_at() is None
    assert round_.take_second(1, 1000.0) is None


def test_an_attempt_is_late_when_it_takes_much_longer_than_the_others() -> None:
    round_ = late(0, 1, 2, 3)
    assert round_.late_at() == LATE * 1.0
    assert round_.take_second(1, LATE - 0.01) is None
    work = round_.take_second(1, LATE)
    assert work is not None
    assert (work.slices, work.began) == ([0], LATE)
    assert round_.works[1] is work


def test_what_takes_next_to_no_time_is_not_late_at_once() -> None:
    round_ = begun(2, 0, 1)
    take_map(round_, 0)
    take_map(round_, 1)
    answer(round_, 1, 1e-6)
    assert round_.late_at() == MIN_LATE


def test_a_block_may_take_as_long_as_all_its_slices() -> None:
    round_ = begun(2, *range(16))
    assert take_map(round_, 0) == [0, 1, 2, 3]
    take_map(round_, 1)
    answer(round_, 1, 3.0)  # 3 slices
    assert round_.late_at() == LATE * 1.0 * 4


def test_it_is_the_last_slice_of_a_block_that_gets_a_second_attempt_and_then_the_one_before() -> None:
    round_ = begun(2, *range(16))
    take_map(round_, 0)
    while round_.ready:
        take_map(round_, 1, 0.0)
        answer(round_, 1, 0.1)
    works = [round_.take_second(worker, 100.0) for worker in range(1, 6)]
    assert [work and work.slices for work in works] == [[3], [2], [1], [0], None]


def test_nothing_is_tried_three_times() -> None:
    round_ = late(0, 1, 2, 3)
    assert round_.take_second(1, 10.0)
    assert round_.late_at() is None
    assert round_.take_second(2, 1000.0) is None


def test_the_first_of_two_results_counts_and_the_other_attempt_is_stopped() -> None:
    for first, second in ((0, 1), (1, 0)):
        round_ = late(0, 1, 2, 3)
        round_.take_second(1, 10.0)
        assert answer(round_, first, 11.0) == [second]
        assert second not in round_.works
        assert round_.tree.spans == [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert not round_.owed


def test_a_block_of_which_a_part_is_there_brings_the_rest() -> None:
    round_ = begun(2, *range(16))
    take_map(round_, 0)
    while round_.ready:
        take_map(round_, 1, 0.0)
        answer(round_, 1, 0.1)
    round_.take_second(1, 100.0)
    assert answer(round_, 1, 101.0) == []  # of slice 3: worker 0 has three more
    early = round_.tree.values[3, 4]
    assert isinstance(early, Result)
    whole = held("0 to 3")
    round_.put(0, [((0, 4), whole)], 102.0)
    assert round_.tree.values[0, 4] is whole
    assert early.released
    assert not round_.owed


def test_a_result_that_comes_when_all_of_it_is_there_is_released() -> None:
    round_ = begun(2, *range(8))
    assert take_map(round_, 0) == [0, 1]
    while round_.ready:
        take_map(round_, 1)
        answer(round_, 1, 0.1)
    round_.take_second(1, 100.0)
    answer(round_, 1, 100.1)
    round_.take_second(2, 100.2)
    assert answer(round_, 2, 100.3) == [0]
    assert 0 not in round_.works  # whatever worker 0 brings now has no place here


def test_how_long_slices_take_is_known_from_those_that_counted_and_those_that_did_not() -> None:
    round_ = late(0, 1, 2, 3)
    assert (round_.mapped, round_.seconds) == (3, 3.0)
    round_.take_second(1, 10.0)
    answer(round_, 1, 10.5)
    assert (round_.mapped, round_.seconds) == (4, 3.5)


def test_a_lost_second_attempt_leaves_the_slice_to_the_first_and_a_third_may_be_made() -> None:
    round_ = late(0, 1, 2, 3)
    round_.take_second(1, 10.0)
    assert round_.abandon(1) == []
    assert round_.late_at() == LATE
    assert round_.take_second(2, 11.0)


def test_a_lost_first_attempt_leaves_the_slice_to_the_second() -> None:
    round_ = late(0, 1, 2, 3)
    round_.take_second(1, 10.0)
    assert round_.abandon(0) == []
    assert answer(round_, 1, 11.0) == []
    assert not round_.owed


def test_when_both_attempts_are_lost_the_slice_is_nobodys() -> None:
    round_ = late(0, 1, 2, 3)
    round_.take_second(1, 10.0)
    round_.abandon(0)
    assert round_.abandon(1) == [0]


def test_without_data_nobody_is_late_with_a_map() -> None:
    round_ = begun(2, 0, 1, data=False)
    take_map(round_, 0)
    take_map(round_, 1)
    answer(round_, 1, 0.001)
    assert round_.late_at() is None
    assert round_.take_second(1, 1000.0) is None


def folding() -> NodeRound:
    """Worker 0 folds slices 0 and 1 since 0.0."""
    round_ = begun(2, 0, 1)
    map_all(round_, 1)
    take_fold(round_, 0)
    return round_


def test_a_fold_that_takes_long_gets_a_second_attempt_at_the_same_results() -> None:
    round_ = folding()
    assert round_.late_at() == FOLD_LATE
    assert round_.take_second(1, FOLD_LATE - 0.01) is None
    work = round_.take_second(1, FOLD_LATE)
    assert work is not None
    assert work.fold is round_.works[0].fold
    assert work.slices == []
    assert round_.late_at() is None


def test_the_first_of_two_folds_counts_and_the_other_one_is_stopped() -> None:
    for first, second in ((0, 1), (1, 0)):
        round_ = folding()
        round_.take_second(1, FOLD_LATE)
        parts = list(round_.held)
        assert round_.put(first, [((0, 2), held("sum"))], FOLD_LATE) == [second]
        assert all(isinstance(part, Result) and part.released for part in parts)
        assert round_.settled


def test_a_lost_attempt_at_a_fold_leaves_it_to_the_other() -> None:
    for lost, other in ((0, 1), (1, 0)):
        round_ = folding()
        round_.take_second(1, FOLD_LATE)
        assert round_.abandon(lost) == []
        assert round_.tree.spans == []
        assert round_.put(other, [((0, 2), held("sum"))], FOLD_LATE) == []
        assert round_.settled


def test_when_both_attempts_at_a_fold_are_lost_it_can_be_folded_again() -> None:
    round_ = folding()
    round_.take_second(1, FOLD_LATE)
    round_.abandon(0)
    round_.abandon(1)
    assert take_fold(round_, 0, now=20.0) == [(0, 1), (1, 2)]
    assert round_.late_at() == 20.0 + FOLD_LATE


def test_a_fold_gets_a_second_attempt_also_where_its_first_slice_had_one() -> None:
    round_ = late(0, 1, workers=2)
    round_.take_second(1, 10.0)
    answer(round_, 1, 11.0)
    take_fold(round_, 1, now=11.0)
    assert round_.late_at() == 11.0 + FOLD_LATE
    assert round_.take_second(0, 11.0 + FOLD_LATE)


def test_a_second_fold_from_the_same_slice_may_have_a_second_attempt_as_well() -> None:
    round_ = begun(2, 0, 1, 2, 3)
    map_all(round_)
    take_fold(round_, 0, one_by_one)
    round_.take_second(1, FOLD_LATE)
    round_.put(0, [((0, 2), held("sum"))], FOLD_LATE)
    take_fold(round_, 0, one_by_one)
    round_.put(0, [((2, 4), held("sum"))], FOLD_LATE)
    assert take_fold(round_, 0, one_by_one, 20.0) == [(0, 2), (2, 4)]
    assert round_.late_at() == 20.0 + FOLD_LATE


# ---- what another node tries as well ----------------------------------------------------------------------------


def test_the_last_slices_that_nobody_has_begun_are_shared() -> None:
    round_ = begun(1, *range(8))
    taken = take_map(round_, 0)
    assert round_.share(2, None, True, 0.0) == [7, 6]
    assert round_.ready == [index for index in range(6) if index not in taken]
    assert round_.owed == set(range(8))


def test_slices_whose_data_is_not_here_yet_are_shared_first() -> None:
    round_ = begun(1, *range(4), missing=refs(["ref0", "ref1"]))
    assert round_.share(3, None, True, 0.0) == [0, 1, 3]
    round_.arrived(ref("ref0"))
    assert 0 in round_.ready


def test_what_is_shared_is_mapped_here_when_all_else_is_done() -> None:
    round_ = begun(1, *range(4))
    round_.share(2, None, True, 0.0)
    order: list[int] = []
    while block := take_map(round_, 0):
        order += block
        answer(round_, 0)
        if not round_.owed:
            break
    assert sorted(order[:2]) == [0, 1]
    assert sorted(order) == [0, 1, 2, 3]


def test_there_is_work_while_something_is_lent() -> None:
    round_ = begun(1, 0)
    round_.share(1, None, True, 0.0)
    assert round_.ready == []
    assert round_.has_work
    assert not round_.settled


def test_what_is_shared_is_not_shared_again() -> None:
    round_ = begun(1, *range(4))
    assert round_.share(2, None, True, 0.0) == [3, 2]
    assert round_.share(9, None, True, 0.0) == [1, 0]
    assert round_.share(9, None, True, 0.0) == []


def test_what_a_worker_is_late_with_is_shared_by_what_is_usual_over_there() -> None:
    round_ = begun(1, 0)
    take_map(round_, 0)
    assert round_.share(1, 1.0, True, LATE - 0.01) == []
    assert round_.share(1, None, True, 1000.0) == []  # nobody knows what is usual
    assert round_.share(1, 1.0, True, LATE) == [0]
    assert round_.share(1, 1.0, True, LATE) == []
    assert round_.owed == {0}


def test_no_more_is_shared_than_was_asked_for() -> None:
    round_ = begun(1, *range(6))
    take_map(round_, 0)
    assert len(round_.share(2, 0.001, True, 1000.0)) == 2
    assert len(round_.share(4, 0.001, True, 1000.0)) == 4


def test_what_is_shared_gets_no_second_attempt_here() -> None:
    round_ = late(0, 1, 2, 3)
    assert round_.share(1, 1.0, True, 10.0) == [0]
    assert round_.late_at() is None
    assert round_.take_second(1, 1000.0) is None


def test_a_lost_worker_leaves_a_slice_that_is_lent_to_those_that_have_it() -> None:
    round_ = begun(2, 0, 1, 2, 3)
    take_map(round_, 0)
    round_.share(1, 0.001, True, 0.0)
    assert round_.abandon(0) == [0]
    assert round_.offered == [3]


def test_what_is_given_away_is_not_mapped_here() -> None:
    round_ = begun(1, *range(4), missing=refs(["ref0"]))
    assert round_.share(2, 0.001, False, 1000.0) == [0, 3]
    assert round_.missing == refs([])
    assert round_.ready == [1, 2]
    assert round_.owed == {1, 2}
    assert round_.offered == []


def test_what_a_worker_has_begun_is_not_given_away() -> None:
    round_ = begun(1, 0, 1)
    taken = take_map(round_, 0)
    assert round_.share(9, 0.001, False, 1000.0) == [1]
    assert round_.owed == set(taken)


def test_what_was_given_away_may_come_back() -> None:
    round_ = begun(1, *range(4))
    round_.share(2, None, False, 0.0)
    round_.add([2, 3], ())
    assert round_.ready == [0, 1, 2, 3]


# ---- when it is settled ---------------------------------------------------------------------------------------


def test_a_round_is_settled_when_all_is_mapped_and_folded() -> None:
    round_ = begun(1, 0, 1)
    assert not round_.settled
    map_all(round_)
    assert not round_.settled  # a pair is left
    take_fold(round_, 0)
    assert not round_.settled  # it is being folded
    round_.put(0, [((0, 2), held("sum"))], 0.0)
    assert round_.settled


def test_a_round_whose_results_have_no_sibling_here_is_settled() -> None:
    round_ = begun(1, 1, 2, nslices=4)
    map_all(round_)
    assert round_.settled
    assert not round_.tree.complete


def test_a_settled_round_that_is_given_more_is_not_settled() -> None:
    round_ = begun(1, 0, nslices=2)
    map_all(round_)
    round_.data.add({1: ref("ref1")})
    round_.add([1], ())
    assert not round_.settled
    assert round_.has_work


def test_there_is_work_while_slices_are_ready() -> None:
    round_ = begun(1, 0)
    assert round_.has_work
    take_map(round_, 0)
    assert not round_.has_work


def test_the_repr_tells_what_is_left() -> None:
    round_ = begun(1, 0, 1, 2, 3, 4, 5, nslices=8, missing=refs(["ref5"]))
    take_map(round_, 0)
    assert repr(round_) == "<NodeRound 1: 3 ready, 1 refs on their way, at work {0: <map [0, 1]>}, holds []>"
    answer(round_, 0)
    round_.drop([2, 3, 4, 5])
    take_fold(round_, 0)
    assert repr(round_).endswith("0 ready, 0 refs on their way, at work {0: <fold [(0, 1), (1, 2)]>}, holds []>")


def concatenated(left: Held, right: Held) -> Result:
    assert left.flat is not None
    assert right.flat is not None
    return held((bytes(left.flat) + bytes(right.flat)).decode())


@given(st.integers(1, 24), st.integers(1, 4), st.integers(0, 2**32))
def test_whoever_is_fast_slow_late_or_lost_each_slice_counts_once(nslices: int, workers: int, seed: int) -> None:
    chance = Random(seed)
    round_ = begun(workers, *range(nslices))
    made: list[Result] = []

    def put(worker: int, now: float) -> list[int]:
        work = round_.works[worker]
        roots: list[tuple[Span, Held]] = [((index, index + 1), held(f"{index} ")) for index in work.slices]
        if work.fold is not None:
            (low, left), (high, right) = work.fold.items()
            roots = [((low[0], high[1]), concatenated(left, right))]
        made.extend(root for _, root in roots if isinstance(root, Result))
        return round_.put(worker, roots, now)

    for step in range(10_000):
        worker = chance.randrange(workers)
        now = float(step)
        if worker in round_.works and chance.random() < 0.1:
            lost = round_.abandon(worker)
            round_.drop(lost)
            round_.add(lost, ())
        elif worker in round_.works and chance.random() < 0.5:
            for stopped in put(worker, now):
                assert stopped not in round_.works
        elif worker not in round_.works and round_.take(worker, now, one_by_one, never) is None:
            round_.take_second(worker, now)
        if chance.random() < 0.05:
            round_.share(chance.randint(1, 3), 1.0, True, now)  # another node tries them, and is never done
        if round_.settled:
            break
    whole = round_.tree.values[0, nslices].flat
    assert whole is not None
    assert bytes(whole).split() == [str(index).encode() for index in range(nslices)]
    assert [result for result in made if not result.released] == [round_.tree.values[0, nslices]]
