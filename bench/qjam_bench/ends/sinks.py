"""One process that receives bulk data and adds it up: sinks.py tcp PORT, or sinks.py zmq ADDRESS PARENT [KEY...]."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import numpy as np
import zmq

ORPHAN_MS = 2_000  # an idle process checks this often that its parent still lives


def tcp(port: str) -> None:
    """The far end of raw-tcp: receive the data, acknowledge it, answer with its sum."""
    with socket.create_connection(("127.0.0.1", int(port))) as sock, sock.makefile("rb") as file:
        buffer = bytearray()
        while size := int.from_bytes(file.read(8), "big"):
            if len(buffer) != size:
                buffer = bytearray(size)
            file.readinto(buffer)
            sock.sendall(b"!")
            sock.sendall(np.frombuffer(buffer).sum().tobytes())


def frames(address: str, parent: str, *keys: str) -> None:
    """The far end of raw-zmq: keep and acknowledge each frame; on an empty message answer with the sum of all."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.rcvtimeo = ORPHAN_MS
        if keys:
            server, _, public, secret = (key.encode() for key in keys)
            sock.curve_serverkey, sock.curve_publickey, sock.curve_secretkey = server, public, secret
        sock.connect(address)
        sock.send(b"")
        kept: list[Any] = []
        while os.getppid() == int(parent):
            try:
                message = sock.recv_multipart(copy=False)
            except zmq.Again:
                continue
            if len(message) == 2:
                break
            if len(message[0]):
                kept.append(message[0])
                sock.send(b"")
            else:
                sock.send(sum((np.frombuffer(frame.buffer).sum() for frame in kept), np.float64()).tobytes())
                kept.clear()


if __name__ == "__main__":
    tcp(*sys.argv[2:]) if sys.argv[1] == "tcp" else frames(*sys.argv[2:])
