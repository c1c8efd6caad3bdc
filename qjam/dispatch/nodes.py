"""The nodes of a master, grouped by what they can do, so that no event has to walk through all of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from qjam_worker.wire.transfers import Transfers

from .jobs import Job
from .states import COMING, NODE_TRANSITIONS, PRESENT, NodeState


@dataclass(slots=True)
class NodeRecord:
    """What the master knows of a node."""

    name: str
    host: str
    workers: int
    state: NodeState = NodeState.STARTING
    asked: int | None = None  # the number of workers that it must have; None: any
    why: str = ""
    pids: list[int] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)  # that it knows, by number
    forget: list[int] = field(default_factory=list)  # jobs that the next JOB or DATA tells it to forget
    rounds: int = 0  # that it has a part in
    heard: float = 0.0  # when it last sent a message, or got work after it had none
    pinged: bool = False  # whether it was pinged since
    down: int = 0  # workers that have ended and are not replaced yet
    transfers: Transfers = field(init=False)

    def __post_init__(self) -> None:
        self.transfers = Transfers(self.name)

    @property
    def up(self) -> int:
        """The number of workers that can take work."""
        return max(0, self.workers - self.down)

    @property
    def credit(self) -> int:
        """The bytes of refs that it may be sent."""
        return self.transfers.credit

    def move(self, event: str) -> None:
        self.state = NODE_TRANSITIONS[self.state, event]


class Roster:
    """All nodes by name, and by what they can do. The cost of a change does not grow with their number."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeRecord] = {}
        self.present: dict[str, NodeRecord] = {}  # ready or suspect; in the order in which they joined
        self.suspect: dict[str, NodeRecord] = {}
        self.owed: dict[str, int] = {}  # slices over all rounds; only nodes that owe any
        self.overloaded: set[str] = set()  # nodes that owe more slices than they have workers
        self.held: dict[str, int] = {}  # nodes whose workers are at calls that take their time: how many
        self.membership = 0  # changes when a node joins or leaves
        self.version = 0  # changes whenever a node changes its state
        self.ready: OrderedDict[str, NodeRecord] = OrderedDict()  # in the order of their turns
        self._idle: OrderedDict[str, NodeRecord] = (
            OrderedDict()
        )  # ready ones that owe nothing, in the order of their turns
        self._coming = 0
        self._workers = dict.fromkeys(PRESENT, 0)

    @property
    def useful(self) -> dict[str, NodeRecord]:
        """The nodes that can be given work: the ready ones, or the suspect ones if none is ready."""
        return self.ready or self.suspect

    @property
    def capacity(self) -> int:
        """The number of workers of the useful nodes."""
        return self._workers[NodeState.READY] or self._workers[NodeState.SUSPECT]

    @property
    def somebody_comes(self) -> bool:
        """Whether a node may still become ready."""
        return self._coming > 0

    @property
    def reasons(self) -> str:
        """Why no node is there: a reason for each host."""
        return "; ".join(f"{node.host}: {node.why or node.state.value}" for node in self.nodes.values())

    def add(self, node: NodeRecord) -> None:
        """Add a node that starts."""
        self.nodes[node.name] = node
        self._coming += 1

    def move(self, node: NodeRecord, event: str) -> None:
        """Change the state of a node; nothing else does."""
        before = node.state
        node.move(event)
        if before in PRESENT:
            self._workers[before] -= node.workers
        if node.state in PRESENT:
            self._workers[node.state] += node.workers
        self._coming += (node.state in COMING) - (before in COMING)
        name = node.name
        _put(self.ready, node, node.state is NodeState.READY)
        _put(self.suspect, node, node.state is NodeState.SUSPECT)
        _put(self._idle, node, node.state is NodeState.READY and name not in self.owed)
        if (before in PRESENT) != (node.state in PRESENT):
            _put(self.present, node, node.state in PRESENT)
            self.membership += 1
        self.version += 1

    def owe(self, name: str, more: int) -> None:
        """A node owes so many slices more, or less where that is negative."""
        owed = self.owed.get(name, 0) + more
        if owed:
            self.owed[name] = owed
            self._idle.pop(name, None)
        else:
            self.owed.pop(name, None)
            if name in self.ready:
                self._idle[name] = self.ready[name]
        node = self.present.get(name)
        if node is not None and owed > node.workers:
            self.overloaded.add(name)
        elif self.overloaded:
            self.overloaded.discard(name)

    def hold(self, name: str, more: int) -> None:
        """So many workers of a node more are at long calls, or fewer where that is negative."""
        held = self.held.pop(name, 0) + more
        if held > 0:
            self.held[name] = held

    def idle(self, count: int) -> list[str]:
        """Up to `count` idle nodes, in turns."""
        return list(_in_turn(self._idle, count))

    def turns(self, count: int) -> dict[str, int]:
        """Up to `count` useful nodes with the numbers of their workers; in turns, where there are more."""
        useful = self.useful
        if count < len(useful) and useful is self.ready:
            return {name: node.workers for name, node in _in_turn(self.ready, count).items()}
        return {name: node.workers for name, node in self.present.items() if name in useful}


def _put(group: dict[str, NodeRecord], node: NodeRecord, belongs: bool) -> None:
    if not belongs:
        group.pop(node.name, None)
    elif node.name not in group:
        group[node.name] = node


def _in_turn(group: OrderedDict[str, NodeRecord], count: int) -> dict[str, NodeRecord]:
    """The first `count`, which move to the end."""
    first = dict(islice(group.items(), count))
    for name in first:
        group.move_to_end(name)
    return first
