"""Dispatch by example: every event, every rule of its docstring. tests/simulation runs it in whole clusters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from qjam.data.leases import Lease
from qjam.dispatch import line
from qjam.dispatch.commands import Block, Command, Done, Fail, Failure, Gone, Load, Lost, Note, Send, Unload
from qjam.dispatch.dispatcher import POISON, Dispatch
from qjam.dispatch.jobs import JobSpec
from qjam.dispatch.liveness import LOST_AFTER, PING_AFTER, SUSPECT_AFTER, SWEEP
from qjam.dispatch.nodes import NodeRecord
from qjam.dispatch.rounds import RoundSpec
from qjam.dispatch.states import DONE, FAILED, NODE_TRANSITIONS, QUEUED, SENT, SLICE_TRANSITIONS, NodeState
from qjam.dispatch.stealing import MIN_SEARCH_DELAY
from qjam_worker.values.codec import Encoded
from qjam_worker.values.reduction import Span
from qjam_worker.wire import transfers
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import Part, Ref
from qjam_worker.wire.transfers import BLOCK_BYTES
from refs_as_text import ref, refs

MIB = 1024 * 1024
CANCELLED = Failure("cancelled", "cancelled")


def cluster(*workers: int, credit: int = 16 * MIB, speculation: bool = True) -> Dispatch:
    """Nodes "a", "b", ... with so many workers, all ready."""
    made = Dispatch(speculation=speculation)
    for name, count in zip("abcdefgh", workers):
        join(made, name, count, credit)
    return made


def join(to: Dispatch, name: str, workers: int = 1, credit: int = 16 * MIB) -> list[Command]:
    """A node comes; gives what follows from its being ready."""
    to.add_node(name, f"host-{name}", workers)
    to.on_hello(name, {"workers": workers, "credit": credit})
    return to.on_ready(name, list(range(100, 100 + workers)))


def calm(to: Dispatch) -> Dispatch:
    """Nobody looks for work any more, so that nothing is due but what a test brings about."""
    to.on_timer(MIN_SEARCH_DELAY)
    return to


def spec(nslices: int, key: str = "job", *, data: bool = True, code: str | None = None) -> RoundSpec:
    """A job of its own, and data of its own that the program holds."""
    lease = Lease(tuple(f"{key}-{index}" for index in range(nslices)), 0) if data else None
    return RoundSpec(JobSpec(key, {"reduce": False, "code": code}), nslices, lease)


def submit(
    to: Dispatch,
    number: int,
    what: RoundSpec,
    *,
    deadline: float | None = None,
    now: float = 0.0,
) -> list[Command]:
    return to.on_submit(number, what, deadline, now)


def lose(to: Dispatch, name: str, why: str, successor: str | None = None) -> list[Command]:
    """A node is lost, and its host gets a successor or not; gives what else follows."""
    lost = Lost(name, why)
    commands = to.on_node_lost(name, why)
    if lost in commands:
        commands.remove(lost)
        if successor is not None:
            to.add_successor(name, successor)
        commands += to.reassign()
    return commands


def result(to: Dispatch, name: str, number: int, *spans: tuple[int, int], seconds: float = 0.0) -> list[Command]:
    """Roots of one frame each, which says what it is."""
    header = {"round": number, "roots": [[lo, hi, 1] for lo, hi in spans], "seconds": seconds}
    return to.on_result(name, header, [f"{lo}-{hi}" for lo, hi in spans])


def root(lo: int, hi: int) -> tuple[Span, Encoded]:
    """A root of `result`, as it comes out again."""
    return (lo, hi), Encoded(f"{lo}-{hi}", [], False)


def worker_lost(to: Dispatch, name: str, number: int, slices: Sequence[int], at: int | None = None) -> list[Command]:
    header = {"state": "lost", "worker": 0, "how": "was killed", "pid": 7}
    return to.on_worker_lost(name, {**header, "round": number, "slice": at, "slices": list(slices)})


def load_failed(to: Dispatch, name: str, ref: Ref, number: int) -> list[Command]:
    """A Load to `name`, given in the name of round `number`, has failed."""
    return to.refs.on_load_failed(name, ref, Failure("load", f"{ref} of {name}: it raised"))


def sends(commands: list[Command], kind: Kind) -> list[Send]:
    return [command for command in commands if isinstance(command, Send) and command.kind is kind]


def shares(commands: list[Command]) -> dict[str, list[int]]:
    """Node -> the slices of its TASKs."""
    return {send.node: send.header["indices"] for send in sends(commands, Kind.TASK)}


def ends(commands: list[Command]) -> list[Done | Fail]:
    return [command for command in commands if isinstance(command, (Done, Fail))]


def failure(commands: list[Command]) -> Failure:
    (end,) = ends(commands)
    assert isinstance(end, Fail)
    return end.failure


# ---- the tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "event"), NODE_TRANSITIONS)
def test_a_node_moves_as_its_table_says(state: NodeState, event: str) -> None:
    node = NodeRecord("a", "host-a", 1, state)
    node.move(event)
    assert node.state is NODE_TRANSITIONS[state, event]


@pytest.mark.parametrize(
    ("state", "event"),
    [
        pair
        for pair in itertools.product(NodeState, ["hello", "ready", "silent", "heard", "lost", "close"])
        if pair not in NODE_TRANSITIONS
    ],
)
def test_a_node_makes_no_other_move(state: NodeState, event: str) -> None:
    with pytest.raises(KeyError):
        NodeRecord("a", "host-a", 1, state).move(event)


def test_a_node_that_is_closed_stays_closed() -> None:
    assert {after for (state, _), after in NODE_TRANSITIONS.items() if state is NodeState.CLOSED} == {NodeState.CLOSED}


def test_a_node_that_is_lost_only_closes() -> None:
    after = {after for (state, _), after in NODE_TRANSITIONS.items() if state is NodeState.LOST}
    assert after <= {NodeState.LOST, NodeState.CLOSED}


def test_a_slice_that_is_done_stays_done() -> None:
    assert {after for (state, _), after in SLICE_TRANSITIONS.items() if state is DONE} == {DONE}


def test_a_slice_that_has_failed_makes_no_move() -> None:
    assert not [pair for pair in SLICE_TRANSITIONS if pair[0] == FAILED]


def test_a_slice_is_done_by_a_result_alone() -> None:
    events = {event for (state, event), after in SLICE_TRANSITIONS.items() if after is DONE and state is not DONE}
    assert events == {"result"}


def test_a_slice_is_sent_only_when_it_is_queued() -> None:
    assert [state for (state, event) in SLICE_TRANSITIONS if event == "send"] == [QUEUED]
    assert SLICE_TRANSITIONS[QUEUED, "send"] is SENT


# ---- nodes ------------------------------------------------------------------------------------------------


def test_a_hello_is_welcomed() -> None:
    to = Dispatch()
    to.add_node("a", "host-a", 1)
    assert to.on_hello("a", {"workers": 1, "credit": 5}) == [
        Send("a", Kind.WELCOME, {"node": "a", "host": "host-a", "speculation": True})
    ]
    assert to.nodes["a"].credit == 5


def test_a_node_is_told_that_nothing_may_be_tried_twice() -> None:
    to = Dispatch(speculation=False)
    to.add_node("a", "host-a", 1)
    (welcome,) = to.on_hello("a", {"workers": 1, "credit": 5})
    assert isinstance(welcome, Send)
    assert welcome.header["speculation"] is False


def test_a_node_is_given_no_work_before_it_is_ready() -> None:
    to = Dispatch()
    to.add_node("a", "host-a", 1)
    assert submit(to, 1, spec(2)) == []
    assert not sends(to.on_hello("a", {"workers": 1, "credit": 1}), Kind.TASK)
    assert shares(to.on_ready("a", [100])) == {"a": [0, 1]}


def test_the_workers_of_ready_nodes_alone_are_the_capacity() -> None:
    to = cluster(2, 3)
    to.add_node("late", "host-late", 8)
    assert to.capacity == 5
    lose(to, "a", "gone")
    assert to.capacity == 3
    assert [name for name, node in to.nodes.items() if node.state is NodeState.READY] == ["b"]


def test_a_replaced_worker_has_another_pid() -> None:
    to = cluster(2)
    to.on_worker_replaced("a", 1, 999)
    assert to.nodes["a"].pids == [100, 999]


def test_the_repr_tells_the_states() -> None:
    to = cluster(1, 1)
    lose(to, "b", "gone")
    submit(to, 1, spec(1))
    assert repr(to) == "<Dispatch: a ready, b lost; 1 rounds and 0 that wait>"


def test_a_node_is_lost_once() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    assert shares(lose(to, "a", "first")) == {"b": [0]}
    assert lose(to, "a", "second") == []
    assert to.nodes["a"].why == "first"


def test_close_says_goodbye_to_all_but_the_lost() -> None:
    to = cluster(1, 1)
    to.add_node("late", "host-late", 1)
    lose(to, "a", "gone")
    assert [send.node for send in sends(to.on_close(), Kind.BYE)] == ["b", "late"]


def test_a_closed_node_is_not_lost_when_it_leaves() -> None:
    to = cluster(1)
    to.on_close()
    assert lose(to, "a", "the master is closed") == []
    assert to.nodes["a"].state is NodeState.CLOSED


# ---- a round ----------------------------------------------------------------------------------------------


def test_a_first_round_sends_the_job_the_data_and_the_task() -> None:
    job, data, task = submit(cluster(2), 1, spec(2))
    assert job == Send("a", Kind.JOB, {"job": 1, "entry": {"reduce": False, "code": None}, "forget": []})
    slices = [[0, "job-0"], [1, "job-1"]]
    assert data == Send("a", Kind.DATA, {"data": 1, "nslices": 2, "slices": slices, "forget": []})
    assert task == Send("a", Kind.TASK, {"job": 1, "data": 1, "round": 1, "indices": [0, 1], "params": "send"})


def test_a_second_round_of_a_job_sends_the_task_alone() -> None:
    to = cluster(2)
    submit(to, 1, spec(2))
    result(to, "a", 1, (0, 2))
    (task,) = submit(to, 2, spec(2))
    assert isinstance(task, Send)
    assert task.kind is Kind.TASK
    assert task.header["job"] == 1


def test_another_key_is_another_job() -> None:
    to = cluster(2)
    submit(to, 1, spec(2, "one"))
    (job,) = sends(submit(to, 2, spec(2, "two")), Kind.JOB)
    assert job.header["job"] == 2


def test_without_data_there_is_a_job_and_a_task_that_says_how_often_it_runs() -> None:
    job, task = submit(cluster(2), 1, spec(2, data=False))
    assert isinstance(job, Send)
    assert job.kind is Kind.JOB
    header = {"job": 1, "data": None, "nslices": 2, "round": 1, "indices": [0, 1], "params": "send"}
    assert task == Send("a", Kind.TASK, header)


def test_another_job_over_the_same_data_finds_it_where_it_is() -> None:
    to, held = cluster(1, 1), spec(4)
    first = shares(submit(to, 1, held))
    result(to, "a", 1, (0, 2))
    result(to, "b", 1, (2, 4))
    commands = submit(to, 2, RoundSpec(JobSpec("other", {"reduce": False, "code": None}), 4, held.lease))
    assert [send.header["job"] for send in sends(commands, Kind.JOB)] == [2, 2]
    assert sends(commands, Kind.DATA) == []
    assert shares(commands) == first


def test_neighbouring_slices_go_together_by_the_number_of_workers() -> None:
    assert shares(submit(cluster(1, 3), 1, spec(8))) == {"a": [0, 1], "b": [2, 3, 4, 5, 6, 7]}


def test_without_data_each_worker_has_one_slice() -> None:
    assert shares(submit(cluster(1, 2), 1, spec(3, data=False))) == {"a": [0], "b": [1, 2]}


def test_a_node_that_comes_takes_its_share_of_the_next_round_and_the_others_keep_the_rest() -> None:
    to = cluster(1)
    submit(to, 1, spec(4))
    assert shares(join(to, "b")) == {}
    result(to, "a", 1, (0, 4))
    commands = submit(to, 2, spec(4))
    assert shares(commands) == {"a": [0, 1], "b": [2, 3]}
    (data,) = sends(commands, Kind.DATA)  # a knows of it
    assert (data.node, data.header["slices"]) == ("b", [[2, "job-2"], [3, "job-3"]])


def test_slices_stay_where_they_are_from_round_to_round() -> None:
    to = cluster(1, 2)
    placed = shares(submit(to, 1, spec(9)))
    for number in range(2, 5):
        assert shares(submit(to, number, spec(9))) == placed


def test_the_round_is_done_when_the_root_is_there() -> None:
    to = cluster(1)
    submit(to, 1, spec(3))
    assert result(to, "a", 1, (0, 3)) == [Done(1, [root(0, 3)])]
    assert to.rounds == {}


def test_roots_of_several_nodes_come_in_the_order_of_slices() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(4))
    assert result(to, "b", 1, (2, 4)) == []
    done, *_ = result(to, "a", 1, (0, 2))
    assert done == Done(1, [root(0, 2), root(2, 4)])


def test_each_root_gets_its_own_frames() -> None:
    to = cluster(1)
    submit(to, 1, spec(2))
    header = {"round": 1, "roots": [[0, 1, 2], [1, 2, 1]], "seconds": 0.0}
    done, *_ = to.on_result("a", header, [b"header", b"array", b"alone"])
    assert done == Done(1, [((0, 1), Encoded(b"header", [b"array"], False)), ((1, 2), Encoded(b"alone", [], False))])


def test_a_node_with_the_whole_result_is_not_told_to_stop() -> None:
    to = cluster(2)
    submit(to, 1, spec(2))
    assert not sends(result(to, "a", 1, (0, 2)), Kind.CANCEL)


def test_nodes_that_hold_parts_are_told_to_forget_the_round() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    result(to, "a", 1, (0, 1))
    cancels = sends(result(to, "b", 1, (1, 2)), Kind.CANCEL)
    assert [(send.node, send.header) for send in cancels] == [("a", {"round": 1}), ("b", {"round": 1})]


def test_a_node_that_sent_the_whole_in_parts_is_told_to_forget_the_round() -> None:
    to = cluster(2)
    submit(to, 1, spec(2))
    result(to, "a", 1, (0, 1))
    assert [send.node for send in sends(result(to, "a", 1, (1, 2)), Kind.CANCEL)] == ["a"]


def test_a_result_that_comes_twice_counts_once() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    assert result(to, "a", 1, (0, 1)) == []
    assert result(to, "a", 1, (0, 1)) == []
    (done,) = ends(result(to, "b", 1, (1, 2)))
    assert done == Done(1, [root(0, 1), root(1, 2)])


def test_a_larger_root_replaces_its_parts() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(3))
    result(to, "a", 1, (0, 1))
    result(to, "a", 1, (0, 2))
    (done,) = ends(result(to, "b", 1, (2, 3)))
    assert done == Done(1, [root(0, 2), root(2, 3)])


def test_a_part_of_what_is_there_is_dropped() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(3))
    result(to, "a", 1, (0, 2))
    result(to, "a", 1, (1, 2))
    (done,) = ends(result(to, "b", 1, (2, 3)))
    assert done == Done(1, [root(0, 2), root(2, 3)])


def test_a_result_of_a_round_that_is_over_is_ignored() -> None:
    to = cluster(1)
    submit(to, 1, spec(1))
    result(to, "a", 1, (0, 1))
    assert result(to, "a", 1, (0, 1)) == []
    assert result(to, "a", 77, (0, 1)) == []


def test_a_late_result_of_a_lost_node_is_refused_and_nothing_of_it_counts() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    lose(to, "a", "gone")
    with pytest.raises(ValueError, match="has no part"):
        result(to, "a", 1, (0, 1))
    assert to.rounds[1].states == [SENT, SENT]
    (done,) = ends(result(to, "b", 1, (0, 2)))
    assert done == Done(1, [root(0, 2)])


def test_a_root_that_is_no_node_of_the_tree_is_refused() -> None:
    to = cluster(1)
    submit(to, 1, spec(4))
    with pytest.raises(ValueError, match="not a node of the reduction tree"):
        result(to, "a", 1, (1, 3))


def test_a_root_over_slices_that_the_node_was_not_given_is_refused() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(4))
    with pytest.raises(ValueError, match="not given all of the slices"):
        result(to, "a", 1, (0, 4))
    assert to.rounds[1].states == [SENT] * 4


@pytest.mark.parametrize("buffers", [[], [b"one", b"two"]])
def test_roots_that_do_not_go_with_their_buffers_are_refused(buffers: list[bytes]) -> None:
    to = cluster(1)
    submit(to, 1, spec(1))
    with pytest.raises(ValueError, match="do not match"):
        to.on_result("a", {"round": 1, "roots": [[0, 1, 1]], "seconds": 0.0}, buffers)
    assert to.rounds[1].states == [SENT]


def test_a_message_of_which_a_part_is_refused_leaves_no_round_that_nobody_works_on() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(1))
    with pytest.raises(ValueError, match="not a node of the reduction tree"):
        result(to, "a", 1, (0, 1), (7, 8))
    commands = lose(to, "a", "it sent what nobody understands")
    assert ends(commands) or shares(commands) == {"b": [0]}


# ---- user code raises, workers and nodes are lost -----------------------------------------------------------


def test_an_exception_ends_the_round_everywhere() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    header = {"round": 1, "what": "task", "text": "long", "summary": "short", "worker": 0, "slice": 1}
    commands = to.on_error("b", header, [b"pickled"])
    assert failure(commands) == Failure("task", "long", "host-b", 0, 1, "short", b"pickled")
    assert [send.node for send in sends(commands, Kind.CANCEL)] == ["a", "b"]
    assert to.rounds == {}


def test_an_exception_is_not_retried() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    header = {"round": 1, "what": "task", "text": "", "summary": "", "worker": None, "slice": None}
    commands = to.on_error("a", header, [])
    assert not sends(commands, Kind.TASK)
    assert failure(commands).worker == -1
    assert failure(commands).error is None


def test_an_exception_of_a_round_that_is_over_is_ignored() -> None:
    header = {"round": 9, "what": "task", "text": "", "summary": "", "worker": None, "slice": None}
    assert cluster(1).on_error("a", header, []) == []


def test_the_slices_of_a_lost_worker_are_sent_again_and_nothing_else() -> None:
    to = cluster(4)
    submit(to, 1, spec(8))
    (task,) = worker_lost(to, "a", 1, [2, 3], at=2)
    assert isinstance(task, Send)
    assert task.header["indices"] == [2, 3]
    assert task.header["params"] == "have"
    assert to.resent == 2


def test_a_worker_that_was_lost_in_folding_has_no_slices_to_send_again() -> None:
    to = cluster(1)
    submit(to, 1, spec(4))
    assert worker_lost(to, "a", 1, [], at=2) == []


def test_an_idle_worker_that_is_lost_concerns_no_round() -> None:
    to = cluster(1)
    submit(to, 1, spec(1))
    assert to.on_worker_lost("a", {"state": "lost", "worker": 0, "how": "was killed", "pid": 1}) == []


def test_a_worker_lost_in_a_round_that_is_over_is_ignored() -> None:
    assert worker_lost(cluster(1), "a", 9, [0]) == []


def test_a_slice_that_kills_its_worker_three_times_ends_the_round() -> None:
    to = cluster(2)
    submit(to, 1, spec(4))
    for _ in range(POISON - 1):
        assert shares(worker_lost(to, "a", 1, [1, 2], at=2)) == {"a": [1, 2]}
    found = failure(worker_lost(to, "a", 1, [2], at=2))
    assert (found.what, found.slice, found.host) == ("lost", 2, "host-a")
    assert "was killed" in found.text


def test_workers_lost_at_different_slices_end_no_round() -> None:
    to = cluster(2)
    submit(to, 1, spec(8))
    for index in range(8):
        assert shares(worker_lost(to, "a", 1, [index], at=index)) == {"a": [index]}


def test_deaths_on_several_nodes_add_up() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(1))
    worker_lost(to, "a", 1, [0], at=0)
    worker_lost(to, "a", 1, [0], at=0)
    lose(to, "a", "gone")
    assert failure(worker_lost(to, "b", 1, [0], at=0)).what == "lost"


def test_deaths_of_another_round_are_not_counted() -> None:
    to = cluster(1)
    for number in range(1, 5):
        submit(to, number, spec(1))
        assert shares(worker_lost(to, "a", number, [0], at=0)) == {"a": [0]}
        result(to, "a", number, (0, 1))


def test_the_first_of_its_slices_is_blamed_where_the_worker_had_begun_none() -> None:
    to = cluster(1)
    submit(to, 1, spec(4))
    for _ in range(POISON - 1):
        worker_lost(to, "a", 1, [2, 3])
    assert failure(worker_lost(to, "a", 1, [2, 3])).slice == 2


def test_workers_that_die_with_no_slice_of_theirs_end_the_round_also_when_slice_0_is_done() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    result(to, "a", 1, (0, 1))
    for _ in range(POISON - 1):
        assert worker_lost(to, "b", 1, []) == []
    assert failure(worker_lost(to, "b", 1, [])).what == "lost"


def test_what_a_lost_node_owed_goes_to_others_that_are_told_only_of_what_is_new() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(4))
    commands = lose(to, "a", "gone")
    (data,) = sends(commands, Kind.DATA)
    assert data.node == "b"
    assert data.header["slices"] == [[0, "job-0"], [1, "job-1"]]
    (task,) = sends(commands, Kind.TASK)
    assert task.header["indices"] == [0, 1]
    assert task.header["params"] == "have"  # b has the params of this round already
    assert to.resent == 2


def test_a_node_that_is_new_to_a_round_gets_the_params() -> None:
    to = cluster(1)
    submit(to, 1, spec(1))
    join(to, "b")
    (task,) = sends(lose(to, "a", "gone"), Kind.TASK)
    assert (task.node, task.header["params"]) == ("b", "send")


def test_what_a_lost_node_had_sent_already_is_not_sent_again() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(4))
    result(to, "a", 1, (0, 1))
    assert shares(lose(to, "a", "gone")) == {"b": [1]}
    assert to.resent == 1


def test_slices_of_a_lost_node_stay_at_their_new_place() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    lose(to, "a", "gone")
    result(to, "b", 1, (0, 2))
    (task,) = submit(to, 2, spec(2))
    assert isinstance(task, Send)
    assert task.header["indices"] == [0, 1]


def test_a_lost_node_is_not_told_of_the_end_of_the_round() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    lose(to, "a", "gone")
    assert [send.node for send in sends(to.on_cancel(1, CANCELLED), Kind.CANCEL)] == ["b"]


def test_without_any_node_a_round_says_why_for_each_host() -> None:
    to = cluster(1, 1)
    lose(to, "a", "no route")
    lose(to, "b", "its disk is full")
    found = failure(submit(to, 1, spec(1)))
    assert found == Failure("unreachable", "host-a: no route; host-b: its disk is full")


def test_a_round_waits_for_a_node_that_is_still_starting() -> None:
    to = cluster(1)
    to.add_node("b", "host-b", 1)
    submit(to, 1, spec(2))
    assert lose(to, "a", "gone") == []
    assert failure(lose(to, "b", "never came")).what == "unreachable"
    assert to.rounds == {}


def test_the_loss_of_the_last_node_ends_every_round() -> None:
    to = cluster(1)
    for number in (1, 2, 3):
        submit(to, number, spec(2))
    commands = lose(to, "a", "gone")
    assert [end.round for end in ends(commands)] == [1, 2, 3]
    assert not sends(commands, Kind.CANCEL)


def test_a_round_after_close_ends_at_once() -> None:
    to = cluster(1)
    to.on_close()
    assert failure(submit(to, 1, spec(1))).what == "unreachable"


# ---- cancelled, timed out -----------------------------------------------------------------------------------


def test_a_cancelled_round_is_stopped_everywhere() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    commands = to.on_cancel(1, CANCELLED)
    assert commands[0] == Fail(1, CANCELLED)
    assert [send.node for send in sends(commands, Kind.CANCEL)] == ["a", "b"]


def test_a_round_that_is_over_cannot_be_cancelled() -> None:
    assert cluster(1).on_cancel(1, CANCELLED) == []


def test_the_next_deadline_is_the_earliest() -> None:
    to = calm(cluster(1))
    assert to.next_deadline() is None
    for number, deadline in enumerate([None, 0.7, 0.3], start=1):
        submit(to, number, spec(1), deadline=deadline)
    assert to.next_deadline() == 0.3


def test_the_rounds_whose_time_is_up_end_and_no_others() -> None:
    to = cluster(1)
    for number, deadline in enumerate([None, 0.7, 0.3, 0.3], start=1):
        submit(to, number, spec(1), deadline=deadline)
    assert [end.round for end in ends(to.on_timer(0.3))] == [3, 4]
    assert set(to.rounds) == {1, 2}
    assert to.next_deadline() == 0.7


def test_a_timer_that_is_early_ends_nothing() -> None:
    to = cluster(1)
    submit(to, 1, spec(1), deadline=3.0)
    assert to.on_timer(2.9) == []


def test_a_timed_out_round_tells_how_far_it_was() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(4), deadline=3.0)
    result(to, "a", 1, (0, 2))
    found = failure(to.on_timer(3.0))
    assert (found.what, found.text) == ("timeout", "2 of 4 slices were done")


# ---- refs ---------------------------------------------------------------------------------------------------


def waiting(*names: str, credit: int = 16 * MIB) -> Dispatch:
    """Node "a" is in round 1 and lacks these refs."""
    to = cluster(1, credit=credit)
    submit(to, 1, spec(max(4, len(names))))
    to.refs.on_get("a", 1, [Part(ref(name)) for name in names])
    return to


def test_the_first_missing_ref_is_loaded() -> None:
    to = cluster(1)
    submit(to, 1, spec(2))
    assert to.refs.on_get("a", 1, [Part(ref("job-0")), Part(ref("job-1"))]) == [Load("a", 1, ref("job-0"))]


def test_a_ref_that_is_on_its_way_is_not_loaded_twice() -> None:
    to = waiting("job-0")
    assert to.refs.on_get("a", 1, [Part(ref("job-0"))]) == []
    assert len(to.nodes["a"].transfers) == 1


def test_a_loaded_ref_goes_out_whole_and_the_next_is_loaded() -> None:
    to = waiting("job-0", "job-1")
    assert to.refs.on_loaded("a", ref("job-0"), 100) == [
        Block("a", ref("job-0"), 0, 100, 1),
        Unload("a", ref("job-0")),
        Load("a", 1, ref("job-1")),
    ]


def test_small_refs_are_loaded_ahead_but_not_too_many() -> None:
    to = waiting(*(f"job-{index}" for index in range(3 * transfers.AHEAD)), credit=0)
    loaded = 0
    loads = [Load("a", 1, ref("job-0"))]
    while loads:
        loaded += len(loads)
        loads = [more for load in loads for more in to.refs.on_loaded("a", load.ref, 10) if isinstance(more, Load)]
    assert loaded == transfers.AHEAD


def test_nothing_is_loaded_behind_a_large_ref_that_waits_for_credit() -> None:
    to = waiting("job-0", "job-1", credit=0)
    assert to.refs.on_loaded("a", ref("job-0"), transfers.AHEAD_BYTES) == []


def test_refs_go_out_in_the_order_in_which_they_were_asked_for() -> None:
    to = waiting("job-0", "job-1", "job-2", credit=0)
    for index in range(3):
        to.refs.on_loaded("a", ref(f"job-{index}"), 10)
    chunks = [command for command in to.nodes["a"].transfers.grant(100) if isinstance(command, Block)]
    assert [chunk.ref for chunk in chunks] == refs(["job-0", "job-1", "job-2"])


def test_a_large_ref_goes_out_in_chunks() -> None:
    to = waiting("job-0")
    chunks = to.refs.on_loaded("a", ref("job-0"), 2 * BLOCK_BYTES + 1)[:-1]
    assert chunks == [
        Block("a", ref("job-0"), 0, BLOCK_BYTES, 1),
        Block("a", ref("job-0"), BLOCK_BYTES, BLOCK_BYTES, 1),
        Block("a", ref("job-0"), 2 * BLOCK_BYTES, 1, 1),
    ]


def test_a_transfer_goes_on_where_the_node_says() -> None:
    to = cluster(1)
    submit(to, 1, spec(1))
    to.refs.on_get("a", 1, [Part(ref("job-0"), 40)])
    assert to.refs.on_loaded("a", ref("job-0"), 100)[0] == Block("a", ref("job-0"), 40, 60, 1)


def test_a_part_of_a_ref_goes_out_alone() -> None:
    to = cluster(1)
    submit(to, 1, spec(1))
    to.refs.on_get("a", 1, [Part(ref("job-0"), 40, 50)])
    sent = to.refs.on_loaded("a", ref("job-0"), 100)
    assert sent == [Block("a", ref("job-0"), 40, 10, 1), Unload("a", ref("job-0"))]


def test_who_asks_for_more_of_what_is_on_its_way_gets_all_of_it() -> None:
    for first, second, size in ((40, 50), (30, 45), 20), ((40, 50), (40, None), 60), ((40, None), (50, 60), 60):
        to = cluster(1)
        submit(to, 1, spec(1))
        to.refs.on_get("a", 1, [Part(ref("job-0"), *first)])
        to.refs.on_get("a", 1, [Part(ref("job-0"), *second)])
        block = to.refs.on_loaded("a", ref("job-0"), 100)[0]
        assert isinstance(block, Block)
        assert (block.offset, block.size) == (min(first[0], second[0]), size)


def test_no_more_is_sent_than_there_is_credit() -> None:
    to = waiting("job-0", credit=50)
    assert to.refs.on_loaded("a", ref("job-0"), 100) == [Block("a", ref("job-0"), 0, 50, 1)]
    assert to.refs.on_credit("a", 30) == [Block("a", ref("job-0"), 50, 30, 1)]
    assert to.refs.on_credit("a", 30)[:2] == [Block("a", ref("job-0"), 80, 20, 1), Unload("a", ref("job-0"))]
    assert to.nodes["a"].credit == 10


def test_without_credit_nothing_is_sent() -> None:
    to = waiting("job-0", credit=0)
    assert to.refs.on_loaded("a", ref("job-0"), 100) == []


def test_credit_before_the_content_is_there_sends_nothing() -> None:
    assert waiting("job-0").nodes["a"].transfers.grant(100) == []


def test_each_node_has_its_own_credit() -> None:
    to = cluster(1, 1, credit=50)
    submit(to, 1, spec(2))
    for name, its in (("a", ref("job-0")), ("b", ref("job-1"))):
        to.refs.on_get(name, 1, [Part(its)])
        assert to.refs.on_loaded(name, its, 100) == [Block(name, its, 0, 50, 1)]


def test_a_round_that_is_over_sends_no_ref() -> None:
    to = cluster(1)
    assert to.refs.on_get("a", 9, [Part(ref("job-0"))]) == [Gone("a", ref("job-0"))]


def test_a_module_is_sent_also_when_the_round_is_over() -> None:
    # The worker that imports it waits for an answer, whatever has become of the round.
    assert cluster(1).refs.on_get("a", 9, [Part(ref("module:1:text"))]) == [Load("a", 9, ref("module:1:text"))]


def test_the_end_of_a_round_ends_its_transfers() -> None:
    to = waiting("job-0", "job-1")
    commands = to.on_cancel(1, CANCELLED)
    assert not to.nodes["a"].transfers
    assert [command.ref for command in commands if isinstance(command, Gone)] == refs(["job-0", "job-1"])
    assert [command.ref for command in commands if isinstance(command, Unload)] == refs(["job-0", "job-1"])


def test_what_another_round_of_the_job_wants_goes_on_in_its_name() -> None:
    to = waiting("params:1", "job-0")
    submit(to, 2, spec(4))
    commands = to.on_cancel(1, CANCELLED)
    assert [command.ref for command in commands if isinstance(command, Gone)] == refs(["params:1"])
    assert commands[-1] == Load("a", 2, ref("job-0"))


def test_transfers_of_another_job_are_left_alone() -> None:
    to = waiting("job-0")
    submit(to, 2, spec(1, "other"))
    to.refs.on_get("a", 2, [Part(ref("other-0"))])
    assert to.on_cancel(1, CANCELLED)[-1] == Load("a", 2, ref("other-0"))
    assert [transfer.ref for transfer in to.nodes["a"].transfers] == refs(["other-0"])


def test_a_module_on_its_way_outlives_its_round() -> None:
    to = waiting("module:1:text", "job-0")
    to.on_cancel(1, CANCELLED)
    assert to.refs.on_loaded("a", ref("module:1:text"), 10)[0] == Block("a", ref("module:1:text"), 0, 10, 1)


def test_content_that_nobody_waits_for_any_more_is_unloaded() -> None:
    to = waiting("job-0")
    to.on_cancel(1, CANCELLED)
    assert to.refs.on_loaded("a", ref("job-0"), 100) == [Unload("a", ref("job-0"))]


def test_a_lost_node_gets_no_more_chunks() -> None:
    to = waiting("job-0", "job-1", credit=50)
    to.refs.on_loaded("a", ref("job-0"), 100)
    commands = lose(to, "a", "gone")
    assert [command.ref for command in commands if isinstance(command, Unload)] == refs(["job-0", "job-1"])
    assert to.refs.on_credit("a", 50) == []
    assert to.refs.on_loaded("a", ref("job-1"), 100) == [Unload("a", ref("job-1"))]


def test_a_slice_that_cannot_be_made_ends_all_rounds_of_its_job_and_no_others() -> None:
    to = waiting("job-0")
    submit(to, 2, spec(4))
    submit(to, 3, spec(4, "other"))
    commands = load_failed(to, "a", ref("job-0"), 1)
    assert [end.round for end in ends(commands)] == [1, 2]
    assert set(to.rounds) == {3}


def test_a_slice_that_cannot_be_made_ends_the_rounds_that_wait_for_it_also_when_the_first_is_over() -> None:
    to = waiting("job-0")  # its Load carries round 1
    submit(to, 2, spec(4))
    to.on_cancel(1, CANCELLED)  # the transfer is round 2's from now on
    commands = load_failed(to, "a", ref("job-0"), 1)
    assert [end.round for end in ends(commands)] == [2]


def test_a_module_that_cannot_be_read_holds_up_no_other_transfer() -> None:
    to = waiting("module:1:text")
    commands = load_failed(to, "a", ref("module:1:text"), 1)
    submit(to, 2, spec(4, "other"))
    commands += to.refs.on_get("a", 2, [Part(ref("other-0"))])
    assert Load("a", 2, ref("other-0")) in commands


def test_what_a_lost_node_owed_goes_to_as_many_nodes_as_there_are_slices_and_the_next_time_to_others() -> None:
    to = cluster(*[2] * 7)
    submit(to, 1, spec(14))
    first, second = lose(to, "a", "gone"), lose(to, "d", "gone")
    assert sorted(map(len, shares(first).values())) == [1, 1]
    assert sorted(map(len, shares(second).values())) == [1, 1]
    assert not shares(first).keys() & shares(second).keys()


def test_who_has_nothing_to_share_is_left_in_peace_for_a_while() -> None:
    to = calm(cluster(1, 1, 1))
    submit(to, 1, spec(12))
    for name, lo in (("b", 4), ("c", 8)):
        to.on_heard(name, 1.0)
        for index in range(lo, lo + 4):
            result(to, name, 1, (index, index + 1), seconds=0.25)
    asked = sends(to.on_timer(1.2), Kind.SHARE)
    assert [(send.node, send.header["for"]) for send in asked] == [("a", "b"), ("a", "c")]
    assert shared(to, "a", 1, "b") == shared(to, "a", 1, "c") == []
    assert not sends(tick(to, 1.25, 1.2), Kind.SHARE)
    assert sends(tick(to, 3.0, 1.25), Kind.SHARE)


# ---- jobs ---------------------------------------------------------------------------------------------------


def run_once(to: Dispatch, number: int, key: str) -> list[Command]:
    """A round over one slice a node, from submit to Done."""
    nodes = len(to.nodes)
    commands = submit(to, number, spec(nodes, key))
    for position, name in enumerate(to.nodes):
        commands += result(to, name, number, (position, position + 1))
    assert isinstance(ends(commands)[0], Done)
    return commands


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_every_node_is_told_to_forget_old_jobs(nodes: int) -> None:
    to = cluster(*[1] * nodes)
    known: dict[str, set[int]] = {name: set() for name in to.nodes}
    for number in range(1, line.JOBS_KEPT + 11):
        for send in sends(run_once(to, number, f"job{number}"), Kind.JOB):
            known[send.node].add(send.header["job"])
            known[send.node].difference_update(send.header["forget"])
    assert {name: len(jobs) <= line.JOBS_KEPT + 1 for name, jobs in known.items()} == dict.fromkeys(known, True)


def test_a_job_that_was_forgotten_is_told_anew() -> None:
    to = cluster(1)
    for number in range(1, line.JOBS_KEPT + 3):
        run_once(to, number, f"job{number}")
    (job,) = sends(submit(to, 1000, spec(1, "job1")), Kind.JOB)
    assert job.header["job"] == line.JOBS_KEPT + 3


def test_a_job_in_use_is_not_forgotten() -> None:
    to = cluster(1)
    submit(to, 1, spec(1, "in use"))
    for number in range(2, line.JOBS_KEPT + 12):
        run_once(to, number, f"job{number}")
    (task,) = submit(to, 1000, spec(1, "in use"))
    assert isinstance(task, Send)
    assert task.header["job"] == 1


def test_a_job_used_lately_is_kept_and_an_older_one_forgotten() -> None:
    to = cluster(1)
    run_once(to, 1, "kept")
    for number in range(2, line.JOBS_KEPT + 12):
        run_once(to, number, f"job{number}")
        submit(to, 10_000 + number, spec(1, "kept"))
        assert ends(result(to, "a", 10_000 + number, (0, 1)))
    (task,) = submit(to, 99_999, spec(1, "kept"))
    assert isinstance(task, Send)
    assert task.kind is Kind.TASK


# ---- silence ------------------------------------------------------------------------------------------------


def tick(to: Dispatch, until: float, since: float = 0.0) -> list[Command]:
    """Let time pass, with the timer at every moment at which it is due."""
    commands: list[Command] = []
    now = since
    while (due := to.next_deadline()) is not None and due <= until:
        now = max(now, due)
        commands += to.on_timer(now)
    return commands


def silent(*workers: int, nslices: int, speculation: bool = True, until: float = SUSPECT_AFTER) -> Dispatch:
    """Round 1 has begun at 0; the first node has said nothing since, the others a moment ago."""
    to = calm(cluster(*workers, speculation=speculation))
    submit(to, 1, spec(nslices))
    now = 0.0
    while now < until:
        now += SWEEP
        for name in list(to.nodes)[1:]:
            to.on_heard(name, now - 0.001)
        to.on_timer(now)
    return to


def test_a_node_that_owes_something_and_is_silent_is_asked_once_for_a_sign_of_life() -> None:
    to = calm(cluster(1))
    submit(to, 1, spec(2))
    assert tick(to, PING_AFTER - SWEEP) == []
    (ping,) = tick(to, SUSPECT_AFTER - SWEEP)
    assert isinstance(ping, Send)
    assert (ping.node, ping.kind, ping.header) == ("a", Kind.PING, {"t": PING_AFTER})


def test_a_node_that_has_answered_is_asked_again_when_it_is_silent_again() -> None:
    to = calm(cluster(1))
    submit(to, 1, spec(2))
    assert sends(tick(to, PING_AFTER), Kind.PING)
    assert to.on_heard("a", PING_AFTER + 0.5) == []
    assert not sends(tick(to, 2 * PING_AFTER), Kind.PING)
    assert sends(tick(to, 2 * PING_AFTER + SWEEP), Kind.PING)


def test_a_node_that_owes_nothing_may_be_silent() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(1))  # b has nothing
    for now in range(1, 1000):
        to.on_heard("a", now - 0.5)
        assert tick(to, float(now), float(now)) == []
    assert to.nodes["b"].state is NodeState.READY


def test_the_silence_of_a_node_counts_from_when_it_was_given_work() -> None:
    to = calm(cluster(1))
    submit(to, 1, spec(1), now=1000.0)
    result(to, "a", 1, (0, 1))
    submit(to, 2, spec(1), now=2000.0)
    assert tick(to, 2000.0 + PING_AFTER - SWEEP) == []


def test_silence_is_looked_at_as_long_as_there_are_rounds() -> None:
    to = calm(cluster(1))
    assert to.next_deadline() is None
    submit(to, 1, spec(1), now=3.0)
    assert to.next_deadline() == 3.0 + SWEEP
    result(to, "a", 1, (0, 1))
    assert tick(to, 100.0) == []
    assert to.next_deadline() is None


def test_a_node_that_is_silent_for_long_is_suspect_and_others_do_its_work_as_well() -> None:
    to = silent(1, 1, nslices=2, until=SUSPECT_AFTER - SWEEP)
    commands = to.on_timer(SUSPECT_AFTER)
    assert [command for command in commands if isinstance(command, Note)] == [
        Note(f"nothing was heard of host-a for {SUSPECT_AFTER:.1f} s; others do its work as well")
    ]
    assert to.nodes["a"].state is NodeState.SUSPECT
    result(to, "b", 1, (1, 2))
    assert shares(tick(to, SUSPECT_AFTER + SWEEP, SUSPECT_AFTER)) == {"b": [0]}
    assert to.resent == 0  # it may yet bring it


def test_whoever_is_idle_takes_no_more_of_a_silent_node_than_it_has_workers() -> None:
    to = silent(4, 2, nslices=6)
    result(to, "b", 1, (4, 6))
    assert shares(tick(to, SUSPECT_AFTER + SWEEP, SUSPECT_AFTER)) == {"b": [0, 1]}
    assert shares(tick(to, SUSPECT_AFTER + 1.9, SUSPECT_AFTER + SWEEP)) == {}  # it is at work


def test_what_a_silent_node_owes_is_not_tried_by_a_third_one() -> None:
    to = silent(1, 1, 1, nslices=3)
    result(to, "b", 1, (1, 2))
    result(to, "c", 1, (2, 3))
    tasks = sends(tick(to, SUSPECT_AFTER + 1.9, SUSPECT_AFTER), Kind.TASK)
    assert [task.header["indices"] for task in tasks] == [[0]]


def test_the_workers_of_a_suspect_node_are_no_capacity() -> None:
    to = silent(1, 3, nslices=4)
    assert to.capacity == 3
    assert [name for name, node in to.nodes.items() if node.state is NodeState.READY] == ["b"]


def test_a_new_round_is_done_by_those_that_answer_and_the_next_one_where_the_data_is() -> None:
    to = silent(1, 1, nslices=2)
    assert shares(submit(to, 2, spec(2), now=SUSPECT_AFTER)) == {"b": [0, 1]}
    to.on_heard("a", SUSPECT_AFTER + 1.0)
    assert shares(submit(to, 3, spec(2), now=SUSPECT_AFTER + 2.0)) == {"a": [0], "b": [1]}


def test_when_all_are_silent_they_are_given_work_all_the_same() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(2))
    tick(to, SUSPECT_AFTER)
    assert {node.state for node in to.nodes.values()} == {NodeState.SUSPECT}
    assert shares(submit(to, 2, spec(2), now=SUSPECT_AFTER)) == {"a": [0], "b": [1]}


def test_a_suspect_node_that_is_heard_is_ready_again() -> None:
    to = silent(1, 1, nslices=2)
    (note,) = to.on_heard("a", 7.5)
    assert note == Note("host-a is heard again after 7.5 s of silence")
    assert to.nodes["a"].state is NodeState.READY
    assert to.capacity == 2


def test_a_node_that_is_never_heard_again_is_given_up() -> None:
    to = silent(1, 1, nslices=2)
    now = SUSPECT_AFTER
    while not (lost := [command for command in to.on_timer(now) if isinstance(command, Lost)]):
        now += SWEEP
        to.on_heard("b", now)
    assert now == LOST_AFTER
    assert lost == [Lost("a", f"nothing was heard of it for {LOST_AFTER:.0f} s")]


def test_without_second_attempts_the_work_of_a_silent_node_waits_for_it() -> None:
    to = silent(1, 1, nslices=2, speculation=False)
    result(to, "b", 1, (1, 2))
    assert to.nodes["a"].state is NodeState.SUSPECT
    assert not sends(tick(to, SUSPECT_AFTER + 3.0), Kind.TASK)
    assert shares(lose(to, "a", "gone")) == {"b": [0]}


def test_a_master_that_was_away_takes_nobody_for_silent() -> None:
    # A minute in C code with the GIL held: what has come meanwhile is read afterwards.
    to = calm(cluster(1, 1))
    submit(to, 1, spec(2))
    assert to.on_timer(60.0) == []
    assert {node.state for node in to.nodes.values()} == {NodeState.READY}
    assert tick(to, 60.0 + PING_AFTER - 0.1) == []
    assert len(sends(tick(to, 60.0 + PING_AFTER), Kind.PING)) == 2


def test_a_silent_node_is_not_asked_for_a_share_while_another_has_much_to_do() -> None:
    to = silent(1, 1, 3, nslices=15)  # a owes 0 to 2, b 3 to 5
    for index in range(6, 15):
        result(to, "c", 1, (index, index + 1))
    assert shares(tick(to, SUSPECT_AFTER + SWEEP, SUSPECT_AFTER)) == {"c": [0, 1, 2]}
    join(to, "d")
    result(to, "b", 1, (3, 4))  # it answers, and a seems to have the most to do
    (share,) = sends(tick(to, SUSPECT_AFTER + 1.9, SUSPECT_AFTER + SWEEP), Kind.SHARE)[:1]
    assert share.node == "b"


# ---- second attempts ----------------------------------------------------------------------------------------


def shared(to: Dispatch, name: str, number: int, idle: str, *indices: int) -> list[Command]:
    return to.on_shared(name, {"state": "shared", "round": number, "for": idle, "indices": list(indices)})


def idle_beside_busy(*, speculation: bool = True, slices: int = 8) -> Dispatch:
    """Round 1 began at 0; b has done its part at 1.0, the first half is a's."""
    to = calm(cluster(1, 1, speculation=speculation))
    submit(to, 1, spec(slices))
    to.on_heard("a", 0.99)
    to.on_heard("b", 1.0)
    for index in range(slices // 2, slices):
        result(to, "b", 1, (index, index + 1), seconds=0.25)
    return to


def test_a_node_that_has_done_its_part_asks_for_a_share_of_what_another_has_to_do() -> None:
    to = idle_beside_busy()
    (share,) = tick(to, 1.5, 1.0)  # soon, measured by what the round has taken so far
    assert share == Send("a", Kind.SHARE, {"round": 1, "count": 2, "seconds": 0.25, "for": "b"})


def test_shares_are_by_the_number_of_workers() -> None:
    to = calm(cluster(1, 3))
    submit(to, 1, spec(16))
    to.on_heard("b", 1.0)
    for index in range(4, 16):
        result(to, "b", 1, (index, index + 1), seconds=0.25)
    (share,) = sends(tick(to, 1.9), Kind.SHARE)[:1]
    assert (share.node, share.header["count"]) == ("a", 3)  # of 4


def test_the_one_with_the_most_to_do_for_each_worker_is_asked() -> None:
    to = calm(cluster(4, 1, 1))
    submit(to, 1, spec(24))
    to.on_heard("c", 1.0)
    for index in range(20, 24):
        result(to, "c", 1, (index, index + 1))
    for index in range(8):  # a has 8 for 4 workers, b has 4 for 1
        result(to, "a", 1, (index, index + 1))
    (share,) = sends(tick(to, 1.9), Kind.SHARE)[:1]
    assert share.node == "b"


def test_nobody_is_asked_whose_workers_are_all_at_their_last_slice_and_not_late() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(2))
    to.on_heard("b", 1.0)
    result(to, "b", 1, (1, 2), seconds=1.0)
    assert not sends(tick(to, 1.99), Kind.SHARE)


