"""Starts the hosts of a master, restarts lost ones in the background, adds and removes hosts.

Methods that begin with `on_`, and what they call, run in the engine's loop. The others run in the user's threads; what
the loop uses they change through `Engine.ask`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qjam.dispatch.states import COMING, PRESENT, NodeState
from qjam.engine.engine import Engine
from qjam.errors import BootstrapError
from qjam.hosts import HASH_SEED, HostSpec
from qjam.log import say
from qjam.report import HostReport, failures, table
from qjam_worker.node.node import Node
from qjam_worker.node.options import NodeOptions

from .fleet import Fleet

# Seconds for a node to start its workers; to read numpy from a cold network disk can take half of it.
START_TIMEOUT = 60.0
# Seconds for a node to stop its workers, also those that run user code, and to remove its files.
STOP_TIMEOUT = 5.0
# A lost host is started again up to RESTARTS times, after pauses that double from FIRST_PAUSE to MAX_PAUSE seconds. A
# host that was ready for STEADY seconds starts from zero.
FIRST_PAUSE, MAX_PAUSE, RESTARTS, STEADY = 0.5, 60.0, 10, 10.0


@dataclass
class SupervisedHost:
    """One host of the master."""

    spec: HostSpec
    node_name: str  # each start of the host makes a node with a new name
    starting: bool = True  # its first start: a caller waits for it, and it is not restarted
    restarts: int = 0
    ready_at: float | None = None
    lost_at: float | None = None

    @property
    def address(self) -> str:
        return self.spec.address


class Supervisor:
    """All hosts of one master. Iterating over it yields them in the order in which they were added."""

    def __init__(
        self, engine: Engine, fleet: Fleet, memory_limit: int | None = None, keep_data: int | None = None
    ) -> None:
        self._engine = engine
        self._fleet = fleet
        self._memory_limit = memory_limit
        self._keep_data = keep_data
        # One for all workers, those of later hosts too: a set has the same order on all of them.
        self._hash_seed = os.environ.get(HASH_SEED) or str(secrets.randbelow(2**32))
        self._hosts: dict[str, SupervisedHost] = {}  # by node name
        self.reports: list[HostReport] = []  # of all first starts, also of those that failed

    def __iter__(self) -> Iterator[SupervisedHost]:
        return iter(list(self._hosts.values()))

    def __len__(self) -> int:
        return len(self._hosts)

    @property
    def node_names(self) -> list[str]:
        """The names of the present nodes."""
        return list(self._hosts)

    # Starting

    def start(self, specs: list[HostSpec], min_workers: int | None) -> list[SupervisedHost]:
        """Start hosts, wait for them and return those that are ready.

        Raises BootstrapError if one does not start; with `min_workers`, if fewer workers start. Then all of them are
        removed again.
        """
        began = time.monotonic()
        hosts = [SupervisedHost(spec, _new_name(spec)) for spec in specs]
        self._engine.ask(lambda: self._add(hosts))
        try:
            self._launch(hosts)
            reports = [self._wait_for_start(host, began) for host in hosts]
            self._engine.ask(lambda: self._end_start(hosts, reports))
            self.reports += reports
            self._check_enough(hosts, reports, min_workers)
        except BaseException:
            self._remove(hosts, "nobody waits for it any more")
            raise
        started = [host for host in hosts if not host.starting]
        self._remove([host for host in hosts if host.starting], "it did not start")
        return started

    def _add(self, hosts: list[SupervisedHost]) -> None:
        for host in hosts:
            self._hosts[host.node_name] = host
            self._engine.add_node(host.node_name, host.address, host.spec.workers or 1, host.spec.workers)

    def _launch(self, hosts: list[SupervisedHost]) -> None:
        remote = {}
        for host in hosts:
            if host.spec.local:
                self._engine.add_local(host.node_name, partial(self._make_local, host.spec.workers or 1))
            else:
                spec = replace(host.spec, env={HASH_SEED: self._hash_seed, **(host.spec.env or {})})
                remote[host.node_name] = (spec, self._engine.admit(host.node_name)._asdict())
        if remote:
            self._fleet.start(remote)

    def _make_local(self, workers: int, lane: Any, selector: Any) -> Node:
        environment = {HASH_SEED: self._hash_seed}
        options = NodeOptions(workers, self._memory_limit, self._keep_data, here=True, environment=environment)
        return Node(lane, options, selector=selector)

    def _wait_for_start(self, host: SupervisedHost, began: float) -> HostReport:
        """Wait until the host is ready or has failed, and return its report."""
        name = host.node_name
        if host.spec.local:
            state, why = self._engine.wait_for_node(name, max(0.0, began + START_TIMEOUT - time.monotonic()))
            report, ready_began = HostReport(host.address, route="local"), began
        else:
            report = self._report(host)
            while True:
                state, why = self._engine.wait_for_node(name, 1.0)
                ready_began = self._fleet.welcomed_at(name) or time.monotonic()
                if state not in COMING or time.monotonic() > ready_began + START_TIMEOUT:
                    break
        if state is NodeState.READY:
            # max: the engine may receive READY before the fleet learns that the node was welcomed.
            report.phases["ready"] = max(0.0, self._engine.ready_at(name) - ready_began)
        elif report.failed is None:
            report.failed = "ready"
            report.why = why or f"not ready after {START_TIMEOUT:.0f} s (it is {state.value})"
        return report

    def _end_start(self, hosts: list[SupervisedHost], reports: list[HostReport]) -> None:
        """From now on the hosts that are ready are restarted if they are lost. Runs in the engine's loop."""
        for host, report in zip(hosts, reports, strict=True):
            record = self._engine.dispatch.nodes.get(host.node_name)
            if (record is None or record.state not in PRESENT) and report.failed is None:
                report.failed, report.why = "ready", "it was removed" if record is None else record.why
            host.starting = report.failed is not None

    def _check_enough(self, hosts: list[SupervisedHost], reports: list[HostReport], min_workers: int | None) -> None:
        failed = failures(reports)
        if not failed:
            return
        nodes = self._engine.dispatch.nodes
        workers = sum(nodes[host.node_name].workers for host in hosts if not host.starting)
        summary = f"{len(failed)} of {len(reports)} host{'' if len(reports) == 1 else 's'} did not start"
        if min_workers is not None and workers >= min_workers:
            say(f"{summary}; going on with {workers} workers:\n{table(reports)}")
            return
        if len(reports) == 1:
            raise BootstrapError(_with_stderr(failed[0]), reports)
        too_few = "" if min_workers is None else f"; {workers} workers started, min_workers is {min_workers}"
        raise BootstrapError(f"{summary}{too_few}:\n{table(reports)}", reports)

    # Removing

    def remove(self, hosts: list[SupervisedHost]) -> None:
        """Remove hosts; the others do their work. Returns when their nodes have ended, or after STOP_TIMEOUT."""
        self._remove(hosts, "its host was removed")

    def _remove(self, hosts: list[SupervisedHost], why: str) -> None:
        names = self._engine.ask(lambda: [self._end_node(host, why) for host in hosts])
        deadline = time.monotonic() + STOP_TIMEOUT
        for name in names:
            self._engine.wait_for_bye(name, max(0.0, deadline - time.monotonic()))
            self._fleet.disconnect(name)
            self._fleet.forget(name)
            self._engine.forget(name)

    def _end_node(self, host: SupervisedHost, why: str) -> str:
        self._hosts.pop(host.node_name, None)
        self._engine.remove_node(host.node_name, why)
        return host.node_name

    def route(self, host: SupervisedHost) -> str:
        """How the host reaches this machine: local, direct, tunnel or stdio; empty if that is not known yet."""
        if host.spec.local:
            return "local"
        return self._report(host).route

    def _report(self, host: SupervisedHost) -> HostReport:
        """The report of an ssh host's latest start; an empty one if the host has been removed."""
        try:
            return self._fleet.report(host.node_name)
        except KeyError:
            return HostReport(host.address)

    # Called by the engine (NodeObserver)

    def on_ready(self, name: str) -> None:
        """All workers of a node run."""
        host = self._hosts.get(name)
        if host is None:
            return
        host.ready_at = now = time.monotonic()
        if host.lost_at is not None:
            workers = self._engine.dispatch.nodes[name].workers
            say(f"{host.address} is back after {now - host.lost_at:.1f} s, with {workers} workers")
            host.lost_at = None

    def on_lost(self, name: str, why: str) -> None:
        """A node is lost: start another one on its host after a pause, unless the host was lost too often."""
        self._fleet.disconnect(name)
        host = self._hosts.get(name)
        if host is None or host.starting:
            return
        now = time.monotonic()
        if host.ready_at is not None and now - host.ready_at > STEADY:
            host.restarts = 0
        host.ready_at, host.lost_at = None, host.lost_at or now
        if host.restarts == RESTARTS:
            say(
                f"{host.address} is lost: {why}; its work goes to the others, and it is not started again "
                f"(after {RESTARTS} times)"
            )
            return
        pause = min(FIRST_PAUSE * 2**host.restarts, MAX_PAUSE)
        host.restarts += 1
        say(
            f"{host.address} is lost: {why}; its work goes to the others, and it is started again in {pause:.1f} s "
            f"({host.restarts} of {RESTARTS})"
        )
        self._fleet.forget(name)
        host.node_name = successor = _new_name(host.spec)
        self._hosts = {each.node_name: each for each in self._hosts.values()}  # in the same order
        self._engine.add_successor(name, successor)
        self._engine.call_later(pause, lambda: self._restart(host, successor))

    def _restart(self, host: SupervisedHost, name: str) -> None:
        if self._hosts.get(name) is host and not self._engine.leaving:
            self._launch([host])
            self._watch(host, name, time.monotonic())

    def _watch(self, host: SupervisedHost, name: str, began: float) -> None:
        """Give up a restart if the workers do not start in time. The fleet limits the phases before that."""
        if self._hosts.get(name) is not host or host.ready_at is not None:
            return
        now = time.monotonic()
        since = began if host.spec.local else self._fleet.welcomed_at(name) or now
        if now > since + START_TIMEOUT:
            self._engine.lose_node(name, f"not ready after {START_TIMEOUT:.0f} s")
        else:
            self._engine.call_later(START_TIMEOUT / 10, lambda: self._watch(host, name, began))

    def on_note(self, text: str, level: int = logging.WARNING) -> None:
        """Log a message for the user."""
        say(text, level)


def _new_name(spec: HostSpec) -> str:
    return f"{spec.address}/{uuid.uuid4().hex}"


def _with_stderr(report: HostReport) -> str:
    return "\n".join([str(report), *(f"    | {line}" for line in report.stderr)])
