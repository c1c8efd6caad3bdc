"""Decides which node does which slice: events and `now` in, commands and the next deadline out. No I/O, no threads.

These rules hold for any events in any order: each slice counts once in a result; results are reduced along a fixed
tree over the slice indices; an exception of user code is an answer and ends its round; the slices of a lost worker or
node go to others; a slice that kills three workers ends its round; no round waits for a node that cannot come.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qjam.data.leases import Lease
from qjam_worker.values.codec import Encoded
from qjam_worker.wire.frames import Kind

from .assignment import announce_data, announce_job, shares, task
from .call import Call
from .calls import Calls
from .commands import Command, Done, Fail, Failure, Lost, Note, Send
from .data import Data, Share, share
from .holdings import Holdings
from .jobs import Job, Jobs
from .line import Line
from .liveness import Liveness
from .nodes import NodeRecord, Roster
from .rounds import Round, RoundSpec, note_attempts
from .serving import RefServer
from .states import DONE, SENT, NodeState
from .stealing import SEARCH_DELAY, Take, WorkStealer
from .timers import Timers
from .validation import check_given, check_roots, check_slices, check_worker

# A slice that has killed this many worker processes is at fault itself.
POISON = 3


class Dispatch:
    """The state of a master. Every `on_...` returns the commands that follow from the event.

    `on_heard`, `on_submit` and `on_timer` tell the time (`now`, seconds); every other event happens at the last of
    these. Call `on_heard` before the event that a message stands for. `speculation`: whether two workers may try the
    same slice at the same time. The cost of an event does not grow with the nodes that it does not concern:
    docs/scale.md has the figures.
    """

    def __init__(self, *, speculation: bool = True) -> None:
        self.rounds: dict[int, Round] = {}  # that have begun
        self.resent = 0
        self.speculation = speculation
        self._now = 0.0
        self._roster = Roster()
        self._jobs = Jobs()
        self._holdings = Holdings()
        self._line = Line(self._roster, self._jobs, self._holdings)
        self._beginning = False
        self._deadlines: Timers[int] = Timers()  # of rounds
        self.calls = Calls(self._roster, lambda: self._now)
        self._liveness = Liveness(self._roster, self.calls)
        self._stealer = WorkStealer(self._roster, self.rounds, speculation)
        self.refs = RefServer(self._roster, self.rounds, self._round_of, self._fail, self.on_node_lost)
        self._timers = (self._deadlines, self._stealer.timers, self._holdings.timers)

    def __repr__(self) -> str:
        nodes = ", ".join(f"{node.name} {node.state.value}" for node in self.nodes.values())
        return f"<Dispatch: {nodes}; {len(self.rounds)} rounds and {len(self._line)} that wait>"

    @property
    def nodes(self) -> dict[str, NodeRecord]:
        """All nodes by name, lost ones included."""
        return self._roster.nodes

    @property
    def capacity(self) -> int:
        """The number of workers that can be given work."""
        return self._roster.capacity

    def next_deadline(self) -> float | None:
        """When `on_timer` is due."""
        first = self._liveness.at
        for timers in self._timers:
            if timers and (at := timers.first) is not None and (first is None or at < first):
                first = at
        return first

    # Nodes

    def add_node(self, name: str, host: str, workers: int, asked: int | None = None) -> None:
        """Expect a node. `asked`: the number of workers that it must have; None: any."""
        self._roster.add(NodeRecord(name, host, workers, asked=asked))

    def on_hello(self, name: str, header: dict[str, Any]) -> list[Command]:
        """A node has connected."""
        node = self.nodes[name]
        if node.state is not NodeState.STARTING:
            raise ValueError(f"it says HELLO and is {node.state.value} already")
        count = header["workers"]
        if node.asked not in (None, count):
            raise ValueError(f"it has {count} workers; it was to have {node.asked}")
        node.workers = count
        self._roster.move(node, "hello")
        welcome = {"node": name, "host": node.host, "speculation": self.speculation}
        return [Send(name, Kind.WELCOME, welcome), *node.transfers.grant(header["credit"]), *self._begin_next()]

    def on_ready(self, name: str, pids: list[int]) -> list[Command]:
        """All workers of a node are up: it gets work of the rounds that wait for a node."""
        node = self.nodes[name]
        if node.state is not NodeState.JOINING:
            raise ValueError(f"it says that its workers are ready, and it is {node.state.value}")
        if len(pids) != node.workers:
            raise ValueError(f"{len(pids)} of its {node.workers} workers are ready")
        node.pids = list(pids)
        self._roster.move(node, "ready")
        self._stealer.search_in(name, self._now)
        self.calls.on_ready()
        return [*self.reassign(), *self.calls.fetch_for(name)]

    def on_heard(self, name: str, now: float) -> list[Command]:
        """A node has sent a message, whatever it says."""
        self._now = now
        node = self.nodes[name]
        silence, node.heard, node.pinged = now - node.heard, now, False
        if node.state is not NodeState.SUSPECT:
            return []
        self._roster.move(node, "heard")
        self._stealer.search_in(name, now)
        self.calls.on_ready()
        return [Note(f"{node.host} is heard again after {silence:.1f} s of silence"), *self.reassign()]

    def on_worker_replaced(self, name: str, worker: int, pid: int) -> list[Command]:
        """A new process replaces a worker that died."""
        node = self.nodes[name]
        if worker >= len(node.pids):
            raise ValueError(f"it has no worker {worker}")
        node.pids[worker], node.down = pid, max(0, node.down - 1)
        return [*self.calls.give_out(), *self.calls.fetch_for(name)]

    def on_node_lost(self, name: str, why: str) -> list[Command]:
        """A node is gone: what it owed is queued until `reassign`."""
        node = self.nodes.get(name)
        if node is None or node.state in (NodeState.LOST, NodeState.CLOSED):
            return []
        self._roster.move(node, "lost")
        node.why = why
        return [Lost(name, why), *self._let_go(node)]

    def reassign(self) -> list[Command]:
        """Give out the queued slices. To be called when `Lost` has been carried out: a round ends only where no node
        is left or expected, and a successor may have been added.
        """
        waiting = [round_ for round_ in self.rounds.values() if round_.queued]
        commands = [command for round_ in waiting for command in self._send_queued(round_)]
        return [*commands, *self._begin_next(), *self.calls.give_out()]

    def add_successor(self, lost: str, name: str) -> None:
        """Expect another node of the host of a lost one, in its place."""
        node = self.nodes.pop(lost)
        self.add_node(name, node.host, node.workers, node.asked)

    def on_remove(self, name: str, why: str) -> list[Command]:
        """The user removes this node's host."""
        node = self.nodes.pop(name)
        if node.state is NodeState.LOST:
            return []
        if node.state is NodeState.CLOSED:
            return [*self._let_go(node), *self.reassign()]
        self._roster.move(node, "close")
        return [Send(name, Kind.BYE, {"reason": why}), *self._let_go(node), *self.reassign()]

    def _let_go(self, node: NodeRecord) -> list[Command]:
        name, commands = node.name, list[Command](node.transfers.clear())
        for job in node.jobs.values():
            job.told.remove(name)
        node.jobs.clear()
        self._holdings.lose(name)
        self.calls.on_lost(name)
        self._stealer.drop(name)
        for round_ in self.rounds.values():
            if name in round_.debts:
                commands += self._take_back(round_, name, list(round_.debts[name]))
                round_.let_go(name)
        return commands

    def _take_back(self, round_: Round, name: str, indices: list[int]) -> list[Command]:
        """A node will not do these slices. Another node that tries one of them too is now alone with it."""
        shared = [index for index in indices if round_.owners[index] and round_.owners[index][0] != name]
        others = {owner for index in round_.shared.intersection(indices) for owner in round_.owners[index]}
        nobodys = round_.take_back(name, indices)
        self.resent += len(nobodys)
        round_.again.update(nobodys)
        for owner in others:
            self._stealer.touch(round_, owner)
        return self._leave_alone(round_, shared)

    def _leave_alone(self, round_: Round, indices: Iterable[int]) -> list[Command]:
        """Repeat the TASK of slices that only one node owes: it may then ask others to try them."""
        alone: dict[str, list[int]] = {}
        for index in indices:
            if len(round_.owners[index]) == 1:
                alone.setdefault(round_.owners[index][0], []).append(index)
        for its in alone.values():
            self._stealer.wake(self._roster.idle(len(its)), self._now)
        return [task(name, round_, its, True) for name, its in alone.items()]

    def on_close(self) -> list[Command]:
        """The user closes the master."""
        commands: list[Command] = []
        for node in self.nodes.values():
            if node.state is not NodeState.LOST:
                self._roster.move(node, "close")
                commands += [Send(node.name, Kind.BYE, {"reason": "the master is closed"}), *node.transfers.clear()]
        return commands

    # Rounds

    def on_submit(self, number: int, spec: RoundSpec, deadline: float | None, now: float) -> list[Command]:
        """A new round."""
        self._now = now
        self._line.add(number, spec)
        if deadline is not None:
            self._deadlines.set(number, deadline)
        return self._begin_next()

    def _begin_next(self) -> list[Command]:
        """Begin the rounds whose turn it is."""
        commands: list[Command] = []
        if not self._beginning:  # else one that could not begin has ended, and others follow it
            self._beginning = True
            while (waiting := self._line.next()) is not None:
                commands += self._begin(*waiting)
            self._beginning = False
        return commands

    def _begin(self, number: int, job: Job, data: Data) -> list[Command]:
        round_ = self.rounds[number] = Round(number, job, data, self._now, self._roster.owe)
        self._liveness.begin(self._now)
        commands = self._send_queued(round_)
        if data.refs:
            self._stealer.wake(self._roster.idle(data.nslices), self._now, round_.typical_slice_seconds / 2)
        return commands

    def on_result(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """Roots from a node. A slice whose result is here already counts once."""
        round_ = self._round_of(name, header["round"])
        if round_ is None:
            return []
        roots, seconds = header["roots"], header["seconds"]
        check_roots(round_, name, roots, len(buffers))
        beaten: dict[str, list[int]] = {}
        position = 0
        for lo, hi, frames in roots:
            header_frame, *others = buffers[position : position + frames]
            round_.tree.add((lo, hi), Encoded(header_frame, others, plain=False))
            position += frames
            for owner, indices in round_.settle(name, lo, hi).items():
                beaten.setdefault(owner, []).extend(indices)
                round_.data.move_home(indices, name)  # where it is done sooner it is to be done from now on
        if round_.tree.covered < round_.data.nslices:
            round_.note_slice_seconds(min(round_.typical_slice_seconds or seconds, seconds))
            self._stealer.wake([name], self._now, SEARCH_DELAY * (self._now - round_.began))
            return [
                Send(owner, Kind.CANCEL, {"round": round_.number, "indices": indices})
                for owner, indices in beaten.items()
            ]
        round_.note_slice_seconds(seconds)
        held = [(span, round_.tree.values[span]) for span in round_.tree.spans]
        has_ended = name if len(held) == 1 else None  # a node that sends the root of all forgets the round
        return [Done(round_.number, held), *self._end(round_, has_ended)]

    def on_error(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """User code has raised, or a node cannot continue a round."""
        round_ = self._round_of(name, header["round"])
        if round_ is None:
            return []
        check_worker(self.nodes[name], header["worker"])
        if header["slice"] is not None:
            check_given(round_, name, [header["slice"]])
            if round_.states[header["slice"]] == DONE:
                return []  # another node was faster; this one continues with its other slices
        what, text, host = header["what"], header["text"], self.nodes[name].host
        worker, pickled = -1 if header["worker"] is None else header["worker"], buffers[0] if buffers else None
        return self._fail(round_, Failure(what, text, host, worker, header["slice"], header["summary"], pickled))

    def on_worker_lost(self, name: str, header: dict[str, Any]) -> list[Command]:
        """A worker process has died; its node starts another one."""
        check_worker(self.nodes[name], header["worker"])
        self.nodes[name].down += 1
        round_ = self._round_of(name, header.get("round", 0))
        if round_ is None:
            return self.calls.fetch_for(*self._roster.idle(1))
        if "slices" not in header or "slice" not in header:
            raise ValueError("it does not say which slices its lost worker had")
        slices = header["slices"]
        check_given(round_, name, slices if header["slice"] is None else [*slices, header["slice"]])
        blamed = header["slice"] if header["slice"] is not None else slices[0] if slices else None
        needed = not slices or blamed is None or round_.states[blamed] != DONE  # without slices it was reducing
        round_.deaths[blamed] += needed
        if needed and round_.deaths[blamed] >= POISON:
            if blamed is not None and round_.states[blamed] == SENT:
                round_.move(blamed, "poison")
            text = f"{header['how']}, and so did the {POISON - 1} workers before it that had this slice"
            if not round_.data.refs:
                text = f"{header['how']}, {POISON} times in this round"
            failure = Failure("lost", text, self.nodes[name].host, header["worker"], blamed)
            return self._fail(round_, failure)
        return [*self._take_back(round_, name, slices), *self._send_queued(round_)]

    def on_cancel(self, number: int, failure: Failure) -> list[Command]:
        """The caller no longer waits."""
        round_, waiting = self.rounds.get(number), self._line.drop(number)
        if waiting is None:
            return [] if round_ is None else self._fail(round_, failure)
        self._deadlines.drop(number)
        ended = self._line.end(waiting.job, waiting.data, self._now)
        return [Fail(number, failure), *ended, *self._begin_next()]

    def on_timer(self, now: float) -> list[Command]:
        """End the rounds whose time is up, look for silent nodes, and find work for idle ones."""
        self._now = now
        commands: list[Command] = []
        for number in self._deadlines.due(now):
            progress = self.rounds[number].progress if number in self.rounds else "it has not begun"
            commands += self.on_cancel(number, Failure("timeout", progress))
        if self._liveness.at is not None and self._liveness.at <= now:
            found = self._liveness.sweep(now, bool(self.rounds or self.calls.calls))
            commands += found.commands
            for name in found.suspect:
                self._have_others_try(name)
                self.calls.on_suspect(name)
            commands += self.calls.give_out()
            for name, why in found.lost:
                commands += self.on_node_lost(name, why)
        for name, since in self._stealer.due(now):
            commands += self._find_work(name, since)
        return [*commands, *self._line.release(self._holdings.due(now)), *self._begin_next()]

    # Calls

    def on_calls(self, calls: Iterable[Call], now: float) -> list[Command]:
        """New calls."""
        self._now = now
        self._liveness.begin(now)
        return self.calls.submit(calls)

    # Data

    def on_let_go(self, lease: Lease, at_once: bool, now: float) -> list[Command]:
        """The program holds this data no longer. `at_once`: nodes are not to keep it in case that it comes again."""
        self._now = now
        return self._line.release(self._holdings.let_go(lease, at_once, now))

    # Second attempts

    def _have_others_try(self, name: str) -> None:
        """A node is suspect: idle nodes may do what it owes."""
        for round_ in self.rounds.values():
            self._stealer.touch(round_, name)
        self._stealer.wake(self._roster.idle(self._roster.owed.get(name, 0)), self._now)

    def _find_work(self, name: str, since: float) -> list[Command]:
        """Find work for a node that is idle since then."""
        found = self._stealer.find(name, since, self._now)
        if found is None:
            return []
        round_ = found.round
        if isinstance(found, Take):
            return self._send_task(self.nodes[name], round_, share(found.indices))
        header = {"round": round_.number, "count": found.slices, "for": name}
        return [Send(found.node, Kind.SHARE, {**header, "seconds": round_.typical_slice_seconds})]

    def on_shared(self, name: str, header: dict[str, Any]) -> list[Command]:
        """A node answers SHARE: the slices that it shares with the idle node."""
        round_, idle = self._round_of(name, header["round"]), self.nodes.get(header["for"])
        search = self._stealer.answered(round_, name, header["for"])
        if round_ is None:
            return []
        check_slices(round_, header["indices"])
        note_attempts(round_, header["indices"], header.get("attempts", ()))
        commands = self._share_out(round_, name, header["indices"], idle)
        if not commands:
            self._stealer.refused(round_, name, self._now)
            if search is not None and idle is not None:  # another node may have something
                commands = self._find_work(idle.name, search.since)
        return commands

    def _share_out(self, round_: Round, name: str, indices: list[int], idle: NodeRecord | None) -> list[Command]:
        single = sorted(set(round_.single(name)).intersection(indices))
        if idle is not None and (idle.state is not NodeState.READY or idle.name == name):
            idle = None
        if not self.speculation:  # it has given them away
            if idle is not None:
                round_.data.move_home(single, idle.name)
            round_.take_back(name, indices)
            return [*self._send_queued(round_), *self._begin_next()]  # where it is done from now on, there is room
        if idle is None:
            return self._leave_alone(round_, single)
        return self._send_task(idle, round_, share(single)) if single else []

    # Inside

    def _round_of(self, name: str, number: int) -> Round | None:
        """The round that a node names; None when it is over. ValueError when the node has no part in it."""
        round_ = self.rounds.get(number)
        if round_ is not None and name not in round_.given:
            raise ValueError(f"it names round {number}, in which it has no part")
        return round_

    def _send_queued(self, round_: Round) -> list[Command]:
        """Give the queued slices of a round to nodes; fail it when no node is left or expected."""
        if not round_.queued:
            return []
        if not self._roster.useful:
            coming = self._roster.somebody_comes
            return [] if coming else self._fail(round_, Failure("unreachable", self._roster.reasons))
        commands: list[Command] = []
        for name, its in shares(round_, self._roster).items():
            commands += self._send_task(self.nodes[name], round_, its)
        return commands

    def _send_task(self, node: NodeRecord, round_: Round, its: Share) -> list[Command]:
        name = node.name
        if name not in self._roster.owed:
            node.heard, node.pinged = self._now, False
            self._stealer.drop(name)
        known = name in round_.debts
        node.rounds += not known
        round_.give(name, its)
        self._stealer.touch(round_, name)
        told = [*announce_job(node, round_.job), *announce_data(node, round_.data, its)]
        return [*told, task(name, round_, its.indices, known)]

    def _fail(self, round_: Round, failure: Failure) -> list[Command]:
        return [Fail(round_.number, failure), *self._end(round_, None)]

    def _end(self, round_: Round, has_ended: str | None) -> list[Command]:
        """Forget the round and tell the nodes to forget it, except `has_ended`, which has already."""
        del self.rounds[round_.number]
        self._deadlines.drop(round_.number)
        self._stealer.end(round_)
        round_.end()
        commands: list[Command] = []
        for name in round_.debts:
            self.nodes[name].rounds -= 1
            if name != has_ended:
                commands.append(Send(name, Kind.CANCEL, {"round": round_.number}))
            commands += self.refs.end(round_, name)
        if self.rounds:
            self._stealer.wake(round_.debts, self._now)
        return [*commands, *self._line.end(round_.job, round_.data, self._now), *self._begin_next()]
