"""Which data nodes are told to remove, and when."""

from __future__ import annotations

import pytest

from qjam.data.file_slices import InFile
from qjam.data.leases import Lease
from qjam.dispatch.commands import Send
from qjam.dispatch.data import Data
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.holdings import GRACE, MOST, MOST_BYTES, Holdings
from qjam.dispatch.jobs import Jobs, JobSpec
from qjam.dispatch.line import CODE_KEPT
from qjam.dispatch.rounds import RoundSpec
from qjam_worker.wire.frames import Kind


def used(holdings: Holdings, lease: Lease, now: float = 0.0) -> list[Data]:
    """What goes when a round with this data begins and ends."""
    return holdings.end(holdings.begin(lease), now)


def unheld(number: int, nbytes: int = 1) -> Lease:
    return Lease((f"ref{number}",), nbytes, held=False)


def test_data_that_is_held_stays() -> None:
    holdings, lease = Holdings(), Lease(("a", "b"), 10)
    assert used(holdings, lease) == []
    assert holdings.timers.first is None
    assert len(holdings) == 1


def test_data_that_nobody_holds_goes_after_its_grace_and_stays_when_it_is_used_again() -> None:
    holdings = Holdings()
    assert used(holdings, unheld(1), 100.0) == []
    assert holdings.timers.first == 100.0 + GRACE
    assert used(holdings, unheld(1), 103.0) == []
    assert holdings.due(100.0 + GRACE) == []
    assert [data.refs for data in holdings.due(103.0 + GRACE)] == [("ref1",)]
    assert len(holdings) == 0


def test_at_most_so_much_of_what_nobody_holds_stays_and_always_the_last() -> None:
    holdings = Holdings()
    for number in range(MOST):
        assert used(holdings, unheld(number)) == []
    assert [data.refs for data in used(holdings, unheld(99))] == [("ref0",)]
    gone = used(holdings, unheld(100, 2 * MOST_BYTES))
    assert [data.refs for data in gone] == [("ref1",)]
    gone = used(holdings, unheld(101))
    assert gone[-1].refs == ("ref100",)
    assert len(holdings) == 1


def test_what_is_let_go_goes_when_its_last_round_is_over() -> None:
    for at_once in (True, False):
        holdings, lease = Holdings(), Lease(("a",), 10)
        data = holdings.begin(lease)
        lease.held = False
        assert holdings.let_go(lease, at_once, 0.0) == []
        assert holdings.end(data, 1.0) == ([data] if at_once else [])
        assert holdings.timers.first == (None if at_once else 1.0 + GRACE)


def test_another_who_holds_the_same_keeps_it() -> None:
    holdings, one, other = Holdings(), Lease(("a",), 10), Lease(("a",), 10)
    for lease in (one, other, one):
        used(holdings, lease)
    one.held = False
    assert holdings.let_go(one, True, 0.0) == []
    other.held = False
    assert len(holdings.let_go(other, True, 0.0)) == 1
    assert holdings.let_go(other, True, 0.0) == []  # it has gone already


def test_who_lets_go_before_the_round_begins_holds_nothing() -> None:
    holdings, lease = Holdings(), Lease(("a",), 10)
    lease.held = False
    assert holdings.let_go(lease, True, 0.0) == []
    used(holdings, lease, 1.0)
    assert holdings.timers.first == 1.0 + GRACE


def test_only_the_nodes_that_know_of_the_data_are_told() -> None:
    to = Dispatch()
    for name in "ab":
        to.add_node(name, f"host-{name}", 1)
        to.on_hello(name, {"workers": 1, "credit": 100})
        to.on_ready(name, [1])
    entry = {"reduce": False, "code": None, "epoch": 1}
    lease = Lease(("r",), 5)
    commands = to.on_submit(1, RoundSpec(JobSpec("job", entry), 1, lease), None, 0.0)
    (data,) = [command for command in commands if isinstance(command, Send) and command.kind is Kind.DATA]
    assert data.header["data"] == 1
    lease.held = False
    assert to.on_let_go(lease, True, 1.0) == []
    roots = {"round": 1, "roots": [[0, 1, 1]], "seconds": 0.1}
    done = to.on_result(data.node, roots, [b"header"])
    release = [command for command in done if isinstance(command, Send) and command.kind is Kind.RELEASE]
    assert release == [Send(data.node, Kind.RELEASE, {"data": [1], "forget": []})]
    assert list(to.nodes[data.node].jobs) == [1]  # its code is for any data


def test_data_that_goes_leaves_no_times_behind() -> None:
    jobs = Jobs()
    job = jobs.begin(JobSpec("job", {}))
    job.typical_seconds.update({1: 0.5, 2: 0.25})
    jobs.forget_times(1)
    assert job.typical_seconds == {2: 0.25}


def test_the_same_slices_are_one_data_and_lie_in_the_first_file_that_has_them() -> None:
    holdings, file = Holdings(), InFile("/file", b"", [], {})
    data = holdings.begin(unheld(1))
    assert data.file is None
    assert holdings.begin(unheld(1), file) is data
    assert data.file is file
    assert holdings.begin(unheld(1), InFile("/other", b"", [], {})).file is file


@pytest.mark.parametrize("size", [CODE_KEPT // 2 - 1, CODE_KEPT + 1])
def test_jobs_with_much_code_are_forgotten_before_others(size: int) -> None:
    jobs = Jobs()
    for number in range(4):
        spec = JobSpec(number, {"reduce": False}, code_bytes=size)
        job = jobs.begin(spec)
        list(jobs.forget(64, CODE_KEPT))
        jobs.end(job)
    assert len(jobs) == (2 if size < CODE_KEPT else 1)
