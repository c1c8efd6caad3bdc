"""What the loop does in each turn: hand messages over between the master and its nodes, and do what is due."""

from __future__ import annotations

from qjam.dispatch.commands import Failure
from qjam.dispatch.dispatcher import Dispatch

from .carrying_out import Carrier
from .inbox import Inbox
from .local_nodes import LocalNodes
from .router import Router


class Exchange:
    """The work of the loop; see `loop.Work`."""

    def __init__(
        self, dispatch: Dispatch, router: Router, local_nodes: LocalNodes, carrier: Carrier, inbox: Inbox
    ) -> None:
        self._dispatch, self._router, self._local_nodes = dispatch, router, local_nodes
        self._carrier, self._inbox = carrier, inbox

    def exchange(self) -> None:
        """Hand messages over until there are none."""
        moved = True
        while moved:
            moved = self._local_nodes.exchange(self._inbox.on_message)
            while (received := self._router.receive()) is not None:
                moved = True
                self._inbox.on_frames(*received)

    def on_timer(self, now: float) -> None:
        """Do what is due."""
        self._local_nodes.on_timer(now)
        deadline = self._dispatch.next_deadline()
        if deadline is not None and deadline <= now:
            self._carrier.act(self._dispatch.on_timer(now))

    def next_deadline(self) -> float | None:
        """When `on_timer` is due."""
        at, other = self._local_nodes.next_deadline(), self._dispatch.next_deadline()
        return other if at is None or (other is not None and other < at) else at

    def round(self) -> int | None:
        """The number of the oldest round that runs; of a call that runs alone, less than 0."""
        calls = self._dispatch.calls.calls
        return next(iter(self._carrier.pending), -next(iter(calls)) if len(calls) == 1 else None)

    def on_node_error(self, name: str, error: Exception) -> None:
        """A call of a local node's has raised."""
        self._local_nodes.fail(name, error)

    def on_crash(self, why: str) -> None:
        """The loop ends by a defect: end all waiting."""
        self._carrier.crash(Failure("crashed", why))

    def close(self) -> None:
        """End the local nodes."""
        self._local_nodes.close(self._inbox.on_message)