def test_who_takes_much_longer_than_is_usual_is_asked_for_its_last_slice_as_well() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(2))
    to.on_heard("b", 1.0)
    result(to, "b", 1, (1, 2), seconds=1.0)
    to.on_heard("a", 1.5)
    (share,) = sends(tick(to, 3.0), Kind.SHARE)[:1]
    assert share == Send("a", Kind.SHARE, {"round": 1, "count": 1, "seconds": 1.0, "for": "b"})


def test_it_is_known_from_the_last_round_what_is_usual() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(2))
    result(to, "b", 1, (1, 2), seconds=3.0)
    result(to, "a", 1, (0, 1), seconds=2.0)
    submit(to, 2, spec(2), now=10.0)
    assert to.rounds[2].typical_slice_seconds == 2.0


def test_a_node_that_comes_in_the_middle_of_a_round_asks_for_its_share() -> None:
    to = calm(cluster(1))
    submit(to, 1, spec(8))
    join(to, "b")
    (share,) = to.on_timer(MIN_SEARCH_DELAY * 2)
    assert share == Send("a", Kind.SHARE, {"round": 1, "count": 4, "seconds": 0.0, "for": "b"})


def test_a_node_that_had_nothing_to_do_from_the_start_asks_as_well() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(1))
    result(to, "a", 1, (0, 1), seconds=0.5)
    submit(to, 2, spec(1), now=10.0)
    assert tick(to, 10.99, 10.0) == []  # as long as it takes as a rule, and as long again
    (share,) = sends(tick(to, 11.9, 11.0), Kind.SHARE)
    assert share == Send("a", Kind.SHARE, {"round": 2, "count": 1, "seconds": 0.5, "for": "b"})


