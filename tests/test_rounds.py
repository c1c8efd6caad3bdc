"""A node's books of one round: who maps what, what is folded when, what a lost worker leaves."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qjam_worker.reducing import Span
from qjam_worker.rounds import Held, NodeJob, NodeRound, take_block


def job(*indices: int, nslices: int | None = None, data: bool = True, user_reduce: bool = False) -> NodeJob:
    made = NodeJob(1, {}, nslices or len(indices), user_reduce)
    made.add({index: f"ref{index}" if data else None for index in indices})
    return made


def begun(workers: int, *indices: int, missing: Collection[str] = (), **more: Any) -> NodeRound:
    """A round over these slices, which are all given to this node; the refs that are missing are on their way."""
    round_ = NodeRound(1, job(*indices, **more), workers)
    round_.add(list(indices), missing)
    return round_


def held(text: str) -> Held:
    return Held(memoryview(text.encode()), True)


def map_all(round_: NodeRound, worker: int = 0) -> None:
    """Have one worker map everything, slice by slice, without folding."""
    while block := round_.take_map(worker):
        round_.put(worker, [((index, index + 1), held(str(index))) for index in block])


def together(held: Held) -> bool:
    return True


def one_by_one(held: Held) -> bool:
    return False


# ---- the job ------------------------------------------------------------------------------------------------


def test_a_job_keeps_its_slices_in_order() -> None:
    made = job(5, 1, nslices=8)
    made.add({3: "ref3"})
    assert made.order == [1, 3, 5]
    assert made.refs == {1: "ref1", 3: "ref3", 5: "ref5"}


def test_a_job_has_data_when_its_slices_have_refs() -> None:
    assert job(0).has_data
    assert not job(0, data=False).has_data


# ---- maps ---------------------------------------------------------------------------------------------------


def test_a_worker_begins_with_its_own_part_of_the_data() -> None:
    round_ = begun(2, *range(8))
    assert round_.take_map(1)[0] == 4
    assert round_.take_map(0)[0] == 0


def test_the_part_of_a_worker_does_not_depend_on_who_asks_first() -> None:
    firsts = []
    for order in ([0, 1, 2], [2, 1, 0]):
        round_ = begun(3, *range(30))
        firsts.append({worker: round_.take_map(worker)[0] for worker in order})
    assert firsts[0] == firsts[1]


def test_a_worker_whose_part_is_used_up_helps_with_the_rest() -> None:
    round_ = begun(2, 0, 1, 2, 3)
    mapped: list[int] = []
    while block := round_.take_map(1):
        mapped += block
        round_.put(1, [((index, index + 1), held("")) for index in block])
    assert sorted(mapped) == [0, 1, 2, 3]


def test_what_a_worker_takes_is_no_longer_pending() -> None:
    round_ = begun(1, 0, 1, 2, 3)
    block = round_.take_map(0)
    assert round_.mapping == {0: block}
    assert round_.ready == [index for index in range(4) if index not in block]


def test_there_is_nothing_to_take_when_nothing_is_pending() -> None:
    round_ = begun(1, 0)
    round_.take_map(0)
    assert round_.take_map(1) == []
    assert 1 not in round_.mapping


def test_a_slice_that_is_on_its_way_is_not_taken_before_it_is_here() -> None:
    round_ = begun(1, 0, 1, missing=["ref1"])
    assert round_.missing == ["ref1"]
    assert round_.take_map(0) == [0]
    assert round_.take_map(0) == []
    round_.arrived("ref1")
    assert round_.missing == []
    assert round_.take_map(0) == [1]


def test_slices_with_the_same_content_arrive_together() -> None:
    made = NodeJob(1, {}, 3, False)
    made.add({0: "same", 1: "other", 2: "same"})
    round_ = NodeRound(1, made, 1)
    round_.add([0, 1, 2], ["same"])
    assert round_.ready == [1]
    round_.arrived("same")
    assert round_.ready == [0, 1, 2]


def test_what_arrives_for_another_round_changes_nothing() -> None:
    round_ = begun(1, 0)
    round_.arrived("ref7")
    assert round_.ready == [0]


def test_nothing_can_start_without_code_and_params() -> None:
    round_ = begun(1, 0)
    round_.lacking.update(["code:1", "params:1"])
    round_.arrived("code:1")
    assert not round_.has_work
    assert round_.missing == ["params:1"]
    round_.arrived("params:1")
    assert round_.has_work


def test_code_and_params_are_asked_for_before_slices() -> None:
    round_ = begun(1, 0, 1, missing=["ref0", "ref1"])
    round_.lacking.add("code:1")
    assert round_.missing == ["code:1", "ref0", "ref1"]


def test_without_data_each_worker_maps_its_own_slice_alone() -> None:
    round_ = begun(3, 4, 5, 6, nslices=8, data=False)
    assert [round_.take_map(worker) for worker in (2, 0, 1)] == [[6], [4], [5]]
    assert round_.take_map(0) == []


def test_without_data_a_worker_does_not_take_another_ones_slice() -> None:
    round_ = begun(2, 0, 1, data=False)
    assert round_.take_map(0) == [0]
    round_.put(0, [((0, 1), held("0"))])
    assert round_.take_map(0) == []
    assert round_.ready == [1]


def test_without_data_a_node_that_took_over_slices_runs_them_all() -> None:
    round_ = begun(2, 0, 1, 2, 3, 4, data=False)
    map_all(round_, 0)
    map_all(round_, 1)
    assert round_.tree.spans == [(i, i + 1) for i in range(5)]


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


def test_nothing_is_folded_while_slices_are_pending_or_being_mapped() -> None:
    round_ = begun(1, 0, 1)
    assert round_.take_fold(0, together) == {}
    round_.put(0, [((0, 1), held("0"))])
    round_.ready = []
    round_.mapping[1] = [1]
    assert round_.take_fold(0, together) == {}


def test_nothing_is_folded_while_a_slice_is_on_its_way() -> None:
    round_ = begun(1, 0, 1, 2, missing=["ref2"])
    map_all(round_)
    assert round_.take_fold(0, together) == {}
    assert not round_.has_work
    assert not round_.settled


def test_small_results_are_folded_all_at_once() -> None:
    round_ = begun(1, 0, 1, 2)
    map_all(round_)
    assert list(round_.take_fold(0, together)) == [(0, 1), (1, 2), (2, 3)]


def test_large_results_are_folded_in_pairs_by_several_workers() -> None:
    round_ = begun(2, 0, 1, 2, 3)
    map_all(round_)
    assert list(round_.take_fold(0, one_by_one)) == [(0, 1), (1, 2)]
    assert list(round_.take_fold(1, one_by_one)) == [(2, 3), (3, 4)]
    assert round_.take_fold(0, one_by_one) == {}


def test_what_has_no_sibling_here_is_not_folded() -> None:
    round_ = begun(1, 1, 2, nslices=4)
    map_all(round_)
    assert round_.take_fold(0, together) == {}


def test_what_was_folded_is_given_back_to_be_released() -> None:
    round_ = begun(1, 0, 1)
    map_all(round_)
    used = list(round_.take_fold(0, together).values())
    assert round_.put(0, [((0, 2), held("sum"))]) == used
    assert round_.tree.complete


def test_a_map_releases_nothing() -> None:
    round_ = begun(1, 0)
    round_.take_map(0)
    assert round_.put(0, [((0, 1), held("0"))]) == []


# ---- a lost worker ------------------------------------------------------------------------------------------


def test_a_lost_worker_gives_back_the_slices_that_it_was_mapping() -> None:
    round_ = begun(1, 0, 1, 2, 3)
    block = round_.take_map(0)
    assert round_.lose(0) == block
    assert round_.mapping == {}
    assert not set(block) & set(round_.ready)  # the master sends them again


def test_what_a_lost_worker_folded_can_be_folded_again() -> None:
    round_ = begun(1, 0, 1)
    map_all(round_)
    spans = list(round_.take_fold(0, together))
    assert round_.lose(0) == []
    assert list(round_.take_fold(1, together)) == spans


def test_an_idle_worker_that_is_lost_changes_nothing() -> None:
    round_ = begun(1, 0, 1)
    assert round_.lose(0) == []
    assert round_.ready == [0, 1]


# ---- when it is settled ---------------------------------------------------------------------------------------


def test_a_round_is_settled_when_all_is_mapped_and_folded() -> None:
    round_ = begun(1, 0, 1)
    assert not round_.settled
    map_all(round_)
    assert not round_.settled  # a pair is left
    round_.take_fold(0, together)
    assert not round_.settled  # it is being folded
    round_.put(0, [((0, 2), held("sum"))])
    assert round_.settled


def test_a_round_whose_results_have_no_sibling_here_is_settled() -> None:
    round_ = begun(1, 1, 2, nslices=4)
    map_all(round_)
    assert round_.settled
    assert not round_.tree.complete


def test_a_settled_round_that_is_given_more_is_not_settled() -> None:
    round_ = begun(1, 0, nslices=2)
    map_all(round_)
    round_.job.add({1: "ref1"})
    round_.add([1], ())
    assert not round_.settled
    assert round_.has_work


def test_there_is_work_while_slices_are_pending() -> None:
    round_ = begun(1, 0)
    assert round_.has_work
    round_.take_map(0)
    assert not round_.has_work


def test_the_repr_tells_what_is_left() -> None:
    round_ = begun(1, 0, 1, 2, 3, 4, 5, nslices=8, missing=["ref5"])
    round_.take_map(0)
    assert repr(round_) == ("<NodeRound 1: 3 ready, 1 refs on their way, mapping {0: [0, 1]}, folding [], holds []>")


def concatenated(left: Held, right: Held) -> Held:
    assert left.flat is not None
    assert right.flat is not None
    return Held(memoryview(bytes(left.flat) + bytes(right.flat)), True)


@given(st.integers(1, 24), st.integers(1, 4), st.integers(0, 2**32))
def test_whoever_is_fast_slow_or_lost_each_slice_counts_once(nslices: int, workers: int, seed: int) -> None:
    chance = Random(seed)
    round_ = begun(workers, *range(nslices))
    busy: dict[int, list[tuple[Span, Held]]] = {}
    for _ in range(10_000):
        worker = chance.randrange(workers)
        if worker in busy and chance.random() < 0.1:
            del busy[worker]
            round_.add(round_.lose(worker), ())
        elif worker in busy:
            round_.put(worker, busy.pop(worker))
        elif block := round_.take_map(worker):
            busy[worker] = [((index, index + 1), held(f"{index} ")) for index in block]
        elif fold := round_.take_fold(worker, one_by_one):
            (low, left), (high, right) = fold.items()
            busy[worker] = [((low[0], high[1]), concatenated(left, right))]
        if round_.settled:
            break
    whole = round_.tree.values[0, nslices].flat
    assert whole is not None
    assert bytes(whole).split() == [str(index).encode() for index in range(nslices)]
