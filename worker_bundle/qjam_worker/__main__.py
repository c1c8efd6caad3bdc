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
from .node.options import NodeOptions
from .wire import heartbeat
from .wire.sockets import Dealer


def serve(
    welcome: dict[str, Any],
    read_fd: int,
    write_fd: int,
    paths: Sequence[str] = (),
    fork_server: Optional[ForkServer] = None,
) -> None:
    """Be the node that the welcome describes.

    "endpoint", "node" and "keys" are as in `Dealer.connect`; "workers", "memory_limit" and "keep_data" as in
    `NodeOptions`; "heartbeat_timeout" are the seconds that `read_fd` may be silent, for ever without it.
    """
    ended, end = os.pipe()
    whys: list[str] = []

    def on_end(why: str) -> None:
        whys.append(why)
        os.write(end, b"!")

    huge_pages.keep_freed()
    options = NodeOptions(welcome["workers"], welcome.get("memory_limit"), welcome.get("keep_data"), paths)
    context = zmq.Context()
    uplink = Dealer.connect(context, welcome["endpoint"], welcome["node"], welcome["keys"])
    node = Node(uplink, options, watch={ended: lambda: node.leave(whys[0])}, fork_server=fork_server)
    heartbeat.hold(read_fd, write_fd, welcome.get("heartbeat_timeout"), on_end)
    node.run()
    if "heartbeat_timeout" in welcome and node.leaving is not None:
        print(node.leaving, file=sys.stderr)  # noqa: T201  the last words, where BYE may come too late
    context.term()


def main() -> None:
    """The welcome is one line of JSON. The node lives as long as its stdin is open."""
    serve(json.loads(sys.stdin.readline()), 0, 1)


if __name__ == "__main__":
    main()
