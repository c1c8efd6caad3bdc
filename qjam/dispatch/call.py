"""What the master knows of a call and of its function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Function:
    """A function of one submitter, as nodes are told of it once: `description` is for the workers."""

    __slots__ = ("at", "calls", "description", "forgotten", "number")

    def __init__(self, number: int, description: bytes) -> None:
        self.number, self.description = number, description
        self.at: set[str] = set()  # the nodes that know it
        self.calls = 0  # that are queued or at a node
        self.forgotten = False  # whether no more will come


class Call:
    """One call: `data`, the packed arguments, is for the workers. `nodes`: those that have it."""

    __slots__ = ("begun", "data", "deaths", "function", "future", "id", "nodes", "over", "submitter")

    def __init__(self, submitter: int, function: Function, data: bytes, future: Any = None) -> None:
        self.id = 0
        self.submitter, self.function, self.data, self.future = submitter, function, data, future
        self.nodes: tuple[str, ...] = ()
        self.deaths = 0
        self.begun = self.over = False

    def __repr__(self) -> str:
        return f"<Call {self.id} at {', '.join(self.nodes) or 'none'}>"


class Returned(NamedTuple):
    """How a call has ended at a node, for `Ended`."""

    call: Call
    how: int
    data: Sequence[Any]
    host: str
