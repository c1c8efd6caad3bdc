"""Who does which slice: events and `now` in, commands and the next deadline out. No sockets, clocks or threads.

Rules that hold whatever comes in, in whatever order: each slice counts once in a result; the result is the fixed
tree over slice indices; an exception of user code is an answer and ends its round; a lost worker or node is not an
answer, its slices go elsewhere; a slice that kills its worker three times ends its round; no round waits for a node
that cannot come.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from qjam_worker.reducing import Tree, is_span
from qjam_worker.wire import Kind

from .commands import Command, Done, Fail, Failure, Send
from .states import COMING, DONE, NODE_TRANSITIONS, QUEUED, SENT, SLICE_TRANSITIONS, NodeState
from .transfers import Transfers, gone, is_module

# A slice that has ended this many worker processes is at fault itself.
POISON = 3
# Jobs that nodes remember beside those in use.
JOBS_KEPT = 64


@dataclass
class NodeRecord:
    """What is known of a node."""

    name: str
    host: str
    workers: int
    state: NodeState = NodeState.STARTING
    why: str = ""
    pids: list[int] = field(default_factory=list)
    jobs: dict[int, set[int]] = field(default_factory=dict)  # job -> slices that it was told of
    forget: list[int] = field(default_factory=list)  # jobs to be forgotten, told with the next one
    transfers: Transfers = field(init=False)

    def __post_init__(self) -> None:
        self.transfers = Transfers(self.name)

    @property
    def credit(self) -> int:
        """Bytes of refs that may be sent."""
        return self.transfers.credit

    def move(self, event: str) -> None:
        self.state = NODE_TRANSITIONS[self.state, event]


@dataclass
class Job:
    """A module mapped over a data set; `refs` is None for a round on each worker without data."""

    number: int
    entry: dict[str, Any]
    refs: list[str] | None
    nslices: int
    placement: dict[int, str] = field(default_factory=dict)


@dataclass
class Round:
    """One run."""

    number: int
    job: Job
    params: tuple[Any, ...]
    params_ref: str | None
    deadline: float | None
    tree: Tree
    states: list[str]
    sent: dict[str, set[int]] = field(default_factory=dict)  # node -> slices that it owes
    deaths: Counter[int | None] = field(default_factory=Counter)  # by the slice at fault; None: while reducing

    def move(self, index: int, event: str) -> None:
        self.states[index] = SLICE_TRANSITIONS[self.states[index], event]


@dataclass(frozen=True)
class JobSpec:
    """What a round runs: equal keys are the same job, which nodes are told of once."""

    key: Hashable
    entry: dict[str, Any]
    refs: list[str] | None
    nslices: int


class Dispatch:
    """The whole state of a master. Every `on_...` gives the commands that follow from the event."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeRecord] = {}
        self.rounds: dict[int, Round] = {}
        self.resent = 0
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self._made = 0

    def __repr__(self) -> str:
        nodes = ", ".join(f"{node.name} {node.state.value}" for node in self.nodes.values())
        return f"<Dispatch: {nodes}; {len(self.rounds)} rounds>"

    @property
    def ready(self) -> list[NodeRecord]:
        """The nodes that can be given work."""
        return [node for node in self.nodes.values() if node.state is NodeState.READY]

    @property
    def capacity(self) -> int:
        """How many workers the ready nodes have."""
        return sum(node.workers for node in self.ready)

    def next_deadline(self) -> float | None:
        """When `on_timer` is due."""
        return min((r.deadline for r in self.rounds.values() if r.deadline is not None), default=None)

    # Nodes

    def add_node(self, name: str, host: str, workers: int) -> None:
        """Expect a node."""
        self.nodes[name] = NodeRecord(name, host, workers)

    def on_hello(self, name: str, header: dict[str, Any]) -> list[Command]:
        """A node has connected."""
        node = self.nodes[name]
        node.move("hello")
        return [Send(name, Kind.WELCOME, {"node": name}), *node.transfers.grant(header["credit"])]

    def on_ready(self, name: str, pids: list[int]) -> list[Command]:
        """All workers of a node are up; rounds that wait for a node get this one."""
        node = self.nodes[name]
        node.move("ready")
        node.pids, node.workers = list(pids), len(pids)
        return [command for round_ in list(self.rounds.values()) for command in self._send_queued(round_)]

    def on_worker_replaced(self, name: str, worker: int, pid: int) -> None:
        """A new process is in the place of a worker that had died."""
        self.nodes[name].pids[worker] = pid

    def on_node_lost(self, name: str, why: str) -> list[Command]:
        """A node is gone: what it owed goes to others."""
        node = self.nodes[name]
        if node.state in (NodeState.LOST, NodeState.CLOSED):
            return []
        node.move("lost")
        node.why = why
        commands = node.transfers.clear()
        node.jobs.clear()
        for round_ in list(self.rounds.values()):
            commands += self._requeue(round_, round_.sent.pop(name, set()))
        return commands

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
    ) -> list[Command]:
        """A new round. `params` go with the task, or are pulled as a ref where `params_ref` names one."""
        job = self._job(spec)
        states = [QUEUED] * spec.nslices
        round_ = Round(number, job, params, params_ref, deadline, Tree(spec.nslices), states)
        self.rounds[number] = round_
        return self._send_queued(round_)

    def on_result(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """Roots from a node. Whatever overlaps with what is here already counts once."""
        round_ = self.rounds.get(header["round"])
        if round_ is None:
            return []
        for lo, hi, _ in header["roots"]:
            if not is_span(lo, hi, round_.job.nslices):  # before any of it is taken
                raise ValueError(f"[{lo}, {hi}) is not a node of the reduction tree over {round_.job.nslices} slices")
        position = 0
        for lo, hi, frames in header["roots"]:
            round_.tree.add((lo, hi), buffers[position : position + frames])
            position += frames
            for index in range(lo, hi):
                round_.move(index, "result")
            for owed in round_.sent.values():
                owed.difference_update(range(lo, hi))
        if round_.tree.covered < round_.job.nslices:
            return []
        roots = [(span, round_.tree.values[span]) for span in round_.tree.spans]
        has_ended = name if len(roots) == 1 else None  # a node that has sent the root of all has forgotten the round
        return [Done(round_.number, roots), *self._end(round_, has_ended)]

    def on_error(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """User code has raised, or a node cannot go on with a round."""
        round_ = self.rounds.get(header["round"])
        if round_ is None:
            return []
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
        round_ = self.rounds.get(header.get("round", 0))
        if round_ is None:
            return []
        slices = header["slices"]
        blamed = header["slice"] if header["slice"] is not None else slices[0] if slices else None
        round_.deaths[blamed] += 1
        if round_.deaths[blamed] >= POISON:
            if blamed is not None and round_.states[blamed] == SENT:
                round_.move(blamed, "poison")
            text = f"{header['how']}, and so did the {POISON - 1} workers before it that had this slice"
            if round_.job.refs is None:
                text = f"{header['how']}, {POISON} times in this round"
            failure = Failure("lost", text, self.nodes[name].host, header["worker"], blamed)
            return self._fail(round_, failure)
        owed = round_.sent.get(name, set())
        owed.difference_update(slices)
        return self._requeue(round_, slices)

    def on_cancel(self, number: int, failure: Failure) -> list[Command]:
        """The caller does not wait any longer."""
        round_ = self.rounds.get(number)
        return [] if round_ is None else self._fail(round_, failure)

    def on_timer(self, now: float) -> list[Command]:
        """End the rounds whose time is up."""
        late = [r for r in self.rounds.values() if r.deadline is not None and r.deadline <= now]
        return [command for r in late for command in self._fail(r, Failure("timeout", _progress(r)))]

    # Refs

    def on_missing(self, name: str, number: int, missing: Iterable[tuple[str, int]]) -> list[Command]:
        """A node lacks refs, of which it has the first `offset` bytes."""
        transfers, wanted = self.nodes[name].transfers, list(missing)
        if number in self.rounds:
            return transfers.add(number, wanted)
        # The round is over. Another one may want the same slices: the node will ask again in that one's name.
        late = [item for item in wanted if not is_module(item[0])]
        return [*(gone(name, ref) for ref, _ in late), *transfers.add(number, [w for w in wanted if w not in late])]

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
        return self.nodes[name].transfers.grant(granted)

    # Inside

    def _job(self, spec: JobSpec) -> Job:
        job = self._jobs.get(spec.key)
        if job is None:
            self._made += 1
            job = self._jobs[spec.key] = Job(self._made, spec.entry, spec.refs, spec.nslices)
        self._jobs.move_to_end(spec.key)
        return job

    def _forgotten(self) -> list[int]:
        """Jobs beyond those kept that no round uses."""
        in_use = {round_.job.number for round_ in self.rounds.values()}
        old = [key for key, job in self._jobs.items() if job.number not in in_use]
        return [self._jobs.pop(key).number for key in old[: max(0, len(self._jobs) - JOBS_KEPT)]]

    def _send_queued(self, round_: Round) -> list[Command]:
        """Place the queued slices of a round on ready nodes and tell these."""
        queued = [index for index, state in enumerate(round_.states) if state == QUEUED]
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
        """Which node gets which slices. A node keeps those it has had, for it has the data; others go to neighbours
        together, in proportion to the workers of the nodes.
        """
        ready = {node.name: node.workers for node in self.ready}
        homeless = [index for index in indices if job.placement.get(index) not in ready]
        if homeless:
            seats = [name for name, workers in ready.items() for _ in range(workers)]
            for position, index in enumerate(homeless):
                job.placement[index] = seats[len(seats) * position // len(homeless)]
        shares: dict[str, list[int]] = {}
        for index in indices:
            shares.setdefault(job.placement[index], []).append(index)
        return shares

    def _send_task(self, node: NodeRecord, round_: Round, indices: list[int]) -> list[Command]:
        job = round_.job
        told = node.jobs.setdefault(job.number, set())
        commands: list[Command] = []
        if not told.issuperset(indices):
            commands.append(self._send_job(node, job, [index for index in indices if index not in told]))
            told.update(indices)
        known = node.name in round_.sent
        round_.sent.setdefault(node.name, set()).update(indices)
        for index in indices:
            round_.states[index] = SLICE_TRANSITIONS[QUEUED, "send"]
        task = {"job": job.number, "round": round_.number, "indices": indices, "params": round_.params_ref}
        commands.append(Send(node.name, Kind.TASK, task, () if known else round_.params))
        return commands

    def _send_job(self, node: NodeRecord, job: Job, indices: list[int]) -> Send:
        for number in self._forgotten():
            for other in self.nodes.values():
                if other.jobs.pop(number, None) is not None:
                    other.forget.append(number)
        forget, node.forget = node.forget, []
        header = {
            "job": job.number,
            "entry": job.entry,
            "slices": [[index, job.refs[index] if job.refs else None] for index in indices],
            "nslices": job.nslices,
            "reduce": job.entry["reduce"],
            "forget": forget,
        }
        return Send(node.name, Kind.JOB, header)

    def _requeue(self, round_: Round, indices: Iterable[int]) -> list[Command]:
        for index in indices:
            if round_.states[index] == SENT:
                self.resent += 1
            round_.move(index, "lost")
        return self._send_queued(round_)

    def _why_nobody(self) -> str:
        return "; ".join(f"{node.host}: {node.why or node.state.value}" for node in self.nodes.values())

    def _fail(self, round_: Round, failure: Failure) -> list[Command]:
        return [Fail(round_.number, failure), *self._end(round_, None)]

    def _end(self, round_: Round, has_ended: str | None) -> list[Command]:
        """Forget the round, and have the nodes forget it, but for one that has done so by itself."""
        del self.rounds[round_.number]
        commands: list[Command] = []
        others = [name for name in round_.sent if name != has_ended]
        commands += [Send(name, Kind.CANCEL, {"round": round_.number}) for name in others]
        heir = next((r.number for r in self.rounds.values() if r.job is round_.job), None)
        for node in self.nodes.values():
            if node.transfers:
                commands += node.transfers.end_round(round_.number, heir, round_.params_ref)
        return commands


def _progress(round_: Round) -> str:
    done = sum(state == DONE for state in round_.states)
    return f"{done} of {len(round_.states)} slices were done"
