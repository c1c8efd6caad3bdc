"""A node in a process of its own: read the welcome from stdin, connect, serve until told to leave or stdin ends."""

from __future__ import annotations

import json
import os
import sys

import zmq

from .node import Node


def main() -> None:
    """The welcome is one line of JSON: {"endpoint", "node", "workers"}. Whoever holds stdin open holds the lease."""
    welcome = json.loads(sys.stdin.readline())

    def on_stdin() -> None:
        if not os.read(0, 4096):
            node.leave("the master is gone")

    context = zmq.Context()
    node = Node.connect(context, welcome["endpoint"], welcome["node"], welcome["workers"], watch={0: on_stdin})
    node.run()
    context.term()


if __name__ == "__main__":
    main()
