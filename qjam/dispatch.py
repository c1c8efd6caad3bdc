"""Who does which slice: events and `now` in, commands and the next deadline out. No sockets, clocks or threads.

Rules that hold whatever comes in, in whatever order: each slice counts once in a result; the result is the fixed
tree over slice indices; an exception of user code is an answer and ends its round; a lost worker or node is not an
answer, its slices go elsewhere; a slice that kills its worker three times ends its round; no round waits for a node
that cannot come.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qjam_worker.reducing import is_span
from qjam_worker.wire import Kind

from .commands import Command, Done, Fail, Failure, Lose, Note, Send
from .placement import place, spread
from .rounds import Job, JobSpec, Round
from .states import COMING, DONE, NODE_TRANSITIONS, PRESENT, SENT, NodeState
from .transfers import Transfers, gone, is_module

__all__ = ["Dispatch", "JobSpec"]

# A slice that has ended this many worker processes is at fault itself.
POISON = 3
# Jobs that nodes remember beside those in use.
JOBS_KEPT = 64
# Seconds of silence of a node that owes something: then it is asked for a sign of life, then others try its slices as
# well, and in the end it is given up. The last is for what nobody foresees: the kernels tell of broken links after 15 s
# and leases of frozen hosts after 30 s, but one message may take minutes on a slow link.
PING_AFTER, SUSPECT_AFTER, LOST_AFTER = 1.0, 3.0, 600.0
# How often silence is looked at. If it takes much longer, then it was the master that was away.
SWEEP, AWAY = 1.0, 1.0
# A node that has nothing left to do looks for slices that others owe after this part of the time that the round has
# taken so far, at least so many seconds.
LOOK, LOOK_LEAST = 0.1, 0.005
# A slice is late when it takes this many times as long as others have.
LATE = 2.0


@dataclass
class Look:
    """A node that has nothing to do looks for what others owe."""

    at: float
    since: float
    asked: set[tuple[int, str]] = field(default_factory=set)  # rounds and nodes since it began to look
    waits_for: str | None = None  # the last of these nodes, as long as it has not answered


@dataclass
class NodeRecord:
    """What is known of a node."""

    name: str
    host: str
    workers: int
    state: NodeState = NodeState.STARTING
    asked: int | None = None  # how many workers it must have; None: as many as it likes
    why: str = ""
    pids: list[int] = field(default_factory=list)
    jobs: dict[int, set[int]] = field(default_factory=dict)  # job -> slices that it was told of
    forget: list[int] = field(default_factory=list)  # jobs to be forgotten, told with the next one
    heard: float = 0.0  # when it last said something, or was given work after it had none
    pinged: bool = False  # whether it has been asked for a sign of life since
    transfers: Transfers = field(init=False)

    def __post_init__(self) -> None:
        self.transfers = Transfers(self.name)

    @property
    def credit(self) -> int:
        """Bytes of refs that may be sent."""
        return self.transfers.credit

    def move(self, event: str) -> None:
        self.state = NODE_TRANSITIONS[self.state, event]


class Dispatch:
    """The whole state of a master. Every `on_...` gives the commands that follow from the event.

    `now` (seconds) comes with `on_heard`, which is to be called before what a node has said, with `on_submit` and with
    `on_timer`; all else is taken to happen at the last of these. `speculation`: whether two workers may try the same
    slice at the same time.
    """

    def __init__(self, *, speculation: bool = True) -> None:
        self.nodes: dict[str, NodeRecord] = {}
        self.rounds: dict[int, Round] = {}
        self.resent = 0
        self.speculation = speculation
        self._now = 0.0
        self._membership = 0  # changes when a node comes or goes
        self._looks: dict[str, Look] = {}  # of nodes that have nothing to do
        self._next_look: float | None = None  # no later than the first of these
        self._sweep_at: float | None = None
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self._made = 0

    def __repr__(self) -> str:
        nodes = ", ".join(f"{node.name} {node.state.value}" for node in self.nodes.values())
        return f"<Dispatch: {nodes}; {len(self.rounds)} rounds>"

    @property
    def ready(self) -> list[NodeRecord]:
        """The nodes that can be given work; those that may have been lost only when there is nobody else."""
        ready = [node for node in self.nodes.values() if node.state is NodeState.READY]
        return ready or [node for node in self.nodes.values() if node.state is NodeState.SUSPECT]

    @property
    def capacity(self) -> int:
        """How many workers the ready nodes have."""
        return sum(node.workers for node in self.ready)

    def next_deadline(self) -> float | None:
        """When `on_timer` is due."""
        due = [r.deadline for r in self.rounds.values() if r.deadline is not None]
        due += [at for at in (self._next_look, self._sweep_at) if at is not None]
        return min(due, default=None)

    # Nodes

    def add_node(self, name: str, host: str, workers: int, asked: int | None = None) -> None:
        """Expect a node. `asked`: how many workers it must come with; None: as many as it likes."""
        self.nodes[name] = NodeRecord(name, host, workers, asked=asked)

    def on_hello(self, name: str, header: dict[str, Any]) -> list[Command]:
        """A node has connected."""
        node = self.nodes[name]
        if node.state is not NodeState.STARTING:
            raise ValueError(f"it says HELLO and is {node.state.value} already")
        count = len(header.get("workers", ())) or node.workers
        if node.asked not in (None, count):
            raise ValueError(f"it has {count} workers; it was to have {node.asked}")
        node.move("hello")
        node.workers = count
        welcome = {"node": name, "speculation": self.speculation}
        return [Send(name, Kind.WELCOME, welcome), *node.transfers.grant(header["credit"])]

    def on_ready(self, name: str, pids: list[int]) -> list[Command]:
        """All workers of a node are up; rounds that wait for a node get this one."""
        node = self.nodes[name]
        if node.state is not NodeState.JOINING:
            raise ValueError(f"it says that its workers are ready, and it is {node.state.value}")
        if len(pids) != node.workers:
            raise ValueError(f"{len(pids)} of its {node.workers} workers are ready")
        node.move("ready")
        node.pids, node.workers = list(pids), len(pids)
        self._membership += 1
        self._look_in(name, LOOK_LEAST)
        return self._send_all_queued()

    def _send_all_queued(self) -> list[Command]:
        return [command for round_ in list(self.rounds.values()) for command in self._send_queued(round_)]

    def on_heard(self, name: str, now: float) -> list[Command]:
        """A node has said something, whatever it is."""
        self._now = now
        node = self.nodes[name]
        silence, node.heard, node.pinged = now - node.heard, now, False
        if node.state is not NodeState.SUSPECT:
            return []
        node.move("heard")
        self._look_in(name, LOOK_LEAST)
        return [Note(f"{node.host} is heard again after {silence:.1f} s of silence"), *self._send_all_queued()]

    def on_worker_replaced(self, name: str, worker: int, pid: int) -> None:
        """A new process is in the place of a worker that had died."""
        pids = self.nodes[name].pids
        if worker >= len(pids):
            raise ValueError(f"it has no worker {worker}")
        pids[worker] = pid

    def on_node_lost(self, name: str, why: str, successor: str | None = None) -> list[Command]:
        """A node is gone: what it owed goes to others. `successor` is the name of the node that its host will be next,
        if it is started again.
        """
        node = self.nodes[name]
        if node.state in (NodeState.LOST, NodeState.CLOSED):
            return []
        node.move("lost")
        node.why = why
        if successor is not None:
            del self.nodes[name]
            self.add_node(successor, node.host, node.workers, node.asked)
        return self._let_go(node)

    def on_remove(self, name: str, why: str) -> list[Command]:
        """Nobody wants this node any more."""
        node = self.nodes.pop(name)
        self._looks.pop(name, None)
        if node.state in (NodeState.LOST, NodeState.CLOSED):
            return []
        node.move("close")
        return [Send(name, Kind.BYE, {"reason": why}), *self._let_go(node)]

    def _let_go(self, node: NodeRecord) -> list[Command]:
        commands = node.transfers.clear()
        node.jobs.clear()
        self._looks.pop(node.name, None)
        self._membership += 1
        for round_ in self.rounds.values():
            commands += self._take_back(round_, node.name, list(round_.debts.get(node.name, ())))
            round_.debts.pop(node.name, None)
            round_.given.pop(node.name, None)
        return commands + self._send_all_queued()

    def _take_back(self, round_: Round, name: str, indices: list[int]) -> list[Command]:
        """A node will not bring these slices. Whoever has shared one with it is alone with it now."""
        shared = [index for index in indices if round_.owners[index] and round_.owners[index][0] != name]
        self.resent += len(round_.take_back(name, indices))
        return self._leave_alone(round_, shared)

    def _leave_alone(self, round_: Round, indices: Iterable[int]) -> list[Command]:
        """Give slices again to the nodes that owe them, if nobody else does: they may ask others to try them."""
        alone: dict[str, list[int]] = {}
        for index in indices:
            if len(round_.owners[index]) == 1:
                alone.setdefault(round_.owners[index][0], []).append(index)
        if alone:
            self._have_idle_nodes_look()
        return [self._task(name, round_, its, True) for name, its in alone.items()]

    def on_close(self) -> list[Command]:
        """The user closes the master."""
        commands: list[Command] = []
        for node in self.nodes.values():
            if node.state is not NodeState.LOST:
                node.move("close")
                commands.append(Send(node.name, Kind.BYE, {"reason": "the master is closed"}))
        return commands

    # Rounds

    def on_submit(
        self,
        number: int,
        spec: JobSpec,
        params: tuple[Any, ...],
        params_ref: str | None,
        deadline: float | None,
        now: float,
    ) -> list[Command]:
        """A new round. `params` go with the task, or are pulled as a ref where `params_ref` names one."""
        self._now = now
        round_ = self.rounds[number] = Round(number, self._job(spec), params, params_ref, deadline, now)
        if self._sweep_at is None:
            self._sweep_at = now + SWEEP
        self._forget_jobs()
        commands = self._send_queued(round_)
        if round_.job.refs is not None:
            self._have_idle_nodes_look(round_.job.usual / 2)
        return commands

    def on_result(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """Roots from a node. Whatever overlaps with what is here already counts once."""
        round_ = self._round_of(name, header["round"])
        if round_ is None:
            return []
        job, given = round_.job, round_.given[name]
        for lo, hi, _ in header["roots"]:  # before any of it is taken
            if not is_span(lo, hi, job.nslices):
                raise ValueError(f"[{lo}, {hi}) is not a node of the reduction tree over {job.nslices} slices")
            if not given.issuperset(range(lo, hi)):
                raise ValueError(f"it was not given all of the slices [{lo}, {hi})")
        if sum(frames for _, _, frames in header["roots"]) != len(buffers):
            raise ValueError(f"{len(header['roots'])} roots do not go with {len(buffers)} buffers")
        beaten: dict[str, list[int]] = {}
        position = 0
        for lo, hi, frames in header["roots"]:
            round_.tree.add((lo, hi), buffers[position : position + frames])
            position += frames
            for index in range(lo, hi):
                for owner in round_.settle(index):
                    if owner != name:
                        beaten.setdefault(owner, []).append(index)
                        job.homes[index] = name  # where it is done sooner it is to be done from now on
        if round_.tree.covered < job.nslices:
            job.usual = min(job.usual or header["seconds"], header["seconds"]) or job.usual
            if len(self.nodes) > 1 and not self._owes(name):
                self._look_in(name, max(LOOK_LEAST, LOOK * (self._now - round_.began)))
            return [
                Send(owner, Kind.CANCEL, {"round": round_.number, "indices": indices})
                for owner, indices in beaten.items()
            ]
        job.usual = header["seconds"] or job.usual
        roots = [(span, round_.tree.values[span]) for span in round_.tree.spans]
        has_ended = name if len(roots) == 1 else None  # a node that has sent the root of all has forgotten the round
        return [Done(round_.number, roots), *self._end(round_, has_ended)]

    def on_error(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """User code has raised, or a node cannot go on with a round."""
        round_ = self._round_of(name, header["round"])
        if round_ is None:
            return []
        self._check_worker(name, header["worker"])
        if header["slice"] is not None:
            self._check_given(name, round_, [header["slice"]])
            if round_.states[header["slice"]] == DONE:
                return []  # somebody else was sooner; the node goes on with the others
        failure = Failure(
            header["what"],
            header["text"],
            self.nodes[name].host,
            -1 if header["worker"] is None else header["worker"],
            header["slice"],
            header["summary"],
            buffers[0] if buffers else None,
        )
        return self._fail(round_, failure)

    def on_worker_lost(self, name: str, header: dict[str, Any]) -> list[Command]:
        """A worker process has died, and another has taken its place."""
        self._check_worker(name, header["worker"])
        round_ = self._round_of(name, header.get("round", 0))
        if round_ is None:
            return []
        if "slices" not in header or "slice" not in header:
            raise ValueError("it does not tell which slices its lost worker had")
        slices = header["slices"]
        self._check_given(name, round_, slices if header["slice"] is None else [*slices, header["slice"]])
        blamed = header["slice"] if header["slice"] is not None else slices[0] if slices else None
        needed = not slices or blamed is None or round_.states[blamed] != DONE  # without slices it was reducing
        round_.deaths[blamed] += needed
        if needed and round_.deaths[blamed] >= POISON:
            if blamed is not None and round_.states[blamed] == SENT:
                round_.move(blamed, "poison")
            text = f"{header['how']}, and so did the {POISON - 1} workers before it that had this slice"
            if round_.job.refs is None:
                text = f"{header['how']}, {POISON} times in this round"
            failure = Failure("lost", text, self.nodes[name].host, header["worker"], blamed)
            return self._fail(round_, failure)
        return [*self._take_back(round_, name, slices), *self._send_queued(round_)]

    def on_cancel(self, number: int, failure: Failure) -> list[Command]:
        """The caller does not wait any longer."""
        round_ = self.rounds.get(number)
        return [] if round_ is None else self._fail(round_, failure)

    def on_timer(self, now: float) -> list[Command]:
        """End the rounds whose time is up, see who is silent, and find work for those who have none."""
        self._now = now
        late = [r for r in self.rounds.values() if r.deadline is not None and r.deadline <= now]
        commands = [command for r in late for command in self._fail(r, Failure("timeout", r.progress))]
        if self._sweep_at is not None and self._sweep_at <= now:
            commands += self._sweep(now)
        if self._next_look is not None and self._next_look <= now:
            due = [(name, look) for name, look in self._looks.items() if look.at <= now]
            for name, look in due:
                asked = self.nodes.get(look.waits_for or "")
                if asked is not None and asked.state is NodeState.READY:  # its answer may be on its way
                    look.at, look.waits_for = now + SWEEP, None
                else:
                    del self._looks[name]
                    commands += self._find_work(self.nodes[name], look.since)
            self._next_look = min((look.at for look in self._looks.values()), default=None)
        return commands

    # Silence

    def _sweep(self, now: float) -> list[Command]:
        assert self._sweep_at is not None
        away, self._sweep_at = now - self._sweep_at > AWAY, now + SWEEP if self.rounds else None
        commands: list[Command] = []
        for node in list(self.nodes.values()):
            if node.state not in PRESENT:
                continue
            if away or not self._owes(node.name):
                node.heard, node.pinged = max(node.heard, now if away else 0.0), False
                continue
            commands += self._judge(node, now - node.heard)
        return commands

    def _judge(self, node: NodeRecord, silence: float) -> list[Command]:
        if silence >= LOST_AFTER:
            return [Lose(node.name, f"nothing was heard of it for {silence:.0f} s")]
        if silence >= SUSPECT_AFTER and node.state is NodeState.READY:
            node.move("silent")
            self._have_idle_nodes_look()
            return [Note(f"nothing was heard of {node.host} for {silence:.1f} s; others do its work as well")]
        if silence >= PING_AFTER and not node.pinged:
            node.pinged = True
            return [Send(node.name, Kind.PING, {"t": self._now})]
        return []

    def _owes(self, name: str) -> bool:
        return any(round_.debts.get(name) for round_ in self.rounds.values())

    # Second attempts

    def _look_in(self, name: str, delay: float) -> None:
        """Have a node look for something to do."""
        at = self._now + delay
        look = self._looks.setdefault(name, Look(at, self._now))
        look.at = min(look.at, at)
        if self._next_look is None or at < self._next_look:
            self._next_look = at

    def _have_idle_nodes_look(self, delay: float = 0.0) -> None:
        """There may be something for those that have nothing to do."""
        if len(self.nodes) > 1:
            for node in self.ready:
                if not self._owes(node.name):
                    self._look_in(node.name, max(LOOK_LEAST, delay))

    def _find_work(self, node: NodeRecord, since: float) -> list[Command]:
        """What others owe, for a node that owes nothing: of silent ones without asking them, else of the first that has
        not been asked since the node began to look. It is idle since then.
        """
        if node.state is not NodeState.READY or self._owes(node.name):
            return []
        for round_ in self.rounds.values():
            if round_.job.refs is not None:
                self._look_in(node.name, max(LOOK_LEAST, (self._now - round_.began) / 2))
        look = self._looks.get(node.name) or Look(self._now, since)
        look.since = since
        for round_, name in self._laden():
            single, workers = round_.single(name), self.nodes[name].workers
            if not single or (round_.number, name) in look.asked:
                continue
            if self.nodes[name].state is NodeState.SUSPECT:
                return self._send_task(node, round_, single[: node.workers])
            if self.nodes[name].transfers and self._now - round_.began < 2 * (since - round_.began):
                continue  # its data is on its way, and would have to be sent twice
            look.asked.add((round_.number, name))
            look.waits_for = name
            count = max(1, len(single) * node.workers // (node.workers + workers))
            header = {"round": round_.number, "count": count, "seconds": round_.job.usual, "for": node.name}
            return [Send(name, Kind.SHARE, header)]
        return []

    def _laden(self) -> Iterator[tuple[Round, str]]:
        """Who may have slices for another node, and of which round: the oldest round first, and who has most."""
        owed_by: Counter[str] = Counter()
        for round_ in self.rounds.values():
            owed_by.update({name: len(owed) for name, owed in round_.debts.items()})
        for round_ in self.rounds.values():
            if round_.job.refs is None:
                continue
            usual = round_.job.usual
            late = self.speculation and usual and self._now - round_.began > LATE * usual
            laden = []
            for name, owed in round_.debts.items():
                node = self.nodes[name]
                silent = node.state is NodeState.SUSPECT
                if owed and (self.speculation if silent else late or owed_by[name] > node.workers):
                    laden.append((silent, len(owed) / node.workers, name))
            for _, _, name in sorted(laden, reverse=True):
                yield round_, name

    def on_shared(self, name: str, header: dict[str, Any]) -> list[Command]:
        """The slices that a node shares with one that has nothing to do."""
        round_, idle = self._round_of(name, header["round"]), self.nodes.get(header["for"])
        look = self._looks.get(header["for"])
        if look is not None and look.waits_for == name:
            look.waits_for = None
        if round_ is None:
            return []
        commands = self._share_out(round_, name, header["indices"], idle)
        if not commands and look is not None and idle is not None:  # somebody else may have something
            look.asked.add((round_.number, name))
            commands = self._find_work(idle, look.since)
        return commands

    def _share_out(self, round_: Round, name: str, indices: list[int], idle: NodeRecord | None) -> list[Command]:
        if any(type(index) is not int or not 0 <= index < round_.job.nslices for index in indices):
            raise ValueError(f"{indices} are not slices of the round")
        single = sorted(set(round_.single(name)).intersection(indices))
        if idle is not None and (idle.state is not NodeState.READY or idle.name == name):
            idle = None
        if not self.speculation:  # it has given them away
            if idle is not None:
                round_.job.homes.update(dict.fromkeys(single, idle.name))
            round_.take_back(name, indices)
            return self._send_queued(round_)
        if idle is None:
            return self._leave_alone(round_, single)
        return self._send_task(idle, round_, single) if single else []

    # Refs

    def on_missing(self, name: str, number: int | None, missing: Iterable[tuple[str, int]]) -> list[Command]:
        """A node lacks refs, of which it has the first `offset` bytes; modules may be wanted without a round."""
        transfers, wanted = self.nodes[name].transfers, list(missing)
        transfers.check(wanted)
        round_ = None if number is None else self._round_of(name, number)
        if round_ is not None:
            self._check_named(name, round_, [ref for ref, _ in wanted])
            under_way = {transfer.ref: transfer for transfer in transfers}
            for ref, offset in wanted:  # it had no room for what it was sent, if that was more
                if ref in under_way:
                    under_way[ref].offset = min(under_way[ref].offset, offset)
            return transfers.add(round_.number, wanted)
        # The round is over. Another one may want the same slices: the node will ask again in that one's name.
        modules = [item for item in wanted if is_module(item[0])]
        return [*(gone(name, ref) for ref, _ in wanted if not is_module(ref)), *transfers.add(number or 0, modules)]

    def on_loaded(self, name: str, ref: str, size: int) -> list[Command]:
        """The content that `Load` asked for is there."""
        return self.nodes[name].transfers.loaded(ref, size)

    def on_load_failed(self, name: str, ref: str, failure: Failure) -> list[Command]:
        """The content that `Load` asked for cannot be had: user code that makes slices has raised, and no round of that
        job can end well. A module that cannot be read is none.
        """
        transfers = self.nodes[name].transfers
        transfer = transfers.find(ref)
        if transfer is None:
            return []
        wanted_by = self.rounds.get(transfer.round)
        if wanted_by is None or is_module(ref):
            return transfers.drop(transfer)
        rounds = [round_.number for round_ in self.rounds.values() if round_.job is wanted_by.job]
        return [command for number in rounds for command in self.on_cancel(number, failure)]

    def on_credit(self, name: str, granted: int) -> list[Command]:
        """A node has taken this many bytes and may be sent as many again."""
        return self.nodes[name].transfers.taken(granted)

    # Whether a node can mean what it says: ValueError when not. Nothing is changed before.

    def _round_of(self, name: str, number: int) -> Round | None:
        """The round that a node speaks of; None when it is over."""
        round_ = self.rounds.get(number)
        if round_ is not None and name not in round_.given:
            raise ValueError(f"it speaks of round {number}, of which it was given nothing")
        return round_

    def _check_given(self, name: str, round_: Round, indices: Iterable[int]) -> None:
        if not round_.given[name].issuperset(indices):
            raise ValueError(f"it speaks of slices of round {round_.number} that it was not given")

    def _check_worker(self, name: str, worker: int | None) -> None:
        if worker is not None and worker >= self.nodes[name].workers:
            raise ValueError(f"it speaks of worker {worker} and has {self.nodes[name].workers}")

    def _check_named(self, name: str, round_: Round, refs: list[str]) -> None:
        """Whether the node was told of these refs with the round; modules may be asked for at any time."""
        job = round_.job
        strange = {ref for ref in refs if not is_module(ref)} - {job.entry["code"], round_.params_ref}
        if strange and job.refs is not None:
            strange -= {job.refs[index] for index in round_.given[name]}
        if strange:
            raise ValueError(f"it asks for {min(strange)!r}, of which round {round_.number} has not told it")

    # Inside

    def _job(self, spec: JobSpec) -> Job:
        job = self._jobs.get(spec.key)
        if job is None:
            self._made += 1
            job = self._jobs[spec.key] = Job(self._made, spec.entry, spec.refs, spec.nslices, spec.file)
        self._jobs.move_to_end(spec.key)
        return job

    def _forget_jobs(self) -> None:
        """Forget the jobs beyond those kept that no round uses; the nodes are told with their next one."""
        in_use = {round_.job.number for round_ in self.rounds.values()}
        old = [key for key, job in self._jobs.items() if job.number not in in_use]
        for key in old[: max(0, len(self._jobs) - JOBS_KEPT)]:
            number = self._jobs.pop(key).number
            for node in self.nodes.values():
                if node.jobs.pop(number, None) is not None:
                    node.forget.append(number)

    def _send_queued(self, round_: Round) -> list[Command]:
        """Give the queued slices of a round to ready nodes."""
        queued = round_.queued
        if not queued:
            return []
        if not self.ready:
            coming = any(node.state in COMING for node in self.nodes.values())
            return [] if coming else self._fail(round_, Failure("unreachable", self._why_nobody()))
        commands: list[Command] = []
        for name, indices in self._shares(round_.job, queued).items():
            commands += self._send_task(self.nodes[name], round_, indices)
        return commands

    def _shares(self, job: Job, indices: list[int]) -> dict[str, list[int]]:
        """Which node gets which slices. A node keeps those it has had, for it has the data, unless others have come."""
        ready = {node.name: node.workers for node in self.ready}
        if job.refs is None:  # once on each worker, whatever was before
            return spread(indices, ready)
        if job.placed_for != self._membership:
            job.placed_for = self._membership
            members = {node.name: node.workers for node in self.nodes.values() if node.state in PRESENT}
            job.homes = place(job.nslices, job.homes, members)
        shares: dict[str, list[int]] = {}
        homeless = []  # a silent node keeps what it has, and others do it meanwhile
        for index in indices:
            home = job.homes[index]
            if home in ready:
                shares.setdefault(home, []).append(index)
            else:
                homeless.append(index)
        for name, more in spread(homeless, ready).items():
            shares[name] = sorted([*shares.get(name, ()), *more])
        return shares

    def _send_task(self, node: NodeRecord, round_: Round, indices: list[int]) -> list[Command]:
        job = round_.job
        told = node.jobs.setdefault(job.number, set())
        commands: list[Command] = []
        if not told.issuperset(indices):
            commands.append(self._send_job(node, job, [index for index in indices if index not in told]))
            told.update(indices)
        if not self._owes(node.name):
            node.heard = self._now
            self._looks.pop(node.name, None)
        known = node.name in round_.debts
        round_.give(node.name, indices)
        commands.append(self._task(node.name, round_, indices, known))
        return commands

    def _task(self, name: str, round_: Round, indices: list[int], known: bool) -> Send:
        """`known`: the node has the params; if not, it has ended the round by itself, and does nothing."""
        ref, params = (None, ()) if known else (round_.params_ref, round_.params)
        header = {"job": round_.job.number, "round": round_.number, "indices": indices, "params": ref}
        return Send(name, Kind.TASK, header, params)

    def _send_job(self, node: NodeRecord, job: Job, indices: list[int]) -> Send:
        forget, node.forget = node.forget, []
        header = {
            "job": job.number,
            "entry": job.entry,
            "slices": [[index, job.refs[index] if job.refs else None] for index in indices],
            "nslices": job.nslices,
            "reduce": job.entry["reduce"],
            "forget": forget,
            **({} if job.file is None else {"file": job.file.told(indices)}),
        }
        return Send(node.name, Kind.JOB, header)

    def _why_nobody(self) -> str:
        return "; ".join(f"{node.host}: {node.why or node.state.value}" for node in self.nodes.values())

    def _fail(self, round_: Round, failure: Failure) -> list[Command]:
        return [Fail(round_.number, failure), *self._end(round_, None)]

    def _end(self, round_: Round, has_ended: str | None) -> list[Command]:
        """Forget the round, and have the nodes forget it, but for one that has done so by itself."""
        del self.rounds[round_.number]
        commands: list[Command] = []
        others = [name for name in round_.debts if name != has_ended]
        commands += [Send(name, Kind.CANCEL, {"round": round_.number}) for name in others]
        heir = next((r.number for r in self.rounds.values() if r.job is round_.job), None)
        for node in self.nodes.values():
            if node.transfers:
                commands += node.transfers.end_round(round_.number, heir, round_.params_ref)
        if self.rounds:
            self._have_idle_nodes_look()
        return commands
