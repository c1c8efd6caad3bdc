"""The hosts of a master: started, started again in the background when they are lost, added and removed.

The methods that begin with `on_`, and what they call, run in the engine's loop; the others in the user's threads, which
ask the loop to change anything.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from qjam.dispatch.states import COMING, PRESENT, NodeState
from qjam.engine.engine import Engine
from qjam.errors import BootstrapError
from qjam.hosts import HostSpec
from qjam.log import say
from qjam.report import HostReport, failures, table
from qjam_worker.node.node import Node
from qjam_worker.node.options import NodeOptions

from .fleet import Fleet

# Seconds for a node to bring its workers up; numpy from a cold network disk can take half of it.
START_TIMEOUT = 60.0
# Seconds for a node to stop its workers, those in user code included, and to remove its files.
STOP_TIMEOUT = 5.0
# A lost host is started again after a pause (seconds) that doubles each time, so many times. One that has been there
# for STEADY seconds begins anew.
FIRST_PAUSE, MAX_PAUSE, RESTARTS, STEADY = 0.5, 60.0, 10, 10.0


@dataclass
class SupervisedHost:
    """One host for as long as it belongs to the master."""

    spec: HostSpec
    name: str  # of its node; another one each time that it is started
    starting: bool = True  # for the first time: somebody waits for it, and it is not started again
    restarts: int = 0
    ready_at: float | None = None
    lost_at: float | None = None

    @property
    def host(self) -> str:
        return self.spec.address


class Supervisor:
    """All hosts of one master."""

    def __init__(
        self, engine: Engine, fleet: Fleet, memory_limit: int | None = None, keep_data: int | None = None
    ) -> None:
        self._engine = engine
        self._fleet = fleet
        self._memory_limit = memory_limit
        self._keep_data = keep_data
        self._members: dict[str, SupervisedHost] = {}  # by the name of the node
        self.reports: list[HostReport] = []

    def __iter__(self) -> Iterator[SupervisedHost]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    @property
    def names(self) -> list[str]:
        """Of the nodes that there are now."""
        return list(self._members)

    # Starting

    def start(self, specs: list[HostSpec], min_workers: int | None) -> list[SupervisedHost]:
        """Start hosts and wait for them. Raises BootstrapError when one does not come, or with `min_workers`, when
        fewer workers come; then none of them stays.
        """
        began = time.monotonic()
        members = [SupervisedHost(spec, _name(spec)) for spec in specs]
        self._engine.ask(lambda: self._add(members))
        try:
            self._launch(members)
            reports = [self._started(member, began) for member in members]
            self._engine.ask(lambda: self._settle(members, reports))
            self.reports += reports
            self._check(members, reports, min_workers)
        except BaseException:
            self._let_go(members, "it is not waited for any longer")
            raise
        came = [member for member in members if not member.starting]
        self._let_go([member for member in members if member.starting], "it did not start")
        return came

    def _add(self, members: list[SupervisedHost]) -> None:
        for member in members:
            self._members[member.name] = member
            self._engine.add_node(member.name, member.host, member.spec.workers or 1, member.spec.workers)

    def _launch(self, members: list[SupervisedHost]) -> None:
        remote = {}
        for member in members:
            if member.spec.local:
                self._engine.add_local(member.name, partial(self._make_local, member.spec.workers or 1))
            else:
                remote[member.name] = (member.spec, self._engine.admit(member.name)._asdict())
        if remote:
            self._fleet.start(remote)

    def _make_local(self, workers: int, lane: Any, selector: Any) -> Node:
        options = NodeOptions(workers, self._memory_limit, self._keep_data)
        return Node(lane, options, selector=selector)

    def _started(self, member: SupervisedHost, began: float) -> HostReport:
        """How the start of a host went, once it is over."""
        name = member.name
        if member.spec.local:
            state, why = self._engine.wait_for_node(name, max(0.0, began + START_TIMEOUT - time.monotonic()))
            report, began_to_wait = HostReport(member.host, route="local"), began
        else:
            report = self._report(member)
            while True:
                state, why = self._engine.wait_for_node(name, 1.0)
                began_to_wait = self._fleet.welcomed(name) or time.monotonic()
                if state not in COMING or time.monotonic() > began_to_wait + START_TIMEOUT:
                    break
        if state is NodeState.READY:
            # The fleet may hear of the welcome later than the engine does of the node.
            report.phases["ready"] = max(0.0, self._engine.ready_at(name) - began_to_wait)
        elif report.failed is None:
            report.failed = "ready"
            report.why = why or f"not ready after {START_TIMEOUT:.0f} s (it is {state.value})"
        return report

    def _settle(self, members: list[SupervisedHost], reports: list[HostReport]) -> None:
        """In the engine's loop: from now on the hosts that have come are started again when they are lost."""
        for member, report in zip(members, reports, strict=True):
            record = self._engine.dispatch.nodes.get(member.name)
            if (record is None or record.state not in PRESENT) and report.failed is None:
                report.failed, report.why = "ready", "it was removed" if record is None else record.why
            member.starting = report.failed is not None

    def _check(self, members: list[SupervisedHost], reports: list[HostReport], min_workers: int | None) -> None:
        failed = failures(reports)
        if not failed:
            return
        nodes = self._engine.dispatch.nodes
        came = sum(nodes[member.name].workers for member in members if not member.starting)
        hosts = f"{len(failed)} of {len(reports)} host{'' if len(reports) == 1 else 's'} did not start"
        if min_workers is not None and came >= min_workers:
            say(f"{hosts}; going on with {came} workers:\n{table(reports)}")
            return
        if len(reports) == 1:
            raise BootstrapError(_with_stderr(failed[0]), reports)
        lacking = "" if min_workers is None else f"; {came} workers came, min_workers is {min_workers}"
        raise BootstrapError(f"{hosts}{lacking}:\n{table(reports)}", reports)

    # Leaving

    def remove(self, members: list[SupervisedHost]) -> None:
        """Have hosts leave; their work goes to the others. Gives back when they have gone, or after some seconds."""
        self._let_go(members, "its host was removed")

    def _let_go(self, members: list[SupervisedHost], why: str) -> None:
        names = self._engine.ask(lambda: [self._take_out(member, why) for member in members])
        deadline = time.monotonic() + STOP_TIMEOUT
        for name in names:
            self._engine.wait_for_bye(name, max(0.0, deadline - time.monotonic()))
            self._fleet.let_go(name)
            self._fleet.forget(name)
            self._engine.forget(name)

    def _take_out(self, member: SupervisedHost, why: str) -> str:
        self._members.pop(member.name, None)
        self._engine.remove_node(member.name, why)
        return member.name

    def route(self, member: SupervisedHost) -> str:
        """How the host reaches this machine; empty where it is not known yet."""
        if member.spec.local:
            return "local"
        return self._report(member).route

    def _report(self, member: SupervisedHost) -> HostReport:
        """How the start of an ssh host goes; an empty report where it has been removed meanwhile."""
        try:
            return self._fleet.report(member.name)
        except KeyError:
            return HostReport(member.host)

    # What the engine tells

    def on_ready(self, name: str) -> None:
        """A node has all its workers."""
        member = self._members.get(name)
        if member is None:
            return
        member.ready_at = now = time.monotonic()
        if member.lost_at is not None:
            workers = self._engine.dispatch.nodes[name].workers
            say(f"{member.host} is back after {now - member.lost_at:.1f} s, with {workers} workers")
            member.lost_at = None

    def on_lost(self, name: str, why: str) -> None:
        """A node is lost: its host gets another one, after a pause, unless it has been lost too often."""
        self._fleet.let_go(name)
        member = self._members.get(name)
        if member is None or member.starting:
            return
        now = time.monotonic()
        if member.ready_at is not None and now - member.ready_at > STEADY:
            member.restarts = 0
        member.ready_at, member.lost_at = None, member.lost_at or now
        if member.restarts == RESTARTS:
            say(
                f"{member.host} is lost: {why}; its work goes to the others, and it is not started again "
                f"(after {RESTARTS} times)"
            )
            return
        pause = min(FIRST_PAUSE * 2**member.restarts, MAX_PAUSE)
        member.restarts += 1
        say(
            f"{member.host} is lost: {why}; its work goes to the others, and it is started again in {pause:.1f} s "
            f"({member.restarts} of {RESTARTS})"
        )
        self._fleet.forget(name)
        member.name = successor = _name(member.spec)
        self._members = {member.name: member for member in self._members.values()}  # in its old place
        self._engine.add_successor(name, successor)
        self._engine.call_later(pause, lambda: self._start_again(member, successor))

    def _start_again(self, member: SupervisedHost, name: str) -> None:
        if self._members.get(name) is member and not self._engine.leaving:
            self._launch([member])
            self._watch(member, name, time.monotonic())

    def _watch(self, member: SupervisedHost, name: str, began: float) -> None:
        """Give up a start that does not come to an end; those phases that go over ssh have limits of their own."""
        if self._members.get(name) is not member or member.ready_at is not None:
            return
        now = time.monotonic()
        since = began if member.spec.local else self._fleet.welcomed(name) or now
        if now > since + START_TIMEOUT:
            self._engine.lose_node(name, f"not ready after {START_TIMEOUT:.0f} s")
        else:
            self._engine.call_later(START_TIMEOUT / 10, lambda: self._watch(member, name, began))

    def on_note(self, text: str, level: int = logging.WARNING) -> None:
        """Something that the user may want to know."""
        say(text, level)


def _name(spec: HostSpec) -> str:
    return f"{spec.address}/{uuid.uuid4().hex}"


def _with_stderr(report: HostReport) -> str:
    return "\n".join([str(report), *(f"    | {line}" for line in report.stderr)])
