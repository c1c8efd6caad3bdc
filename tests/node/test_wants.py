"""Who waits for which refs on a node; and that nothing takes longer where many wait."""

from __future__ import annotations

import pytest
from test_scheduler import done, given, refs_of, task, with_ready

from bytecodes import counted
from qjam_worker.node.wants import Wants
from refs_as_text import ref

A, B = ref("a"), ref("b")


def test_who_comes_first_asks_and_all_are_told_when_it_arrives() -> None:
    wants: Wants[int] = Wants()
    assert [wants.want(A, 1), wants.want(A, 2), wants.want(B, 2), wants.want(A, 1)] == [True, False, True, False]
    assert wants.arrived(A) == [1, 2]
    assert list(wants) == [B]
    assert wants.arrived(A) == []


def test_what_is_gone_is_to_be_asked_for_again() -> None:
    wants: Wants[int] = Wants()
    wants.want(A, 1)
    assert wants.gone(A) == [1]
    assert A not in wants
    assert wants.want(A, 1)


def test_who_leaves_waits_for_nothing_and_what_nobody_waits_for_is_forgotten() -> None:
    wants: Wants[int] = Wants()
    for which, who in ((A, 1), (A, 2), (B, 1)):
        wants.want(which, who)
    wants.leave(1)
    wants.leave(3)
    assert list(wants) == [A]
    assert wants.arrived(A) == [2]
    assert len(wants) == 0


def bytecodes(outstanding: int, event: str) -> int:
    """Of one event on a node with so many rounds that wait, and one worker that is busy with the first of them."""
    to = with_ready(1)
    refs_of(to).here.update(["ref0"])
    task(to, 0, number=1)
    for number in range(2, outstanding):
        task(to, 0 if event != "arrival" else number, number=number, job=2, nslices=outstanding)
    with counted() as count:
        if event == "task":
            task(to, 0, number=outstanding, job=2, nslices=outstanding, now=1.0)
        elif event == "answer":
            assert given(done(to, 0, 1.0)) == {0: [0]}
        else:
            assert to.on_arrived(ref("ref2"), 1.0) == []
    return count[0]


@pytest.mark.parametrize("event", ["task", "answer", "arrival"])
def test_what_an_event_costs_does_not_grow_with_the_rounds_that_are_outstanding(event: str) -> None:
    few, many = bytecodes(20, event), bytecodes(500, event)
    assert many < 1.3 * few, f"{few} bytecodes with 20 rounds outstanding, {many} with 500"
