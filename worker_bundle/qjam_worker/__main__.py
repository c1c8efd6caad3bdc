"""A node in a process of its own: read the welcome from stdin, connect, serve until told to leave or stdin ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Optional

import zmq

from .ipc import huge_pages
from .node.fork_server_client import ForkServer
from .node.node import Node
from .wire import heartbeat


def serve(
    welcome: dict[str, Any], read_fd: int, write_fd: int, paths: Sequence[str] = (), warm: Optional[ForkServer] = None
) -> None:
    """Be the node that the welcome describes: {"endpoint", "node", "workers"} and, where the link is encrypted, "keys"
    as in `Node.connect`. "memory_limit" are the bytes that each worker may take for itself, "keep_data" those
    of slices that may be kept on disk. "heartbeat_timeout" are the seconds for
    which `read_fd` may be silent; it may be so for ever without.
    """
    ended, end = os.pipe()
    whys: list[str] = []

    def on_end(why: str) -> None:
        whys.append(why)
        os.write(end, b"!")

    huge_pages.keep_freed()
    context = zmq.Context()
    node = Node.connect(
        context,
        welcome["endpoint"],
        welcome["node"],
        welcome["workers"],
        keys=welcome.get("keys"),
        watch={ended: lambda: node.leave(whys[0])},
        paths=paths,
        warm=warm,
        memory_limit=welcome.get("memory_limit"),
        keep_data=welcome.get("keep_data"),
    )
    heartbeat.hold(read_fd, write_fd, welcome.get("heartbeat_timeout"), on_end)
    node.run()
    if "heartbeat_timeout" in welcome and node.leaving is not None:
        print(node.leaving, file=sys.stderr)  # noqa: T201  the last words, where BYE may come too late
    context.term()


def main() -> None:
    """The welcome is one line of JSON. Whoever holds stdin open holds the lease."""
    serve(json.loads(sys.stdin.readline()), 0, 1)


if __name__ == "__main__":
    main()
