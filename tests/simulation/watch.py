"""What always holds and takes longer to look at: seen now and then, or after each event to find out where it began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from qjam.dispatch.liveness import LOST_AFTER, SUSPECT_AFTER, SWEEP
from qjam.dispatch.rounds import Round
from qjam.dispatch.states import PRESENT, NodeState
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import Ref

from . import call_checks
from .node import CREDIT, Node
from .world import Broken, Process, hold

if TYPE_CHECKING:
    from .cluster import Cluster

# Virtual seconds between two looks; up to 20 when nothing is planned any more.
EVERY = 0.5
# How long a node may be idle while another has something for it, or silent while others could help: so many seconds
# and this part of the time that the round has taken, for a node looks less and less often.
PATIENCE, WAITING, SILENT = 3.0, 0.9, 0.2


class Since:
    """For how long something has been so, each time that one looked; what a master that is away sees does not count."""

    def __init__(self, master: Process) -> None:
        self._master = master
        self._at: dict[Hashable, float] = {}

    def look(self, things: Iterable[Hashable]) -> None:
        """These are so now, and no others."""
        self._at = {thing: self._at.get(thing, self._master.world.now) for thing in things}

    def age(self, thing: Hashable) -> float:
        now = self._master.world.now
        return now - max(self._at.get(thing, now), self._master.thawed_at)

    @property
    def oldest(self) -> float:
        return max(map(self.age, self._at), default=0.0)


class Watch:
    """Looks at a whole cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.dispatch = cluster.master.dispatch
        self.rounds = 0  # that there were at the same time
        self._suspected: set[str] = set()
        self._frozen, self._stealer, self._waiting, self._late, self._silent, self._alone = (
            Since(cluster.master) for _ in range(6)
        )
        self._starved, self._silent_calls, self._waiting_calls, self._no_calls = (
            Since(cluster.master) for _ in range(4)
        )

    def look(self) -> None:
        """Now, and again in a while."""
        cluster = self.cluster
        if not cluster.master.frozen:
            self.look_into_depth()
            self._look_for_idle_nodes()
            self._look_at_calls()
        beyond = cluster.now - cluster.plan.ends
        if (
            beyond < 1.0
            or any(run.end is None for run in cluster.runs.values())
            or not all(run.call.over for run in cluster.callers.runs)
        ):
            cluster.at(cluster.now + min(max(EVERY, beyond / 10.0), 20.0), None, self.look)

    def look_into_depth(self) -> None:
        """Somebody really is at each slice, or the end of those who were will be noticed."""
        cluster = self.cluster
        for round_ in self.dispatch.rounds.values():
            for index, owners in enumerate(round_.owners):
                if owners and not any(self._knows(cluster.nodes[name], round_.number, index) for name in owners):
                    raise Broken(f"slice {index} of round {round_.number} is forgotten by {owners}, which owe it")
        for node in cluster.nodes.values():
            if node.alive and not node.leaving and not node.link.broken:
                self._check_refs(node)
        call_checks.look(cluster)
        for run in cluster.runs.values():
            if run.end is None and run.plan.deadline is not None:
                due = run.began + run.plan.deadline
                hold(cluster.now < due + 1.0 or cluster.master.deferred, f"round {run.number} is over time")

    def check_suspicions(self) -> None:
        """Nobody is suspected who has not been silent."""
        now = self.cluster.now
        suspected = {node.name for node in self.dispatch.nodes.values() if node.state is NodeState.SUSPECT}
        for name in suspected - self._suspected:
            node = self.cluster.nodes[name]
            gone = node.frozen or not node.alive or node.link.broken or now - node.link.up_at < 1.0
            for call in self.dispatch.calls.at[name].calls.values() if name in self.dispatch.calls.at else ():
                call.future.shared = True
            hold(gone or now - node.thawed_at < 1.0, f"{name} is suspected of being lost, and it is well")
            self.cluster.counts["suspected"] += 1
        self._suspected = suspected

    # What is on its way

    def _knows(self, node: Node, number: int, index: int) -> bool:
        """Whether a node is at a slice that it owes, or will be, or has told what became of it."""
        if node.doomed:
            return True
        if not node.alive or node.link.broken:
            return False
        for kind, header, _ in node.link.down.under_way:
            if kind is Kind.TASK and header["round"] == number and index in header["indices"]:
                return True
        round_ = node.scheduler.rounds.get(number)
        if round_ is not None:
            spans = round_._spans
            if index in round_.owed or any(lo <= index < hi for lo, hi in spans):
                return True
        for kind, header, _ in node.link.up.under_way:
            if header.get("round") != number:
                continue
            if kind is Kind.ERROR or (kind is Kind.RESULT and any(r[0] <= index < r[1] for r in header["roots"])):
                return True
            if kind is Kind.STATE and index in [*header.get("slices", ()), *header.get("indices", ())]:
                return True
        return False

    def _check_refs(self, node: Node) -> None:
        """What a node waits for is on its way, no byte of credit is lost, and jobs are forgotten."""
        record = self.dispatch.nodes.get(node.name)
        if record is None or record.state not in PRESENT:
            return
        down, up = node.link.down.under_way, node.link.up.under_way
        chunks = [m for m in down if m.kind is Kind.REFS]
        credit = sum(m.header["bytes"] for m in up if m.kind is Kind.CREDIT)
        credit += sum(m.buffers[0] for m in chunks if not m.header.get("gone"))
        hold(credit + record.credit == CREDIT, f"credit of {node.name} is lost: {credit} + {record.credit}")
        missing = {ref for round_ in node.scheduler.rounds.values() for ref in round_.missing}
        coming = {transfer.ref for transfer in record.transfers}.union(Ref(*m.header["ref"]) for m in chunks)
        for m in up:
            if m.kind is Kind.GET:
                coming |= {Ref(*ref) for ref, *_ in m.header["refs"]}
        hold(missing <= coming, f"{node.name} waits for what does not come:", missing - coming)
        known = record.jobs.keys() | {*record.forget}
        told = [m for m in down if m.kind in (Kind.JOB, Kind.DATA, Kind.RELEASE)]
        known.update(job for m in told for job in (*m.header["forget"], m.header.get("job", 0)))
        hold(node.scheduler.jobs.keys() <= known, f"{node.name} keeps jobs for ever:", node.scheduler.jobs)

    # Who could help

    def _look_for_idle_nodes(self) -> None:
        nodes = [self.cluster.nodes[name] for name in self.dispatch.nodes if name in self.cluster.nodes]
        well = [node for node in nodes if self._is_well(node)]
        self._frozen.look(node.name for node in nodes if node.frozen and self._owes(node))
        hold(self._frozen.oldest < LOST_AFTER + 3.0 * SWEEP + 20.0, "rounds wait for nodes that are as good as lost")
        self._alone.look(late for node in well for late in self._late_beside_idle_workers(node))
        hold(self._alone.oldest < 2.5, "workers are idle and do not try what others of their node are late with")
        rounds = [round_ for round_ in self.dispatch.rounds.values() if round_.data.refs]
        self._stealer.look(node.name for node in well if self._is_idle(node))
        self._waiting.look((n.name, r.number) for r in rounds for n in well if self._has_waiting(n, r))
        if self.cluster.plan.speculation:
            self._late.look((n.name, r.number, index) for r in rounds for n in well for index in self._late_with(n, r))
            silent = [node for node in nodes if self._is_silent(node)]
            self._silent.look((n.name, r.number, index) for r in rounds for n in silent for index in r.single(n.name))
        for round_ in rounds:
            self._check_help(round_, [node.name for node in nodes])

    def _look_at_calls(self) -> None:
        cluster, calls, now = self.cluster, self.dispatch.calls, self.cluster.now
        nodes = [cluster.nodes[name] for name in self.dispatch.nodes if name in cluster.nodes]
        well = [node for node in nodes if self._is_well(node)]
        # Rounds and calls take turns.
        wait = [(node, "calls", node.calls.taken_at) for node in well if node.calls.desk and node.calls.desk.waiting]
        wait += [(node, "rounds", node.given_at) for node in well if self._has_work(node)]
        self._starved.look((node.name, what) for node, what, _ in wait)
        for node, what, last in wait:
            since = min(self._starved.age((node.name, what)), now - max(last, node.thawed_at))
            hold(since < 3.0 * node.longest + 1.0, f"{what} wait on {node.name}, and nobody takes any for {since} s")
        # Others do what silent nodes have, and what waits elsewhere.
        silent = [node for node in nodes if self._is_silent(node) and node.name in calls.at]
        queued = {call.id for queue in calls._queues.values() for call in queue}
        alone = [
            (node.name, call.id)
            for node in silent
            for call in calls.at[node.name].calls.values()
            if call.nodes == (node.name,) and call.id not in queued and not call.over
            if self.dispatch._roster.ready  # else there is nobody else
        ]
        self._silent_calls.look(alone)
        hold(
            self._silent_calls.oldest < SUSPECT_AFTER + 4.0 * SWEEP,
            "nobody else does the calls of a silent node:",
            alone,
        )
        idle = [n.name for n in well if self._is_idle(n) and not (n.name in calls.at and calls.at[n.name].calls)]
        rich = [n.name for n in well if n.name in calls.at and len(calls.at[n.name].calls) > len(n.workers)]
        self._no_calls.look(idle)
        self._waiting_calls.look(rich)
        age = min(self._no_calls.oldest, self._waiting_calls.oldest)
        hold(
            age < 3.0 + 2.0 * max((node.longest for node in well), default=0.0),
            f"{idle} are idle, and {rich} have calls that wait",
        )

    def _has_work(self, node: Node) -> bool:
        return any(round_.has_work and not round_.lacking for round_ in node.scheduler.rounds.values())

    def _check_help(self, round_: Round, names: list[str]) -> None:
        idle, number = self._stealer.oldest, round_.number
        took = self.cluster.now - round_.began
        waiting, silent = PATIENCE + WAITING * took, PATIENCE + SILENT * took
        if idle < silent:
            return
        for name in names:
            if idle > waiting and self._waiting.age((name, number)) > waiting:
                raise Broken(f"nodes are idle, and slices of round {number} wait on {name}")
            for index in round_.debts.get(name, ()):
                if self._silent.age((name, number, index)) > silent:
                    raise Broken(f"nobody else tries slice {index} of round {number} of silent {name}")
                if idle > waiting and self._late.age((name, number, index)) > waiting:
                    raise Broken(f"nobody else tries slice {index} of round {number}, with which {name} is late")

    def _has_waiting(self, node: Node, round_: Round) -> bool:
        """Whether a node has slices that wait for its workers, and that nobody else has."""
        here = node.scheduler.rounds.get(round_.number)
        return here is not None and not here.lacking and not set(here.ready).isdisjoint(round_.single(node.name))

    def _late_with(self, node: Node, round_: Round) -> list[int]:
        """Slices that one worker takes much longer with than is usual."""
        here, usual, now = node.scheduler.rounds.get(round_.number), round_.typical_slice_seconds, self.cluster.now
        if here is None or not usual:
            return []
        tried = Counter(index for work in here.works.values() for index in work.slices)
        late = [w.slices for w in here.works.values() if w.began + 4.0 * usual * len(w.slices) < now]
        alone = here.owed.intersection(round_.single(node.name))
        return [index for slices in late for index in slices if tried[index] == 1 and index in alone]

    def _late_beside_idle_workers(self, node: Node) -> list[tuple[str, int, int]]:
        """What a worker is late with, by the measure of its node, while another worker there is idle."""
        scheduler, now = node.scheduler, self.cluster.now
        if not scheduler.speculation or all(seat.busy or not seat.ready for seat in scheduler.seats):
            return []
        late = []
        for round_ in scheduler.rounds.values():
            if not round_.mapped or not round_.has_data:
                continue
            usual = round_.seconds / round_.mapped
            tried = Counter(index for work in round_.works.values() for index in work.slices)
            for work in round_.works.values():
                if work.fold is None and now > work.began + 0.1 + 2.0 * usual * len(work.slices):
                    alone = round_.owed.difference(round_._shared).intersection(work.slices)
                    late += [(node.name, round_.number, index) for index in alone if tried[index] == 1]
        return late

    def _owes(self, node: Node) -> bool:
        return any(round_.debts.get(node.name) for round_ in self.dispatch.rounds.values())

    def _is_silent(self, node: Node) -> bool:
        """Whether the master should have found out that nothing comes from a node."""
        link, since = node.link, self.cluster.now - SUSPECT_AFTER - 2.0 * SWEEP
        down = link.up_at > self.cluster.now and link.down_at < since
        return down or (node.frozen and node.frozen_at < since)

    def _is_well(self, node: Node) -> bool:
        if self.dispatch.nodes[node.name].state is not NodeState.READY or not node.alive:
            return False
        gone = node.frozen or node.leaving or node.link.broken or node.doomed
        return not gone and node.link.up_at <= self.cluster.now

    def _is_idle(self, node: Node) -> bool:
        if node.scheduler.rounds or node.link.down.under_way or self._owes(node):
            return False
        return not any(seat.busy or not seat.ready for seat in node.scheduler.seats)
