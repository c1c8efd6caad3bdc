"""The nodes of a master, and which of them can be asked for what: known at each moment without walking through all."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from .rounds import Job
from .states import COMING, NODE_TRANSITIONS, PRESENT, NodeState
from .transfers import Transfers


@dataclass(slots=True)
class NodeRecord:
    """What is known of a node."""

    name: str
    host: str
    workers: int
    state: NodeState = NodeState.STARTING
    asked: int | None = None  # how many workers it must have; None: as many as it likes
    why: str = ""
    pids: list[int] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)  # that it was told of, by number
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


class Roster:
    """All nodes by name, and the same ones by what they can do. What it takes does not grow with them."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeRecord] = {}
        self.present: dict[str, NodeRecord] = {}  # have workers, as far as is known; in the order of their coming
        self.suspect: dict[str, NodeRecord] = {}
        self.owed: dict[str, int] = {}  # slices, over all rounds, of the nodes that owe any
        self.overloaded: set[str] = set()  # the nodes that owe more slices than they have workers
        self.membership = 0  # changes when a node comes or goes
        self.version = 0  # changes when a node can be given work or can no longer
        self.ready: OrderedDict[str, NodeRecord] = OrderedDict()  # whose turn it is first
        self._idle: OrderedDict[str, NodeRecord] = OrderedDict()  # the ready ones that owe nothing, in the same way
        self._coming = 0
        self._workers = dict.fromkeys(PRESENT, 0)

    @property
    def useful(self) -> dict[str, NodeRecord]:
        """The nodes that can be given work; those that may have been lost only when there is nobody else."""
        return self.ready or self.suspect

    @property
    def capacity(self) -> int:
        """How many workers the useful nodes have."""
        return self._workers[NodeState.READY] or self._workers[NodeState.SUSPECT]

    @property
    def somebody_comes(self) -> bool:
        """Whether a node may yet be ready."""
        return self._coming > 0

    @property
    def reasons(self) -> str:
        """Why there is nobody, of each host."""
        return "; ".join(f"{node.host}: {node.why or node.state.value}" for node in self.nodes.values())

    def add(self, node: NodeRecord) -> None:
        """Take up a node that starts."""
        self.nodes[node.name] = node
        self._coming += 1

    def move(self, node: NodeRecord, event: str) -> None:
        """The only way in which a node that is here changes its state."""
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
        """A node has been given so many slices; negative: it has brought them, or will not."""
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

    def idle(self, count: int) -> list[str]:
        """Up to so many of the nodes that have nothing to do, others the next time."""
        return list(_in_turn(self._idle, count))

    def turns(self, count: int) -> dict[str, int]:
        """Up to so many useful nodes, with the number of their workers; others the next time, if not all are wanted."""
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
    """The first ones, which become the last ones."""
    first = dict(islice(group.items(), count))
    for name in first:
        group.move_to_end(name)
    return first
