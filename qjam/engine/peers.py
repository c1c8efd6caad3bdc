"""What the engine keeps of each node beside dispatch's record: who waits for it, what it printed, what is loaded."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from qjam_worker.wire.refs import Ref

from .loader import Blob


@dataclass
class Peer:
    """One node. Its life is dispatch's."""

    changed: threading.Event = field(default_factory=threading.Event)  # set when it is ready or lost
    gone: threading.Event = field(default_factory=threading.Event)  # set when it has left, or cannot say BYE
    ready_at: float = 0.0  # time.monotonic()
    pings: dict[float, threading.Event] = field(default_factory=dict)  # by the time at which they were sent
    died_at: dict[int, float] = field(default_factory=dict)  # worker -> when, until it is replaced
    unread: int = 0  # bytes that it printed and nobody has read yet, as `Inbox` counts them
    blobs: dict[Ref, Blob] = field(default_factory=dict)  # loaded, to be sent


class Peers(dict[str, Peer]):
    """All nodes by name."""

    def set_gone(self, name: str) -> None:
        """The node has left; nobody waits for its BYE any longer."""
        if name in self:
            self[name].gone.set()

    def release(self) -> None:
        """Let all go on who wait for a node: nothing will come any more."""
        for peer in self.values():
            peer.changed.set()
            peer.gone.set()