def test_alone_nobody_is_asked_for_anything() -> None:
    to = calm(cluster(4))
    submit(to, 1, spec(64))
    result(to, "a", 1, (0, 1), seconds=0.001)
    assert not sends(tick(to, SUSPECT_AFTER - SWEEP), Kind.SHARE)


def test_without_data_every_worker_does_its_own() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(2, data=False))
    to.on_heard("b", 1.0)
    result(to, "b", 1, (1, 2), seconds=0.1)
    assert not [command for command in tick(to, PING_AFTER - 0.1) if isinstance(command, Send)]


def test_who_asks_in_vain_asks_again_and_less_and_less_often() -> None:
    to = idle_beside_busy()
    asked: list[float] = []
    now = 1.0
    while now < 60.0:
        due = to.next_deadline()
        assert due is not None
        now = max(now, due)
        to.on_heard("a", now)
        if sends(to.on_timer(now), Kind.SHARE):
            asked.append(now)
    pauses = [after - before for before, after in itertools.pairwise(asked)]
    assert 3 <= len(asked) <= 12
    assert pauses == sorted(pauses)


def test_what_is_shared_is_given_with_the_job_the_data_and_the_params() -> None:
    to = calm(cluster(1))
    submit(to, 1, spec(8))
    join(to, "b")
    commands = shared(to, "a", 1, "b", 6, 7)
    (data,), (task,) = sends(commands, Kind.DATA), sends(commands, Kind.TASK)
    assert sends(commands, Kind.JOB)
    assert (data.node, data.header["slices"]) == ("b", [[6, "job-6"], [7, "job-7"]])
    assert (task.node, task.header["indices"], task.header["params"]) == ("b", [6, 7], "send")
    assert to.rounds[1].debts == {"a": set(range(8)), "b": {6, 7}}


