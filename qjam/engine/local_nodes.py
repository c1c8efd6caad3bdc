"""Nodes that live in the engine's loop: this machine's. No thread has to wake another one for them."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from qjam_worker.wire.frames import Message
from qjam_worker.wire.sockets import Lane


class LocalNode(Protocol):
    """A node, as far as its host needs it."""

    leaving: str | None

    def start(self) -> None: ...
    def receive(self) -> bool: ...
    def on_timer(self, now: float) -> None: ...
    def next_deadline(self) -> float | None: ...
    def close(self) -> None: ...


Make = Callable[[Lane, selectors.BaseSelector], LocalNode]


class LocalNodes:
    """All of them by name. Whatever goes wrong in one is the end of that one, told to `on_failed`, not of the loop."""

    def __init__(self, selector: selectors.BaseSelector, on_failed: Callable[[str, str], None]) -> None:
        self.lanes: dict[str, Lane] = {}
        self._selector = selector
        self._on_failed = on_failed
        self._local_nodes: dict[str, LocalNode] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._local_nodes

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._local_nodes))

    def add(self, name: str, make: Make) -> None:
        """Make a node and start it. Raises what `make` does."""
        lane = Lane()
        self._local_nodes[name] = make(lane, SelectorView(self._selector, name))
        self.lanes[name] = lane
        self._attend(name, self._local_nodes[name].start)

    def _attend(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001
            self.fail(name, error)
            return None

    def fail(self, name: str, error: Exception) -> None:
        """What was called for one has raised this."""
        self._on_failed(name, f"the node failed: {type(error).__name__}: {error}")

    def exchange(self, on_message: Callable[[str, Message], None], on_leaving: Callable[[str], None]) -> bool:
        """Hand over what they were sent and what they say; whether there was anything. Those who leave are told of."""
        moved = False
        for name, lane in list(self.lanes.items()):
            local = self._local_nodes.get(name)
            if local is not None and (lane.down or local.leaving is not None):
                moved = True
                if self._attend(name, local.receive) is False:
                    on_leaving(name)
            while lane.up:
                moved = True
                on_message(name, lane.up.popleft())
        return moved

    def next_deadline(self) -> float | None:
        """When `on_timer` is due."""
        due = [at for local in self._local_nodes.values() if (at := local.next_deadline()) is not None]
        return min(due) if due else None

    def on_timer(self, now: float) -> None:
        """Have them do what is due."""
        for name, local in list(self._local_nodes.items()):
            deadline = local.next_deadline()
            if deadline is not None and deadline <= now:
                self._attend(name, lambda local=local: local.on_timer(now))  # type: ignore[misc]

    def dismiss(self, name: str) -> list[Message]:
        """Close one; gives its last words."""
        local, lane = self._local_nodes.pop(name), self.lanes.pop(name)
        local.close()
        return list(lane.up)


class SelectorView(selectors.BaseSelector):
    """A node's part of the loop's selector: to the call that is registered here its name is added."""

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
