"""One worker of raw-zmq: dealer.py ADDRESS PARENT FUNCTION LARGE.

PARENT is the pid of its parent; messages of LARGE bytes or more are not copied.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import qjam_bench_work
import zmq

ORPHAN_MS = 2_000  # an idle worker checks this often that its parent still lives


def main(address: str, parent: str, name: str, bytes_not_to_copy: str) -> None:
    """Answer params with the function's result. An empty frame announces a slice; an empty message is the end."""
    function = getattr(qjam_bench_work, name)
    part = None
    large = False
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = ORPHAN_MS
        socket.connect(address)
        socket.send(b"")
        while os.getppid() == int(parent):
            try:
                message = socket.recv(copy=False).buffer if large else socket.recv()
            except zmq.Again:
                continue
            if len(message):
                large = len(message) >= int(bytes_not_to_copy)
                socket.send(function(np.frombuffer(message), part).data, copy=not large)
            elif socket.rcvmore:
                rows = int(socket.recv())
                part = np.frombuffer(socket.recv(copy=False).buffer).reshape(rows, -1)
                socket.send(b"")
            else:
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