def test_the_first_result_counts_and_the_other_one_is_told_to_stop_these_slices() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 2, 3)
    (cancel,) = result(to, "b", 1, (2, 4))
    assert cancel == Send("a", Kind.CANCEL, {"round": 1, "indices": [2, 3]})
    assert to.rounds[1].debts["a"] == {0, 1}


def test_what_was_done_sooner_elsewhere_is_done_there_from_now_on() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 3)
    result(to, "b", 1, (3, 4))
    result(to, "a", 1, (0, 2))
    result(to, "a", 1, (2, 3))
    assert shares(submit(to, 2, spec(8), now=2.0)) == {"a": [0, 1, 2], "b": [3, 4, 5, 6, 7]}


def test_what_was_done_sooner_by_the_one_that_had_it_stays_there() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 3)
    (cancel,) = result(to, "a", 1, (3, 4))
    assert cancel == Send("b", Kind.CANCEL, {"round": 1, "indices": [3]})
    result(to, "a", 1, (0, 2))
    result(to, "a", 1, (2, 3))
    assert shares(submit(to, 2, spec(8), now=2.0)) == {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}


def test_both_results_of_a_slice_count_once() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 3)
    result(to, "b", 1, (3, 4))
    commands = result(to, "a", 1, (0, 4))  # it had not heard yet
    (done,) = ends(commands)
    assert done == Done(1, [root(0, 4), *(root(i, i + 1) for i in range(4, 8))])
    assert [send.header for send in sends(commands, Kind.CANCEL)] == [{"round": 1}] * 2


