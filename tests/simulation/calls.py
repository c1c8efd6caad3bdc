"""The users who submit calls, what these do, and what has become of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from qjam.dispatch.call import Call, Function
from qjam.dispatch.calls import POISON
from qjam.dispatch.commands import Ended, Failure, Send
from qjam.dispatch.states import COMING, PRESENT
from qjam_worker.values.outcomes import BROKEN, LOST, RAISED, STOPPED, VALUE

from .plans import CallsPlan
from .world import Broken

if TYPE_CHECKING:
    from .cluster import Cluster
    from .node import Node, Worker


def is_given_up(node: Node) -> bool:
    """Whether the master counts on a node no more, which has not heard that perhaps."""
    record = node.cluster.master.dispatch.nodes.get(node.name)
    return record is None or record.state not in PRESENT


class Begin:
    """Somebody has begun a call."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.life, self.at = worker, worker.life, worker.node.world.now
        self.written = False  # whether what it came to can be read by the node

    def may_be_lost(self) -> bool:
        """Whether there is a reason to begin it again."""
        node = self.worker.node
        gone = not node.alive or node.link.broken or node.leaving or is_given_up(node)
        died = self.worker.life != self.life and not self.written
        return gone or died


class CallRun:
    """One call: what its user code does, and what has become of it."""

    def __init__(self, callers: Callers, number: int, plan: CallsPlan, position: int, function: Function) -> None:
        self.cluster = callers.cluster
        self.number, self.plan, self.position = number, plan, position
        size = int(plan.size * 2 * self.cluster.noise(20, number))
        self.call = Call(plan.submitter, function, f"arguments {number}".encode().ljust(size, b"."), self)
        self.value = f"value {number}".encode()
        self.seconds = plan.seconds * (0.5 + self.cluster.noise(21, number))
        self.raises = position in plan.raises
        self.stubborn = position in plan.stubborn
        self.began = self.cluster.now
        self.begins: list[Begin] = []
        self.tries: Counter[str] = Counter()
        self.deaths = 0  # of workers that ran it
        self.cancelled = False
        self.shared = False  # whether others may try it besides a silent node
        self.end: Any = None
        self.ended_at = 0.0

    def __repr__(self) -> str:
        return f"call {self.call.id}"

    def _first(self, what: str, planned: bool) -> bool:
        self.tries[what] += 1
        if planned and self.tries[what] == 1:
            self.cluster.disturb(f"call {what}")
            return True
        return False

    def how_it_ends(self, when: str) -> bool:
        """Whether it ends its worker now."""
        times, at = self.plan.kills.get(self.position, (0, ""))
        if at != when:
            return False
        self.tries["kills"] += 1
        if self.tries["kills"] > times:
            return False
        self.cluster.disturb(f"call ends its worker: {when}")
        return True

    def is_fit(self) -> bool:
        return not self._first("finds an unfit process", self.position in self.plan.unfit)

    def hangs(self) -> bool:
        return self._first("hangs", self.position in self.plan.hangs)

    def spoils(self) -> bool:
        return self._first("spoils a ring", self.position in self.plan.spoils)

    def pause(self) -> float:
        """Seconds between taking it and saying so."""
        seconds = self.plan.pauses.get(self.position, 0.0)
        return seconds if self._first("is named late", seconds > 0.0) else 0.0

    def begin(self, worker: Worker) -> None:
        if not (self.call.over or self.shared or is_given_up(worker.node)):
            for begin in self.begins:
                if not begin.may_be_lost():
                    raise Broken(f"{self} begins on {worker.node.name}, and {begin.worker.node.name} has begun it")
        self.begins.append(Begin(worker))

    def written(self, worker: Worker) -> None:
        for begin in self.begins:
            if begin.worker is worker and begin.life == worker.life:
                begin.written = True

    def unread(self) -> None:
        """What it came to is spoilt."""
        for begin in self.begins:
            begin.written = False


