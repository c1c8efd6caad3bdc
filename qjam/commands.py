"""What dispatch decides, for the engine to carry out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qjam_worker.reducing import Span
from qjam_worker.wire import Kind


@dataclass(frozen=True)
class Send:
    """Send this message to a node."""

    node: str
    kind: Kind
    header: dict[str, Any]
    buffers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Load:
    """Get the content of a ref ready, then call `on_loaded` or `on_load_failed`."""

    node: str
    round: int
    ref: str


@dataclass(frozen=True)
class Chunk:
    """Send these bytes of a loaded ref."""

    node: str
    ref: str
    offset: int
    size: int


@dataclass(frozen=True)
class Unload:
    """The node needs the loaded ref no longer."""

    node: str
    ref: str


@dataclass(frozen=True)
class Done:
    """The round is over; its roots, by ascending slices, each with the frames of its value."""

    round: int
    roots: list[tuple[Span, list[Any]]]


@dataclass(frozen=True)
class Failure:
    """Why a round has no result. `what` is task, lost, room, load, timeout, cancelled or unreachable."""

    what: str
    text: str
    host: str = ""
    worker: int = -1
    slice: int | None = None
    summary: str = ""
    error: Any = None  # the pickled exception of a task, the exception itself of a load


@dataclass(frozen=True)
class Fail:
    """The round has failed."""

    round: int
    failure: Failure


@dataclass(frozen=True)
class Lose:
    """The node is to be given up, as when its launcher says that it has ended."""

    node: str
    why: str


@dataclass(frozen=True)
class Note:
    """Something that the user may want to know."""

    text: str


Command = Send | Load | Chunk | Unload | Done | Fail | Lose | Note