def test_a_slice_that_two_nodes_try_is_not_sent_again_when_one_of_them_is_lost() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 2, 3)
    assert shares(lose(to, "a", "gone")) == {"b": [0, 1]}
    assert to.resent == 2


def test_who_is_alone_with_a_slice_that_it_had_shared_is_told() -> None:
    for commands in (
        lambda to: lose(to, "b", "gone"),
        lambda to: to.on_remove("b", "nobody wants it"),
        lambda to: worker_lost(to, "b", 1, [2, 3], at=2),
    ):
        to = calm(cluster(1))
        submit(to, 1, spec(4))
        join(to, "b")
        shared(to, "a", 1, "b", 2, 3)
        found = commands(to)
        (task,) = sends(found, Kind.TASK)
        assert (task.node, task.header["indices"], task.header["params"]) == ("a", [2, 3], "have")
        assert not sends(found, Kind.JOB)
        assert to.rounds[1].debts["a"] == {0, 1, 2, 3}
        assert to.rounds[1].owners == [("a",)] * 4
        assert to.resent == 0


def test_a_slice_that_two_nodes_try_is_not_sent_again_when_a_worker_is_lost() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 2, 3)
    assert worker_lost(to, "a", 1, [2, 3], at=2) == []
    assert shares(worker_lost(to, "b", 1, [2, 3], at=3)) == {"a": [2, 3]}
    assert to.resent == 2


