"""This machine's node: it lives in the engine's loop, its workers are processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qjam_worker.node import Node


def launch(
    host_node: Callable[[str, Callable[..., Node]], None],
    name: str,
    workers: int,
    memory_limit: int | None,
    keep_data: int | None,
) -> None:
    """Have the engine host a node named `name`."""

    def make(lane: Any, selector: Any) -> Node:
        return Node(lane, workers, selector=selector, memory_limit=memory_limit, keep_data=keep_data)

    host_node(name, make)