class Callers:
    """All users who submit calls."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.runs: list[CallRun] = []
        self.by_id: dict[int, CallRun] = {}
        self.functions: dict[tuple[int, int], Function] = {}
        self.longest = 0.0  # seconds that one call takes
        self._made = 0

    # What users do

    def submit(self, plan: CallsPlan) -> list[CallRun]:
        cluster, key = self.cluster, (plan.submitter, plan.function)
        function = self.functions.get(key)
        if function is None:
            self._made += 1
            function = self.functions[key] = Function(self._made, f"function {self._made}".encode())
        first = len(self.runs) + 1
        runs = [CallRun(self, first + at, plan, at, function) for at in range(plan.count)]
        self.runs += runs
        self.longest = max([self.longest, *(run.seconds for run in runs)])
        if cluster.trace is not None:
            cluster.say("user", f"submits {plan.count} calls of function {function.number}: {plan}")
        cluster.at(cluster.now, cluster.master, cluster.master.submit_calls, runs)
        for seconds in sorted(set(plan.cancels.values())):
            some = [run for run in runs if plan.cancels.get(run.position) == seconds]
            cluster.at(cluster.now + seconds, None, self._cancel, some)
        if plan.forget is not None:
            cluster.at(cluster.now + plan.forget, None, self._forget, key, function)
        return runs

    def _cancel(self, runs: list[CallRun]) -> None:
        runs = [run for run in runs if run.end is None]
        if not runs:
            return
        self.cluster.say("user", f"cancels {runs}")
        self.cluster.counts["fault: calls are cancelled"] += len(runs)
        for run in runs:
            run.cancelled = True
        self.cluster.at(self.cluster.now, self.cluster.master, self.cluster.master.cancel_calls, runs)

    def _forget(self, key: tuple[int, int], function: Function) -> None:
        if self.functions.get(key) is function:
            del self.functions[key]
            self.cluster.say("user", f"needs function {function.number} no more")
            self.cluster.counts["functions are forgotten"] += 1
            self.cluster.at(self.cluster.now, self.cluster.master, self.cluster.master.forget_function, function)

    # What the master says

    def on_ended(self, ended: Ended) -> None:
        for call in ended.begun:
            if not call.future.begins:
                raise Broken(f"{call} has begun, says the master, and nobody has begun it")
        for returned in ended.returned:
            self._on_end(returned.call, returned.how)
            self._check(returned.call.future, returned.how, returned.data)
        for call, failure in ended.failed:
            self._on_end(call, failure)
            self._check_failure(failure)

    def _on_end(self, call: Call, how: Any) -> None:
        run = call.future
        if run.end is not None:
            raise Broken(f"{run} ends twice")
        run.end, run.ended_at = how, self.cluster.now
        what = how.what if isinstance(how, Failure) else ("value", "raised", "stopped", "broken", "lost")[how]
        self.cluster.counts[f"outcome: call {what}"] += 1
        if self.cluster.trace is not None:
            self.cluster.say("master", f"{run} has ended: {what}")

    def _check(self, run: CallRun, how: int, data: Any) -> None:
        reasons = {
            VALUE: bool(run.begins) and b"".join(data) == run.value,
            RAISED: (run.raises and bool(run.begins)) or self.cluster.no_room,
            STOPPED: run.cancelled,
            BROKEN: False,
            LOST: run.deaths >= POISON,
        }
        if not reasons[how]:
            raise Broken(f"{run} has ended for no reason: {how} {data}")

    def _check_failure(self, failure: Failure) -> None:
        master = self.cluster.master
        there = any(node.state in PRESENT | COMING for node in master.dispatch.nodes.values())
        if not {"unreachable": not there, "closed": master.leaving}[failure.what]:
            raise Broken(f"calls have failed for no reason: {failure}")

    # Checks

    def check_sent(self, sent: list[Send]) -> None:
        """What a submitter submitted first is given out first, and submitters take turns."""
        for command in sent:
            self._check_turns(command.node, [self.by_id[number].call for number in command.header["ids"]])

    def _check_turns(self, name: str, given: list[Call]) -> None:
        calls = self.cluster.master.dispatch.calls
        turns = Counter(call.submitter for call in given)
        for submitter, queue in calls._queues.items():
            left = [call for call in queue if not call.over and name not in call.nodes]
            latest = max((call.id for call in given if call.submitter == submitter), default=0)
            early = [call for call in left if call.id < latest]
            if early:
                raise Broken(f"{name} gets call {latest}, and of the same submitter wait {early}")
            if left and len(left) == len(queue) and turns and turns[submitter] < max(turns.values()) - 1:
                raise Broken(f"{name} gets calls of {turns}, and submitter {submitter} has some too")


def at_node(node: Node) -> list[int]:
    """The calls that are on their way to a node, there, or on their way back."""
    down = [number for m in node.link.down.under_way if m.kind.name == "CALLS" for number in m.header["ids"]]
    up = [number for m in node.link.up.under_way if m.kind.name == "RETURNS" for number in m.header["ids"]]
    desk = node.calls.desk
    return sorted([*down, *(desk._given if desk is not None else ()), *up])