def test_deaths_of_both_attempts_add_up() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 3)
    worker_lost(to, "b", 1, [3], at=3)
    worker_lost(to, "a", 1, [3], at=3)
    assert failure(worker_lost(to, "a", 1, [3], at=3)).slice == 3


def test_a_slice_that_somebody_has_brought_ends_no_round_whomever_it_kills() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 3)
    for _ in range(POISON - 1):
        worker_lost(to, "a", 1, [3], at=3)
    result(to, "b", 1, (3, 4))
    assert not ends(worker_lost(to, "a", 1, [3], at=3))  # it had not heard yet that it is not needed any more


def test_an_exception_in_a_slice_that_somebody_has_brought_ends_no_round() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 3)
    result(to, "b", 1, (3, 4))
    header = {"round": 1, "what": "task", "text": "", "summary": "", "worker": 0, "slice": 3}
    assert to.on_error("a", header, []) == []  # it had not heard yet that it is not needed any more
    assert list(to.rounds) == [1]


def test_what_is_done_meanwhile_is_not_given_to_who_is_idle() -> None:
    to = idle_beside_busy()
    result(to, "a", 1, (3, 4))
    assert shares(shared(to, "a", 1, "b", 2, 3)) == {"b": [2]}


def test_nobody_tries_what_two_try_already() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 2, 3)
    join(to, "c")
    assert shares(shared(to, "a", 1, "c", 1, 2, 3)) == {"c": [1]}


