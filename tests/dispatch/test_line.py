"""Rounds that wait for their turn: which begin when, and what waiting costs."""

from __future__ import annotations

import pytest
from test_dispatcher import CANCELLED, cluster, failure, lose, result, sends, spec, submit

from bytecodes import counted
from qjam.dispatch import line
from qjam.dispatch.commands import Command, Done, Fail, Failure
from qjam.dispatch.dispatcher import Dispatch
from qjam_worker.wire.frames import Kind

GONE = Failure("cancelled", "the user has gone")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node has at most two rounds."""
    monkeypatch.setattr(line, "LEAST", 2)
    monkeypatch.setattr(line, "EACH", 0)


def begun(commands: list[Command]) -> list[int]:
    """The rounds of which nodes are given slices."""
    return [send.header["round"] for send in sends(commands, Kind.TASK)]


def four(to: Dispatch) -> list[int]:
    return [number for at in range(1, 5) for number in begun(submit(to, at, spec(1)))]


def test_a_node_has_so_many_rounds_for_each_worker_and_so_many_at_least() -> None:
    for workers, most in ((1, line.LEAST), (100, 100 * line.EACH)):
        to = cluster(workers)
        count = sum(len(begun(submit(to, number, spec(1)))) for number in range(1, most + 10))
        assert count == most


@pytest.mark.usefixtures("narrow")
def test_what_is_too_much_begins_in_its_order_as_others_end() -> None:
    to = cluster(1)
    assert four(to) == [1, 2]
    assert begun(result(to, "a", 2, (0, 1))) == [3]
    assert begun(to.on_cancel(1, CANCELLED)) == [4]
    assert set(to.rounds) == {3, 4}


@pytest.mark.usefixtures("narrow")
def test_a_round_that_has_not_begun_can_be_cancelled_and_its_time_can_be_up() -> None:
    to = cluster(1)
    four(to)
    assert to.on_cancel(3, GONE) == [Fail(3, GONE)]
    assert begun(result(to, "a", 1, (0, 1))) == [4]
    submit(to, 5, spec(1), deadline=7.0)
    found = failure(to.on_timer(7.0))
    assert (found.what, found.text) == ("timeout", "it has not begun")
    assert begun(result(to, "a", 2, (0, 1))) == []


@pytest.mark.usefixtures("narrow")
def test_where_the_first_one_is_cancelled_the_next_one_begins_if_its_node_has_room() -> None:
    to = cluster(1, 1)
    assert four(to) == [1, 2]  # which are at a
    to.on_cancel(4, CANCELLED)
    submit(to, 5, spec(1, "other"))
    data = to._line._waiting[5].data
    data.homes, data.placed_for = {0: "b"}, to._roster.membership
    assert begun(to.on_cancel(3, CANCELLED)) == [5]


@pytest.mark.usefixtures("narrow")
def test_the_data_of_a_round_that_has_not_begun_is_kept() -> None:
    to = cluster(1)
    four(to)
    last = spec(1, "other")
    submit(to, 5, last)
    assert last.lease is not None
    last.lease.held = False
    assert to.on_let_go(last.lease, True, 0.0) == []
    to.on_cancel(5, CANCELLED)
    assert len(to._holdings) == 1


@pytest.mark.usefixtures("narrow")
def test_no_round_overtakes_another_one_also_where_its_node_has_room() -> None:
    to = cluster(1, 1)
    for number in (1, 2):  # the first slice is at a
        submit(to, number, spec(1))
    assert begun(submit(to, 3, spec(2))) == []
    assert begun(submit(to, 4, spec(2))) == []
    assert begun(result(to, "a", 1, (0, 1))) == [3, 3]
    assert begun(result(to, "a", 2, (0, 1))) == [4, 4]


@pytest.mark.usefixtures("narrow")
def test_rounds_that_wait_for_a_first_node_begin_when_it_comes() -> None:
    to = Dispatch()
    to.add_node("b", "host-b", 1)
    assert four(to) == []
    to.on_hello("b", {"workers": 1, "credit": 100})
    assert begun(to.on_ready("b", [7])) == [1, 2]


@pytest.mark.usefixtures("narrow")
def test_where_nobody_is_left_all_that_wait_end() -> None:
    to = cluster(1)
    four(to)
    ended = [command for command in lose(to, "a", "gone") if isinstance(command, (Done, Fail))]
    assert sorted(end.round for end in ended) == [1, 2, 3, 4]


def bytecodes(outstanding: int) -> tuple[int, int]:
    """Of one more submit, and of a result after which another round begins."""
    to, data = cluster(2), spec(4)
    for number in range(1, outstanding):
        submit(to, number, data)
    with counted() as submitted:
        submit(to, outstanding, data)
    with counted() as answered:
        assert begun(result(to, "a", 1, (0, 4))) == [line.LEAST + 1]
    return submitted[0], answered[0]


def test_what_a_submit_and_a_result_cost_does_not_grow_with_what_is_outstanding() -> None:
    few, many = bytecodes(50), bytecodes(1000)
    assert many[0] < 1.1 * few[0], f"{few[0]} bytecodes of a submit with 50 outstanding, {many[0]} with 1000"
    assert many[1] < 1.1 * few[1], f"{few[1]} bytecodes of a result with 50 outstanding, {many[1]} with 1000"
