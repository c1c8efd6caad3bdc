"""What one node decides, by example: every event of its scheduler. test_rounds.py has the books of a round."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import pytest

from qjam_worker.ipc.slots import SLOT
from qjam_worker.node.commands import Command, Ended, Forget, Give, Interrupt, Tell, refusal
from qjam_worker.node.results import Held
from qjam_worker.node.rounds import FOLD_LATE, MIN_LATE
from qjam_worker.node.scheduler import CHECK, Scheduler
from qjam_worker.values.reduction import Span
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.messages import LATE, MAX_BUFFERS
from qjam_worker.wire.refs import Ref
from refs_as_text import ref, text

T = TypeVar("T")


class Refs:
    """A store without bytes: what is here, whole or in part, and how often it is pinned."""

    def __init__(self) -> None:
        self.here: set[str] = set()
        self.parts: dict[str, int] = {}
        self.pins: Counter[str] = Counter()

    def __contains__(self, ref: Ref) -> bool:
        return text(ref) in self.here

    def have(self, ref: Ref) -> int:
        return self.parts.get(text(ref), 0)

    def pin(self, ref: Ref) -> None:
        self.pins[text(ref)] += 1

    def unpin(self, ref: Ref) -> None:
        self.pins[text(ref)] -= 1
        assert self.pins[text(ref)] >= 0

    @property
    def pinned(self) -> set[str]:
        return {ref for ref, count in self.pins.items() if count}


class Result(Held):
    """A value, and whether it is used up."""

    __slots__ = ("released",)

    def __init__(self, value: Any, plain: bool = True) -> None:
        super().__init__(None, plain, value=value)
        self.released = False

    def release(self) -> None:
        assert not self.released, "released twice"
        self.released = True


def large() -> Held:
    """A result that a node does not fold itself."""
    return Held(memoryview(bytes(SLOT + 1)), True)


def with_ready(workers: int, *, speculation: bool = True) -> Scheduler:
    """A scheduler whose workers wait for work."""
    made = Scheduler(workers, Refs())
    made.on_welcome({"node": "node", "speculation": speculation})
    for worker in range(workers):
        assert made.on_ready(worker, 0.0) == []
    return made


def job_header(number: int = 1, **more: Any) -> dict[str, Any]:
    entry = {"code": more.get("code"), "reduce": more.get("reduce", False), **more.get("entry", {})}
    return {"job": number, "entry": entry, "forget": more.get("forget", [])}


def task(
    to: Scheduler,
    *indices: int,
    number: int = 1,
    job: int = 1,
    params: str = "inline",
    now: float = 0.0,
    **more: Any,
) -> list[Command]:
    """The master sends a job, data of the same number, and a task with these slices of it."""
    to.on_job(job_header(job, **more))
    nslices, data = more.get("nslices", len(indices)), job if more.get("data", True) else None
    if data is not None:
        slices = [[index, f"ref{index}"] for index in indices]
        to.on_data({"data": data, "nslices": nslices, "slices": slices, "forget": []})
    header = {"job": job, "data": data, "round": number, "indices": list(indices), "params": params}
    return to.on_task({**header, "nslices": nslices}, now)


def with_all_here(workers: int, *indices: int, speculation: bool = True, **more: Any) -> Scheduler:
    """Round 1 has begun at 0.0, with everything that it needs."""
    to = with_ready(workers, speculation=speculation)
    refs_of(to).here.update(f"ref{index}" for index in indices)
    task(to, *indices, **more)
    return to


def refs_of(of: Scheduler) -> Refs:
    assert isinstance(of.refs, Refs)
    return of.refs


def done(to: Scheduler, worker: int, now: float = 0.0, *, number: int = 1) -> list[Command]:
    """A worker brings the results of its slices: their indices."""
    roots: list[tuple[Span, Held]] = [((i, i + 1), Result(i)) for i in to.rounds[number].works[worker].slices]
    return to.on_done(worker, roots, now)


def error(to: Scheduler, worker: int, at: int | None, now: float = 0.0) -> list[Command]:
    message = {"op": "error", "slice": at, "text": "Traceback", "summary": "it raised", "pickled": b"pickled"}
    return to.on_error(worker, message, now)


def of(kind: type[T], commands: list[Command]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


def given(commands: list[Command]) -> dict[int, list[int]]:
    """Worker -> the slices that it is given to map."""
    return {give.worker: give.work.slices for give in of(Give, commands) if give.work.fold is None}


def folds(commands: list[Command]) -> dict[int, list[Span]]:
    """Worker -> the results that it is given to fold."""
    return {give.worker: list(give.work.fold) for give in of(Give, commands) if give.work.fold is not None}


def told(commands: list[Command], kind: Kind) -> list[dict[str, Any]]:
    return [tell.header for tell in of(Tell, commands) if tell.kind is kind]


def asked_for(commands: list[Command]) -> list[list[Any]]:
    """The refs that the master is asked for, each with the bytes that are here."""
    assert all(end is None for get in told(commands, Kind.GET) for _, _, end in get["refs"])
    return [[text(ref), here] for get in told(commands, Kind.GET) for ref, here, _ in get["refs"]]


def roots(commands: list[Command]) -> list[tuple[int, int]]:
    """The spans of the roots that are sent."""
    return [(lo, hi) for result in told(commands, Kind.RESULT) for lo, hi, _ in result["roots"]]


# ---- giving out work ------------------------------------------------------------------------------------------


def test_every_idle_worker_is_given_its_part() -> None:
    to = with_ready(2)
    refs_of(to).here.update(f"ref{index}" for index in range(4))
    assert given(task(to, 0, 1, 2, 3)) == {0: [0], 1: [2]}


def test_a_worker_that_is_not_ready_is_given_nothing_before_it_is() -> None:
    to = Scheduler(2, Refs())
    assert to.on_ready(1, 0.0) == []
    refs_of(to).here.update(["ref0", "ref1"])
    assert list(given(task(to, 0, 1))) == [1]
    assert given(to.on_ready(0, 0.0)) == {0: [0]}


def test_who_has_done_its_work_is_given_more() -> None:
    to = with_all_here(1, 0, 1, 2, 3)
    commands = done(to, 0)
    assert len(given(commands)[0]) == 1
    assert to.seats[0].busy


def test_the_oldest_round_comes_first_and_the_next_one_has_who_is_left() -> None:
    to = with_all_here(2, 0)
    assert given(task(to, 0, number=2)) == {1: [0]}
    assert given(task(to, 0, number=3)) == {}
    assert [command.round.number for command in of(Give, done(to, 0))] == [3]


def test_a_job_that_is_told_in_parts_is_one() -> None:
    to = with_all_here(1, 0, nslices=2)
    refs_of(to).here.add("ref1")
    assert given(task(to, 1, nslices=2)) == {}
    assert to.data[1].order == [0, 1]
    assert given(done(to, 0)) == {0: [1]}


def test_without_data_every_worker_has_its_own() -> None:
    assert given(task(with_ready(2), 4, 5, nslices=6, data=False)) == {0: [4], 1: [5]}


def test_without_data_a_free_worker_does_not_do_what_is_anothers() -> None:
    to = with_ready(2)
    task(to, 0, 1, data=False)
    assert given(done(to, 0)) == {}


def test_without_data_a_busy_worker_keeps_nobody_else_from_its_own() -> None:
    to = with_ready(2)
    refs_of(to).here.add("ref0")
    task(to, 0)  # worker 0 is busy with it
    assert given(task(to, 0, 1, number=2, job=2, data=False)) == {1: [1]}


def test_the_workers_forget_what_the_master_has() -> None:
    to = with_all_here(1, 0)
    done(to, 0)
    assert to.on_job(job_header(2, forget=[1, 77])) == [Forget(1)]
    assert list(to.jobs) == [2]


def test_the_repr_tells_who_does_what() -> None:
    to = Scheduler(3, Refs())
    to.on_ready(0, 0.0)
    to.on_ready(1, 0.0)
    refs_of(to).here.add("ref0")
    task(to, 0)
    assert repr(to).startswith("<Scheduler: [<worker 0 busy>, <worker 1 idle>, <worker 2 starting>]; [<NodeRound 1: ")


# ---- what is missing ------------------------------------------------------------------------------------------


def test_what_is_missing_is_asked_for_with_what_is_here_of_it() -> None:
    to = with_ready(1)
    refs_of(to).here.add("ref0")
    refs_of(to).parts["ref1"] = 40
    commands = task(to, 0, 1)
    (get,) = told(commands, Kind.GET)
    assert get == {"round": 1, "refs": [[ref("ref1"), 40, None]]}
    assert given(commands) == {0: [0]}


def test_code_and_params_are_asked_for_first_and_nothing_starts_without_them() -> None:
    to = with_ready(1)
    refs_of(to).here.add("ref0")
    commands = task(to, 0, 1, code="1", params="ref")
    names = [ref for ref, _ in asked_for(commands)]
    assert (sorted(names[:2]), names[2:]) == (["code:1", "params:1"], ["ref1"])
    assert given(commands) == {}
    refs_of(to).here.add("code:1")
    assert to.on_arrived(ref("code:1"), 0.0) == []
    refs_of(to).here.add("params:1")
    assert given(to.on_arrived(ref("params:1"), 0.0)) == {0: [0]}


def test_what_was_asked_for_is_not_asked_for_again_before_it_has_come() -> None:
    to = with_ready(1)
    assert asked_for(task(to, 0)) == [["ref0", 0]]
    assert asked_for(task(to, 0, number=2)) == []
    refs_of(to).here.add("ref0")
    assert given(to.on_arrived(ref("ref0"), 0.0)) == {0: [0]}
    refs_of(to).here.discard("ref0")  # it was dropped for want of room
    assert asked_for(task(to, 0, number=3)) == [["ref0", 0]]


def test_what_arrives_is_worked_at_from_then_on() -> None:
    to = with_ready(1)
    task(to, 0)
    refs_of(to).here.add("ref0")
    assert given(to.on_arrived(ref("ref0"), 3.5)) == {0: [0]}
    assert to.rounds[1].works[0].began == 3.5


def test_what_will_not_come_is_asked_for_again_in_the_name_of_who_still_wants_it() -> None:
    to = with_ready(1)
    task(to, 0, nslices=2)
    task(to, 0, 1, number=2)
    to.on_cancel({"round": 1}, 0.0)
    (get,) = told(to.on_gone(ref("ref0")), Kind.GET)
    assert get == {"round": 2, "refs": [[ref("ref0"), 0, None]]}


def test_what_will_not_come_and_nobody_wants_is_forgotten() -> None:
    to = with_ready(1)
    task(to, 0)
    to.on_cancel({"round": 1}, 0.0)
    assert to.on_gone(ref("ref0")) == []
    assert set(to.wants) == set()


def test_the_end_of_a_round_forgets_what_only_that_one_has_asked_for() -> None:
    to = with_ready(1)
    task(to, 0, 1)
    task(to, 1, number=2, nslices=2)
    to.on_cancel({"round": 1}, 0.0)
    assert set(to.wants) == {ref("ref1")}
    assert asked_for(task(to, 0, number=3, nslices=2)) == [["ref0", 0]]


def test_a_round_keeps_what_it_needs_and_lets_go_of_it_at_its_end() -> None:
    to = with_ready(1)
    refs_of(to).here.update(["code:1", "params:1", "ref0"])
    task(to, 0, code="1", params="ref", nslices=2)
    task(to, 1, code="1", params="ref", nslices=2)
    assert refs_of(to).pins == Counter(["code:1", "params:1", "ref0", "ref1"])
    to.on_cancel({"round": 1}, 0.0)
    assert refs_of(to).pinned == set()


def test_those_who_wait_for_what_there_is_no_room_for_are_named_once() -> None:
    to = with_ready(1)
    task(to, 0, nslices=2)
    task(to, 1, number=2, nslices=2)
    task(to, 0, number=3, nslices=2)
    assert to.wanting(ref("ref0")) == [1, 3]
    assert to.wanting(ref("ref0")) == []


def test_what_two_rounds_need_is_kept_for_the_second() -> None:
    to = with_all_here(1, 0)
    task(to, 0, number=2)
    done(to, 0)
    assert refs_of(to).pinned == {"ref0"}


def test_a_module_that_user_code_wants_is_asked_for_once_in_the_name_of_its_round() -> None:
    to = with_all_here(2, 0, 1)
    (get,) = told(to.on_import(0, ref("module:1:text")), Kind.GET)
    assert get == {"round": 1, "refs": [[ref("module:1:text"), 0, None]]}
    assert to.on_import(1, ref("module:1:text")) == []
    assert to.on_arrived(ref("module:1:text"), 0.0) == []
    assert asked_for(to.on_import(1, ref("module:1:text"))) == [["module:1:text", 0]]


def test_a_module_that_a_thread_wants_whose_round_is_over_is_asked_for_all_the_same() -> None:
    (get,) = told(with_ready(1).on_import(0, ref("module:1:text")), Kind.GET)
    assert get["round"] is None


def test_a_round_without_room_is_given_up() -> None:
    to = with_all_here(2, 0)
    task(to, 0, number=2)
    commands = to.on_no_room(1, "the disk is full", 0.0)
    (report,) = told(commands, Kind.ERROR)
    assert report == {
        "round": 1,
        "what": "room",
        "text": "the disk is full",
        "worker": None,
        "slice": None,
        "summary": "the disk is full",
    }
    assert commands[1:] == [Interrupt(0), Ended(1)]
    assert list(to.rounds) == [2]
    assert to.on_no_room(1, "again", 0.0) == []


def test_a_round_without_room_for_its_params_is_refused() -> None:
    kind, header, buffers = refusal(7, "the disk is full")
    assert (kind, buffers) == (Kind.ERROR, [])
    assert (header["round"], header["what"], header["text"]) == (7, "room", "the disk is full")


# ---- results --------------------------------------------------------------------------------------------------


def test_a_result_is_sent_when_all_is_mapped_and_folded() -> None:
    to = with_all_here(1, 0, 1)
    assert not told(done(to, 0), Kind.RESULT)
    commands = done(to, 0)
    (result,) = told(commands, Kind.RESULT)
    assert result["roots"] == [[0, 2, 1]]
    assert Ended(1) in commands
    assert to.rounds == {}


def test_it_is_told_how_long_a_slice_has_taken_a_worker() -> None:
    to = with_all_here(2, 0, 1)
    done(to, 0, 2.0)
    (result,) = told(done(to, 1, 4.0), Kind.RESULT)
    assert result["seconds"] == 3.0


def test_the_roots_of_a_part_are_sent_and_the_round_stays_for_more() -> None:
    to = with_all_here(1, 1, 2, nslices=4)
    done(to, 0)
    commands = done(to, 0)
    assert roots(commands) == [(1, 2), (2, 3)]
    assert of(Ended, commands) == []
    refs_of(to).here.add("ref3")
    task(to, 3, nslices=4)
    assert roots(done(to, 0)) == [(3, 4)]  # what was sent is not sent again


def test_small_results_are_folded_by_the_node_as_they_come() -> None:
    to = with_all_here(1, 0, 1, 2, 3)  # two at once, then one by one
    done(to, 0)
    assert list(to.rounds[1].tree.values) == [(0, 2)]
    assert to.rounds[1].tree.values[0, 2].value == 1


@pytest.mark.parametrize("result", [large, lambda: Result(1, plain=False)])
def test_results_that_are_large_or_pickled_are_folded_by_a_worker(result: Any) -> None:
    to = with_all_here(1, 0, 1)
    to.on_done(0, [((0, 1), result())], 0.0)
    commands = to.on_done(0, [((1, 2), result())], 0.0)
    assert folds(commands) == {0: [(0, 1), (1, 2)]}
    assert roots(to.on_done(0, [((0, 2), Result(2))], 0.0)) == [(0, 2)]


def test_results_of_a_users_reduce_are_folded_by_a_worker_all_at_once() -> None:
    to = with_all_here(1, 0, 1, 2, reduce=True)
    done(to, 0)
    done(to, 0)
    assert folds(done(to, 0)) == {0: [(0, 1), (1, 2), (2, 3)]}


def test_a_result_of_a_round_that_is_over_is_released_and_its_worker_given_more() -> None:
    to = with_all_here(1, 0)
    to.on_cancel({"round": 1}, 0.0)
    task(to, 0, number=2)
    late = Result(0)
    assert given(to.on_done(0, [((0, 1), late)], 0.0)) == {0: [0]}
    assert late.released


def test_nothing_is_sent_of_a_round_of_which_nothing_is_here() -> None:
    to = with_all_here(1, 0, nslices=2)
    assert to.on_cancel({"round": 1, "indices": [0]}, 0.0) == [Interrupt(0)]
    assert to.rounds[1].settled


# ---- exceptions -----------------------------------------------------------------------------------------------


def test_an_exception_is_told() -> None:
    to = with_all_here(1, 0, 1)
    commands = error(to, 0, 0)
    (tell,) = of(Tell, commands)
    assert tell == Tell(
        Kind.ERROR,
        {"round": 1, "what": "task", "text": "Traceback", "worker": 0, "slice": 0, "summary": "it raised"},
        [b"pickled"],
    )


@pytest.mark.parametrize("speculation", [True, False])
def test_a_slice_that_has_raised_is_not_tried_again(speculation: bool) -> None:
    # The master ends the round when it hears of it; until then what must not be done twice is not done twice.
    to = with_all_here(1, 0, 1, speculation=speculation)
    assert 0 not in [index for slices in given(error(to, 0, 0)).values() for index in slices]
    for _ in range(3):
        assert 0 not in [index for slices in given(to.on_ready(0, 1.0)).values() for index in slices]


def test_an_exception_without_data_is_told_and_not_tried_again() -> None:
    to = with_ready(1)
    task(to, 0, data=False)
    commands = error(to, 0, 0)
    assert told(commands, Kind.ERROR)
    assert given(commands) == {}


def test_an_exception_in_a_fold_is_told_and_it_is_not_folded_again() -> None:
    to = with_all_here(2, 0, 1, reduce=True)
    done(to, 1)
    assert list(folds(done(to, 0))) == [0]
    commands = error(to, 0, None)
    (report,) = told(commands, Kind.ERROR)
    assert (report["slice"], report["worker"]) == (None, 0)
    assert folds(commands) == {}
    parts = to.rounds[1].held
    to.on_cancel({"round": 1}, 0.0)
    assert all(isinstance(part, Result) and part.released for part in parts)


def test_an_exception_before_the_first_slice_is_told_and_its_slices_are_not_tried_again() -> None:
    to = with_all_here(1, 0, 1, 2, 3)  # it is at 0 and 1
    commands = error(to, 0, None)
    assert told(commands, Kind.ERROR)
    assert not {0, 1} & {index for slices in given(commands).values() for index in slices}


def test_when_the_slice_that_has_raised_turns_out_to_be_done_elsewhere_the_rest_goes_on() -> None:
    to = with_all_here(1, 0, 1, 2, 3)
    error(to, 0, 0)
    to.on_cancel({"round": 1, "indices": [0]}, 0.0)
    sent: list[tuple[int, int]] = []
    while to.rounds[1].works:
        sent += roots(done(to, 0))
    assert sent == [(1, 2), (2, 4)]


def test_an_exception_in_a_round_that_is_over_is_ignored() -> None:
    to = with_all_here(1, 0)
    to.on_cancel({"round": 1}, 0.0)
    assert error(to, 0, 0) == []
    assert not to.seats[0].busy


# ---- workers that stop or end -----------------------------------------------------------------------------------


def test_a_worker_that_was_interrupted_from_outside_has_its_slices_mapped_all_the_same() -> None:
    to = with_all_here(1, 0, 1)
    assert given(to.on_cancelled(0, 0.0)) == {0: [0]}
    done(to, 0)
    assert roots(done(to, 0)) == [(0, 2)]


def test_the_slices_of_a_worker_that_ends_are_told_and_not_mapped_here() -> None:
    to = with_all_here(1, *range(8))
    commands = to.on_exit(0, "was killed", 1, 77, 0.0)
    (state,) = told(commands, Kind.STATE)
    assert state == {
        "state": "lost",
        "worker": 0,
        "how": "was killed",
        "pid": 77,
        "round": 1,
        "slice": 1,
        "slices": [0, 1, 2, 3],
    }
    assert given(commands) == {}  # it is not there yet
    assert set(given(to.on_ready(0, 0.0))[0]) <= {4, 5, 6, 7}
    assert to.rounds[1].owed == {4, 5, 6, 7}


def test_an_idle_worker_that_ends_concerns_no_round() -> None:
    (state,) = told(with_ready(1).on_exit(0, "was killed", None, 77, 0.0), Kind.STATE)
    assert state == {"state": "lost", "worker": 0, "how": "was killed", "pid": 77}


def test_when_the_rest_is_here_the_end_of_a_worker_sends_it() -> None:
    to = with_all_here(2, 0, 1)
    assert not told(done(to, 1), Kind.RESULT)
    commands = to.on_exit(0, "was killed", 0, 77, 0.0)
    assert [tell.kind for tell in of(Tell, commands)] == [Kind.STATE, Kind.RESULT]
    assert roots(commands) == [(1, 2)]


def test_what_a_worker_that_ends_was_folding_is_folded_by_another() -> None:
    to = with_all_here(2, 0, 1, reduce=True)
    done(to, 1)
    assert folds(done(to, 0)) == {0: [(0, 1), (1, 2)]}
    commands = to.on_exit(0, "was killed", 0, 77, 0.0)
    (state,) = told(commands, Kind.STATE)
    assert (state["slices"], state["slice"]) == ([], 0)
    assert folds(commands) == {1: [(0, 1), (1, 2)]}


def test_a_worker_that_ends_in_a_round_that_is_over_is_given_nothing_before_it_is_ready() -> None:
    to = with_all_here(1, 0)
    to.on_cancel({"round": 1}, 0.0)
    task(to, 0, number=2)
    commands = to.on_exit(0, "was killed", 0, 77, 0.0)
    assert "round" not in told(commands, Kind.STATE)[0]
    assert given(commands) == {}
    assert given(to.on_ready(0, 0.0)) == {0: [0]}


def test_work_that_could_not_be_given_ends_the_round_here() -> None:
    to = with_all_here(2, 0, 1)
    commands = to.on_failed(0, "room", "the disk is full", 0.0)
    (report,) = told(commands, Kind.ERROR)
    assert (report["what"], report["round"], report["worker"]) == ("room", 1, None)
    assert Ended(1) in commands
    assert Interrupt(1) in commands
    assert not to.seats[0].busy


def test_work_that_could_not_be_given_of_a_round_that_is_over_is_ignored() -> None:
    to = with_all_here(1, 0)
    to.on_cancel({"round": 1}, 0.0)
    assert to.on_failed(0, "room", "the disk is full", 0.0) == []


# ---- the master cancels -----------------------------------------------------------------------------------------


def test_a_cancelled_round_is_stopped_and_the_next_one_waits_for_its_workers() -> None:
    to = with_all_here(2, 0, 1)
    task(to, 0, 1, number=2)
    commands = to.on_cancel({"round": 1}, 0.0)
    assert commands == [Interrupt(0), Interrupt(1), Ended(1)]
    assert given(to.on_cancelled(1, 0.0)) == {1: [1]}


def test_a_cancelled_round_releases_what_it_held() -> None:
    to = with_all_here(1, 0, 1, 2, nslices=3, reduce=True)
    done(to, 0)
    result = to.rounds[1].tree.values[0, 1]
    assert isinstance(result, Result)
    to.on_cancel({"round": 1}, 0.0)
    assert result.released


def test_a_round_that_is_not_here_cannot_be_cancelled() -> None:
    to = with_ready(1)
    assert to.on_cancel({"round": 9}, 0.0) == []
    assert to.on_cancel({"round": 9, "indices": [0]}, 0.0) == []


def test_slices_that_are_done_elsewhere_are_stopped_and_the_rest_goes_on() -> None:
    to = with_all_here(2, 0, 1, 2, 3)  # worker 0 is at 0, worker 1 at 2
    assert to.on_cancel({"round": 1, "indices": [1, 2]}, 0.0) == [Interrupt(1)]
    assert given(to.on_cancelled(1, 0.0)) == {1: [3]}
    done(to, 0)
    assert roots(done(to, 1)) == [(0, 1), (3, 4)]


def test_when_the_rest_is_done_elsewhere_what_is_here_is_sent() -> None:
    to = with_all_here(2, 0, 1, 2, 3, nslices=8)
    done(to, 0)
    done(to, 0)
    commands = to.on_cancel({"round": 1, "indices": [2, 3]}, 0.0)
    assert commands[0] == Interrupt(1)
    assert roots(commands) == [(0, 2)]


def test_a_worker_that_was_stopped_at_some_slices_may_answer_all_the_same() -> None:
    to = with_all_here(1, 0, 1)
    to.on_cancel({"round": 1, "indices": [0]}, 0.0)
    late = Result(0)
    assert given(to.on_done(0, [((0, 1), late)], 0.0)) == {0: [1]}
    assert late.released


def test_the_error_of_a_slice_that_is_done_elsewhere_is_ignored() -> None:
    to = with_all_here(1, *range(8))  # worker 0 is at 0 to 3
    to.on_cancel({"round": 1, "indices": [1]}, 0.0)
    commands = error(to, 0, 1)
    assert told(commands, Kind.ERROR) == []
    assert given(commands)[0][0] == 0  # what else it had is mapped after all
    assert to.rounds[1].owed == {0, 2, 3, 4, 5, 6, 7}


# ---- sharing with another node -----------------------------------------------------------------------------------


def share(to: Scheduler, count: int, seconds: float = 0.0, now: float = 0.0, number: int = 1) -> list[Command]:
    return to.on_share({"round": number, "count": count, "seconds": seconds, "for": "idle"}, now)


def test_what_nobody_has_begun_is_shared_and_done_here_in_the_end() -> None:
    to = with_all_here(1, 0, 1, 2, 3, 4)  # it is at 0 and 1
    (state,) = told(share(to, 2), Kind.STATE)
    assert state == {"state": "shared", "round": 1, "for": "idle", "indices": [4, 3]}
    order = [given(done(to, 0))[0] for _ in range(3)]
    assert order[0] == [2]
    assert sorted(order[1:]) == [[3], [4]]


def test_what_is_shared_and_done_over_there_is_not_done_here() -> None:
    to = with_all_here(1, 0, 1, 2, 3, 4)
    share(to, 2)
    to.on_cancel({"round": 1, "indices": [3, 4]}, 0.0)
    assert given(done(to, 0)) == {0: [2]}
    assert roots(done(to, 0)) == [(0, 2), (2, 3)]


def test_what_workers_are_late_with_is_shared_by_what_is_usual_over_there() -> None:
    to = with_all_here(1, 0)
    assert told(share(to, 1, 1.0, 1.0), Kind.STATE)[0]["indices"] == []
    assert told(share(to, 1, 1.0, 2.0), Kind.STATE)[0]["indices"] == [0]


def test_without_second_attempts_what_is_shared_is_given_away() -> None:
    to = with_all_here(1, 0, 1, 2, 3, 4, speculation=False)
    assert told(share(to, 9, 0.001, 1000.0), Kind.STATE)[0]["indices"] == [4, 3, 2]
    assert roots(done(to, 0)) == [(0, 2)]


def test_when_the_last_is_given_away_what_is_here_is_sent_after_that_is_told() -> None:
    to = with_ready(1, speculation=False)
    refs_of(to).here.add("ref0")
    task(to, 0, 1)
    done(to, 0)  # slice 1 has not come yet
    commands = share(to, 1)
    assert [tell.kind for tell in of(Tell, commands)] == [Kind.STATE, Kind.RESULT]
    assert roots(commands) == [(0, 1)]


def test_what_was_shared_and_is_given_again_is_done_here_as_any_other() -> None:
    to = with_all_here(2, 0, 1, 2, 3, 4, 5)  # at 0 and 3
    share(to, 9)
    assert to.rounds[1].ready == []
    assert given(task(to, 4, 5, nslices=6)) == {}  # nobody else tries them any more
    assert to.rounds[1].ready == [4, 5]
    assert sorted(index for worker in (0, 1) for index in given(done(to, worker)).get(worker, ())) == [4, 5]


def test_a_late_slice_that_was_shared_and_is_given_again_may_be_tried_twice_here() -> None:
    to = one_late()
    share(to, 1, 1.0, LATE)
    assert wait(to, 10.0)[1] == []
    task(to, 0, nslices=2, now=10.0)
    wait(to, 20.0)
    assert to.rounds[1].works[1].slices == [0]


def test_nothing_is_shared_of_a_round_that_is_not_here() -> None:
    (state,) = told(share(with_ready(1), 3, number=9), Kind.STATE)
    assert (state["round"], state["indices"]) == (9, [])


# ---- second attempts ------------------------------------------------------------------------------------------


def one_late(workers: int = 2, *, speculation: bool = True, **more: Any) -> Scheduler:
    """Each worker had one slice; all have taken 1 s, but worker 0, which is at slice 0 since 0.0."""
    to = with_all_here(workers, *range(workers), speculation=speculation, **more)
    for worker in range(1, workers):
        done(to, worker, 1.0)
    return to


def wait(to: Scheduler, until: float) -> tuple[float, list[Command]]:
    """Let time pass until something is decided: when that was, and what; nothing, where it comes to `until`."""
    while (due := to.next_deadline()) is not None and due <= until:
        if commands := to.on_timer(due):
            return due, commands
    return until, []


def test_nothing_is_due_where_nothing_runs_or_all_are_busy() -> None:
    assert with_ready(2).next_deadline() is None
    to = with_all_here(2, 0, 1)
    assert wait(to, 1000.0) == (1000.0, [])
    assert to.next_deadline() is None


def test_an_idle_worker_tries_what_another_one_is_late_with() -> None:
    to = one_late()
    now, commands = wait(to, 1000.0)
    assert now == LATE * 1.0
    assert given(commands) == {1: [0]}
    assert to.rounds[1].works[1].began == now


def test_an_idle_worker_looks_again_after_a_while_where_nobody_will_be_late_soon() -> None:
    to = with_all_here(2, 0, 1)
    wait(to, 10.0)
    done(to, 1, 10.0)
    assert to.next_deadline() == 10.0 + CHECK
    assert to.on_timer(10.0 + CHECK) == []
    assert to.next_deadline() == 10.0 + 2 * CHECK


def test_the_first_answer_counts_and_the_other_attempt_is_stopped() -> None:
    for first, second in ((0, 1), (1, 0)):
        to = one_late()
        to.on_timer(LATE)
        commands = done(to, first, 3.0)
        assert commands[0] == Interrupt(second)
        assert roots(commands) == [(0, 2)]
        assert to.on_cancelled(second, 3.1) == []


def late_answer(to: Scheduler) -> tuple[int, Scheduler]:
    """Worker 1 has been first with slice 0 of round 1, in which something is left; worker 0 is at it still."""
    to.on_timer(LATE)
    commands = to.on_done(1, [((0, 1), Result(0))], 3.0)
    assert Interrupt(0) in commands
    return 0, to


def with_more() -> Scheduler:
    """As one_late, but for a slice that has not come, so that the round is not over."""
    to = with_ready(2)
    refs_of(to).here.update(["ref0", "ref1"])
    task(to, 0, 1, 2)
    done(to, 1, 1.0)
    return to


def test_a_late_result_of_an_attempt_that_lost_is_released() -> None:
    worker, to = late_answer(with_more())
    result = Result(0)
    assert to.on_done(worker, [((0, 1), result)], 4.0) == []
    assert result.released
    assert not to.seats[worker].busy


def test_a_late_error_of_an_attempt_that_lost_is_ignored() -> None:
    worker, to = late_answer(with_more())
    assert error(to, worker, 0, 4.0) == []


def test_the_end_of_a_worker_whose_attempt_has_lost_concerns_no_round() -> None:
    worker, to = late_answer(with_more())
    (state,) = told(to.on_exit(worker, "was killed", 0, 77, 4.0), Kind.STATE)
    assert "round" not in state


def test_an_answer_that_cannot_be_used_of_an_attempt_that_lost_is_ignored() -> None:
    worker, to = late_answer(with_more())
    assert to.on_failed(worker, "node", "the node cannot use it", 4.0) == []
    assert list(to.rounds) == [1]


def test_an_attempt_that_lost_is_stopped_once() -> None:
    _, to = late_answer(with_more())
    assert to.on_cancel({"round": 1}, 4.0) == [Ended(1)]


def test_the_worker_of_an_attempt_that_lost_is_given_more_when_it_has_answered() -> None:
    worker, to = late_answer(with_more())
    refs_of(to).here.add("ref2")
    assert given(to.on_arrived(ref("ref2"), 4.0)) == {1: [2]}
    refs_of(to).here.add("ref3")
    task(to, 3, number=2, job=2, nslices=4)
    assert given(to.on_cancelled(worker, 5.0)) == {0: [3]}


@pytest.mark.parametrize("first", [0, 1])
def test_an_error_counts_as_long_as_there_is_no_other_answer(first: int) -> None:
    to = one_late()
    to.on_timer(LATE)
    (report,) = told(error(to, first, 0, 3.0), Kind.ERROR)
    assert (report["worker"], report["slice"]) == (first, 0)


def test_the_end_of_one_of_two_attempts_leaves_the_slice_to_the_other() -> None:
    to = one_late()
    to.on_timer(LATE)
    (state,) = told(to.on_exit(0, "was killed", 0, 77, 3.0), Kind.STATE)
    assert (state["slice"], state["slices"]) == (0, [])
    assert roots(done(to, 1, 4.0)) == [(0, 2)]


def test_without_second_attempts_everyone_does_its_own() -> None:
    to = one_late(speculation=False)
    assert to.next_deadline() is None
    assert to.on_timer(1000.0) == []


def test_a_fast_slice_is_not_late_at_once() -> None:
    to = with_all_here(2, 0, 1)
    done(to, 1, 1e-6)
    assert to.next_deadline() == MIN_LATE


def test_several_idle_workers_try_several_slices() -> None:
    to = with_all_here(4, 0, 1, 2, 3)
    for worker in (2, 3):
        done(to, worker, 1.0)
    commands = to.on_timer(LATE)
    assert sorted(given(commands).values()) == [[0], [1]]
    assert set(given(commands)) == {2, 3}


def test_an_idle_worker_tries_the_last_slice_of_a_block() -> None:
    to = with_all_here(2, *range(8))  # worker 0 is at 0 and 1
    while to.rounds[1].works.get(1):
        done(to, 1, 0.1)
    assert given(to.on_timer(1000.0)) == {1: [1]}


def test_new_work_comes_before_second_attempts() -> None:
    to = one_late()
    refs_of(to).here.add("ref5")
    assert given(task(to, 5, number=2, job=2, nslices=6, now=1.5)) == {1: [5]}
    assert to.on_timer(LATE) == []
    assert given(done(to, 1, 2.5, number=2)) == {1: [0]}


def test_a_round_that_lacks_its_params_needs_no_second_attempt_and_others_get_theirs() -> None:
    to = with_ready(2)
    refs_of(to).here.update(["ref0", "ref1"])
    task(to, 0, 1, params="ref")
    task(to, 0, 1, number=2)
    done(to, 1, 1.0, number=2)
    assert [give.round.number for give in of(Give, to.on_timer(LATE))] == [2]


def test_when_its_round_is_over_a_check_is_not_due() -> None:
    to = one_late()
    assert to.next_deadline() is not None
    to.on_cancel({"round": 1}, 1.5)
    assert to.next_deadline() is None


def test_the_check_of_another_round_is_due_when_the_first_is_over() -> None:
    to = with_ready(3)
    refs_of(to).here.update(["ref0", "ref1"])
    task(to, 0, nslices=2)
    task(to, 0, 1, number=2)
    done(to, 2, 1.0, number=2)
    wait(to, 1.4)
    to.on_cancel({"round": 1}, 1.5)
    now, commands = wait(to, 1000.0)
    assert (now, given(commands)) == (LATE, {2: [0]})


def test_a_fold_that_takes_long_is_tried_by_another_and_the_first_sum_counts() -> None:
    for first, second in ((0, 1), (1, 0)):
        to = with_all_here(2, 0, 1, reduce=True)
        done(to, 1)
        assert folds(done(to, 0)) == {0: [(0, 1), (1, 2)]}
        now, commands = wait(to, 1000.0)
        assert now == FOLD_LATE
        assert folds(commands) == {1: [(0, 1), (1, 2)]}
        parts = to.rounds[1].held
        commands = to.on_done(first, [((0, 2), Result(1))], 11.0)
        assert commands[0] == Interrupt(second)
        assert roots(commands) == [(0, 2)]
        assert all(isinstance(part, Result) and part.released for part in parts)
        late = Result(1)
        assert to.on_done(second, [((0, 2), late)], 12.0) == []
        assert late.released


def test_a_late_error_of_a_fold_that_lost_is_ignored() -> None:
    to = with_all_here(2, 0, 1, nslices=4, reduce=True)  # so that the round goes on
    done(to, 1)
    done(to, 0)
    assert folds(wait(to, 1000.0)[1])
    to.on_done(1, [((0, 2), Result(1))], 11.0)
    assert list(to.rounds) == [1]
    assert error(to, 0, None, 12.0) == []


@pytest.mark.parametrize("cancel", [{"round": 1}, {"round": 1, "indices": [0]}])
def test_both_attempts_are_stopped_when_the_slice_is_of_no_use(cancel: dict[str, Any]) -> None:
    to = one_late()
    to.on_timer(LATE)
    assert of(Interrupt, to.on_cancel(cancel, 3.0)) == [Interrupt(0), Interrupt(1)]


# Jobs that collect


def test_what_a_job_collects_is_folded_by_nobody():
    to = with_all_here(2, 0, 1, entry={"collect": True})
    assert not told(done(to, 0), Kind.RESULT)
    commands = done(to, 1)
    assert roots(commands) == [(0, 1), (1, 2)]
    assert not of(Give, commands)


def test_more_buffers_than_a_message_may_have_go_in_several():
    class Many(Result):
        __slots__ = ()

        def frames(self) -> list[Any]:
            return [b""] * (MAX_BUFFERS // 2)

    to = with_all_here(3, 0, 1, 2, entry={"collect": True})
    for worker in (0, 1):
        to.on_done(worker, [((worker, worker + 1), Many(worker))], 0.0)
    commands = to.on_done(2, [((2, 3), Many(2))], 0.0)
    assert [len(result["roots"]) for result in told(commands, Kind.RESULT)] == [2, 1]
    assert [len(tell.buffers) for tell in of(Tell, commands)] == [MAX_BUFFERS, MAX_BUFFERS // 2]


def test_of_slices_that_may_be_uneven_a_worker_takes_few_at_a_time():
    to = with_all_here(1, *range(64), entry={"collect": True, "each": 1})
    work = to.rounds[1].works
    assert work[0].slices == [0]
    done(to, 0, 0.001)
    assert work[0].slices == [1, 2, 3, 4, 5]  # a millisecond each
    done(to, 0, 1.0)
    assert work[0].slices == [6]
