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


class Argument:
    """A large part of the arguments of calls, which nodes are sent once. `key`: its content hash."""

    __slots__ = ("at", "calls", "data", "key", "used")

    def __init__(self, key: str, data: bytes) -> None:
        self.key, self.data = key, data
        self.at: set[str] = set()  # the nodes that have it
        self.calls = 0  # that need it
        self.used = 0.0  # when a call was last made with it, in seconds


class Call:
    """One call: `data`, the packed arguments, is for the workers, `large` the parts that are not in there. `nodes`:
    those that have the call.
    """

    __slots__ = (
        "__weakref__",
        "begun",
        "data",
        "deaths",
        "function",
        "future",
        "id",
        "large",
        "nodes",
        "over",
        "queued",
        "submitter",
    )

    def __init__(
        self, submitter: int, function: Function, data: bytes, future: Any = None, large: Sequence[Argument] = ()
    ) -> None:
        self.id = 0
        self.submitter, self.function, self.data, self.future = submitter, function, data, future
        self.large = large
        self.nodes: tuple[str, ...] = ()
        self.deaths = 0
        self.begun = self.queued = self.over = False

    def __repr__(self) -> str:
        return f"<Call {self.id} at {', '.join(self.nodes) or 'none'}>"


class Returned(NamedTuple):
    """How a call has ended at a node, for `Ended`."""

    call: Call
    how: int
    data: Sequence[Any]
    host: str
