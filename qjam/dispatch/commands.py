"""The commands that dispatch returns and the engine carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qjam_worker.values.codec import Encoded
from qjam_worker.values.reduction import Span
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.transfers import Block, Gone, Load, Unload

from .call import Call, Returned

__all__ = ["Block", "Gone", "Load", "Unload"]  # which are those of any sender of refs

# Named tuples: several are made in every round, and a frozen dataclass takes five times as long to make.


class Send(NamedTuple):
    """Send this message to a node."""

    node: str
    kind: Kind
    header: dict[str, Any]
    buffers: tuple[Any, ...] = ()


class Done(NamedTuple):
    """The round is over; its roots, by ascending slices."""

    round: int
    roots: list[tuple[Span, Encoded]]


@dataclass(frozen=True)
class Failure:
    """Why a round has no result. `what`: task, lost, room, node, load, timeout, cancelled, closed, crashed or
    unreachable.
    """

    what: str
    text: str
    host: str = ""
    worker: int = -1
    slice: int | None = None
    summary: str = ""
    error: Any = None  # the exception: of a load itself, of a task that a worker ran its pickle


class Fail(NamedTuple):
    """The round has failed."""

    round: int
    failure: Failure


class Ended(NamedTuple):
    """Calls have ended: as nodes say, or without a result. Others have begun."""

    returned: list[Returned]
    begun: list[Call]
    failed: list[tuple[Call, Failure]]


class Lost(NamedTuple):
    """The node is lost. The supervisor may add a successor; after that call `reassign` to give out what it owed."""

    node: str
    why: str


class Note(NamedTuple):
    """Log this for the user."""

    text: str


Command = Send | Load | Block | Unload | Gone | Done | Fail | Ended | Lost | Note