def test_a_node_that_has_nothing_to_share_shares_nothing() -> None:
    assert shared(idle_beside_busy(), "a", 1, "b") == []


def test_what_is_shared_for_a_round_that_is_over_is_ignored() -> None:
    assert shared(idle_beside_busy(), "a", 9, "b", 3) == []


@pytest.mark.parametrize("speculation", [True, False])
def test_what_is_shared_for_a_node_that_is_gone_goes_on_where_it_is(speculation: bool) -> None:
    to = idle_beside_busy(speculation=speculation)
    to.on_remove("b", "nobody wants it")
    assert shares(shared(to, "a", 1, "b", 2, 3)) == {"a": [2, 3]}
    assert to.resent == 0
    assert to.rounds[1].debts["a"] == {0, 1, 2, 3}


@pytest.mark.parametrize("indices", [[8], [-1], [True], ["3"], [1.0]])
@pytest.mark.parametrize("speculation", [True, False])
def test_what_is_no_slice_of_the_round_cannot_be_shared(speculation: bool, indices: list[object]) -> None:
    to = idle_beside_busy(speculation=speculation)
    with pytest.raises(ValueError, match="are not slices of the round"):
        to.on_shared("a", {"state": "shared", "round": 1, "for": "b", "indices": indices})


@pytest.mark.parametrize("speculation", [True, False])
def test_a_node_cannot_share_what_it_does_not_owe(speculation: bool) -> None:
    to = idle_beside_busy(speculation=speculation)
    assert shared(to, "a", 1, "b", 5) == []


