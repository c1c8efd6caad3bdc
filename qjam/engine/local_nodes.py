"""The node of this machine: it lives in the engine's loop, so that no thread has to wake another one for it."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from typing import Any, Protocol

from qjam_worker.ipc import shortage
from qjam_worker.wire.frames import Message
from qjam_worker.wire.sockets import Lane


class LocalNode(Protocol):
    """A node, as far as the loop needs it."""

    leaving: str | None

    def start(self) -> None: ...
    def receive(self) -> bool: ...
    def on_timer(self, now: float) -> None: ...
    def next_deadline(self) -> float | None: ...
    def close(self) -> None: ...


Make = Callable[[Lane, selectors.BaseSelector], LocalNode]


class LocalNodes:
    """All of them by name. An error in one ends that one alone, not the loop: `on_failed(name, why)`; `on_gone(name)`
    when one has ended.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        on_failed: Callable[[str, str], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self.lanes: dict[str, Lane] = {}
        self._selector = selector
        self._on_failed, self._on_gone = on_failed, on_gone
        self._nodes: dict[str, LocalNode] = {}
        self._ending: set[str] = set()

    def add(self, name: str, make: Make) -> None:
        """Make a node and start it. Raises what `make` does."""
        lane = Lane()
        self._nodes[name] = make(lane, SelectorView(self._selector, name))
        self.lanes[name] = lane
        self._attend(name, self._nodes[name].start)

    def _attend(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001
            self.fail(name, error)
            return None

    def fail(self, name: str, error: Exception) -> None:
        """A call of this node's has raised."""
        self.end(name)
        self._on_failed(name, f"the node failed: {shortage.told(error)}")

    def end(self, name: str) -> None:
        """Close a node with the next exchange, if it is one of these."""
        if name in self._nodes:
            self._ending.add(name)

    def exchange(self, on_message: Callable[[str, Message], None]) -> bool:
        """Hand over what they were sent and what they say; whether there was anything."""
        moved = False
        for name, lane in list(self.lanes.items()):
            node = self._nodes[name]
            if name not in self._ending and (lane.down or node.leaving is not None):
                moved = True
                if self._attend(name, node.receive) is False:
                    self.end(name)
            while lane.up:
                moved = True
                on_message(name, lane.up.popleft())
            if name in self._ending:
                moved = True
                self._close(name, on_message)
        return moved

    def next_deadline(self) -> float | None:
        """When `on_timer` is due."""
        due = [at for node in self._nodes.values() if (at := node.next_deadline()) is not None]
        return min(due) if due else None

    def on_timer(self, now: float) -> None:
        """Have them do what is due."""
        for name, node in list(self._nodes.items()):
            deadline = node.next_deadline()
            if deadline is not None and deadline <= now:
                self._attend(name, lambda node=node: node.on_timer(now))  # type: ignore[misc]

    def close(self, on_message: Callable[[str, Message], None]) -> None:
        """Close all of them."""
        for name in list(self._nodes):
            self._close(name, on_message)

    def _close(self, name: str, on_message: Callable[[str, Message], None]) -> None:
        """Close one; its last words count."""
        node, lane = self._nodes.pop(name), self.lanes.pop(name)
        self._ending.discard(name)
        node.close()
        while lane.up:
            on_message(name, lane.up.popleft())
        self._on_gone(name)


class SelectorView(selectors.BaseSelector):
    """A node's view of the loop's selector. It adds the node's name to each call that the node registers."""

    def __init__(self, selector: selectors.BaseSelector, name: str) -> None:
        self._selector = selector
        self._name = name
        self._files: set[Any] = set()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._selector.register(fileobj, events, (data, self._name))
        self._files.add(fileobj)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        self._files.discard(fileobj)
        return self._selector.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        raise NotImplementedError("the loop waits for all at once")

    def get_map(self) -> Any:
        return self._selector.get_map()

    def close(self) -> None:
        for file in list(self._files):
            self.unregister(file)