def test_without_second_attempts_what_is_shared_is_given_away() -> None:
    to = idle_beside_busy(speculation=False)
    assert shares(shared(to, "a", 1, "b", 2, 3)) == {"b": [2, 3]}
    assert to.rounds[1].debts["a"] == {0, 1}
    assert to.resent == 0
    assert not sends(result(to, "b", 1, (2, 4)), Kind.CANCEL)
    result(to, "a", 1, (0, 2))
    assert shares(submit(to, 2, spec(8), now=2.0)) == {"a": [0, 1], "b": [2, 3, 4, 5, 6, 7]}


def test_without_second_attempts_what_was_given_away_comes_back_when_it_is_lost() -> None:
    to = idle_beside_busy(speculation=False)
    shared(to, "a", 1, "b", 2, 3)
    assert shares(lose(to, "b", "gone")) == {"a": [2, 3]}


def test_a_round_that_has_ended_is_stopped_wherever_it_was_tried() -> None:
    to = idle_beside_busy()
    shared(to, "a", 1, "b", 2, 3)
    assert [send.node for send in sends(to.on_cancel(1, CANCELLED), Kind.CANCEL)] == ["a", "b"]


# ---- nodes that go and come back ------------------------------------------------------------------------------


def come_back(to: Dispatch, name: str, workers: int = 1) -> list[Command]:
    """A node that is expected comes."""
    to.on_hello(name, {"workers": workers, "credit": 16 * MIB})
    return to.on_ready(name, list(range(200, 200 + workers)))


def test_the_successor_of_a_lost_node_is_expected_in_its_place() -> None:
    to = cluster(3, 1)
    lose(to, "a", "gone", "a2")
    assert "a" not in to.nodes
    record = to.nodes["a2"]
    assert (record.host, record.workers, record.state) == ("host-a", 3, NodeState.STARTING)


def test_what_a_lost_node_owed_goes_to_others_also_when_it_has_a_successor() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    assert shares(lose(to, "a", "gone", "a2")) == {"b": [0]}


def test_the_last_node_leaves_its_rounds_to_its_successor() -> None:
    to = cluster(1)
    submit(to, 1, spec(2))
    assert lose(to, "a", "gone", "a2") == []
    commands = come_back(to, "a2")
    assert shares(commands) == {"a2": [0, 1]}
    (task,) = sends(commands, Kind.TASK)
    assert task.header["params"] == "send"
    assert sends(commands, Kind.JOB)


def test_a_round_with_nobody_but_an_expected_successor_waits_for_it() -> None:
    to = cluster(1)
    lose(to, "a", "gone", "a2")
    assert submit(to, 1, spec(1)) == []
    lose(to, "a2", "gone too", "a3")
    assert failure(lose(to, "a3", "gone for good")) == Failure("unreachable", "host-a: gone for good")


def test_a_successor_gets_its_share_back_and_nothing_else_moves() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(8))
    lose(to, "a", "gone", "a2")
    to.on_cancel(1, CANCELLED)
    submit(to, 2, spec(8))
    to.on_cancel(2, CANCELLED)
    come_back(to, "a2")
    placed = shares(submit(to, 3, spec(8)))
    assert {name: len(indices) for name, indices in placed.items()} == {"a2": 4, "b": 4}
    assert shares(submit(to, 4, spec(8))) == placed


def test_a_successor_that_comes_in_the_middle_of_a_round_asks_for_its_share() -> None:
    to = calm(cluster(1, 1))
    submit(to, 1, spec(8))
    lose(to, "a", "gone", "a2")
    come_back(to, "a2")
    (share,) = to.on_timer(2 * MIN_SEARCH_DELAY)
    assert share == Send("b", Kind.SHARE, {"round": 1, "count": 4, "seconds": 0.0, "for": "a2"})


def test_jobs_are_told_anew_to_a_successor() -> None:
    to = cluster(1)
    submit(to, 1, spec(1))
    result(to, "a", 1, (0, 1))
    lose(to, "a", "gone", "a2")
    come_back(to, "a2")
    assert sends(submit(to, 2, spec(1)), Kind.JOB)


def test_a_node_that_is_lost_before_it_is_ready_may_have_a_successor() -> None:
    to = cluster(1)
    to.add_node("b", "host-b", 1)
    assert lose(to, "b", "never came", "b2") == []
    assert shares(submit(to, 1, spec(2))) == {"a": [0, 1]}
    assert come_back(to, "b2") == []


def test_a_removed_node_is_told_to_leave_and_its_work_goes_to_others() -> None:
    to = cluster(1, 1)
    submit(to, 1, spec(2))
    commands = to.on_remove("a", "its host was removed")
    assert commands[0] == Send("a", Kind.BYE, {"reason": "its host was removed"})
    assert shares(commands) == {"b": [0]}
    assert list(to.nodes) == ["b"]
    assert [send.node for send in sends(to.on_cancel(1, CANCELLED), Kind.CANCEL)] == ["b"]


def test_a_removed_node_gets_no_more_chunks() -> None:
    to = waiting("job-0")
    join(to, "b")
    assert Unload("a", ref("job-0")) in to.on_remove("a", "nobody wants it")


def test_a_lost_node_is_removed_without_a_word() -> None:
    to = cluster(1, 1)
    lose(to, "a", "gone")
    assert to.on_remove("a", "nobody wants it") == []
    assert list(to.nodes) == ["b"]


def test_a_node_that_is_starting_can_be_removed() -> None:
    to = cluster(1)
    to.add_node("b", "host-b", 1)
    assert [send.node for send in sends(to.on_remove("b", "nobody wants it"), Kind.BYE)] == ["b"]


def test_a_round_that_waited_for_a_node_that_is_removed_ends() -> None:
    to = cluster(1)
    lose(to, "a", "gone")
    to.add_node("b", "host-b", 1)
    assert submit(to, 1, spec(1)) == []
    assert failure(to.on_remove("b", "nobody wants it")) == Failure("unreachable", "host-a: gone")


def test_the_slices_of_a_removed_node_have_a_new_home_in_proportion() -> None:
    to = cluster(1, 1, 2)
    submit(to, 1, spec(12))
    to.on_cancel(1, CANCELLED)
    to.on_remove("a", "nobody wants it")
    placed = shares(submit(to, 2, spec(12)))
    assert {name: len(indices) for name, indices in placed.items()} == {"b": 4, "c": 8}
    assert {3, 4, 5} <= set(placed["b"])
    assert {6, 7, 8, 9, 10, 11} <= set(placed["c"])
