"""Send bytes to one process over loopback: by a plain socket, or by plain pyzmq in frames, with CURVE or without."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import zmq

from qjam_bench import ends
from qjam_bench.harness.party import Party

from .raw_zmq import ANSWER_MS

FRAME = 4 * 1024 * 1024  # bytes of one send; a block of qjam has as many
CREDIT = 4  # unacknowledged frames that pyzmq may have sent; qjam allows as many


class RawTcp(Party):
    """A socket that is connected to ends/sinks.py."""

    def __init__(self, sock: socket.socket) -> None:
        """`sock`: connected."""
        self._sock = sock

    def _load(self, data: Any) -> None:
        self._sock.sendall(data.nbytes.to_bytes(8, "big"))
        view = memoryview(data).cast("B")
        for at in range(0, len(view), FRAME):
            self._sock.sendall(view[at : at + FRAME])
        self._sock.recv(1)

    def round(self, params: Any) -> Any:
        """Give the sum of the data if params[0] is not 0, else params."""
        return np.frombuffer(self._sock.recv(8)) if params[0] else params


class RawZmq(Party):
    """A ROUTER that is connected to ends/sinks.py."""

    def __init__(self, router: zmq.Socket[bytes], name: bytes) -> None:
        """`name`: the identity of that process."""
        self._router = router
        self._name = name

    def _load(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        frames = [view[at : at + FRAME] for at in range(0, len(view), FRAME)]
        for number, frame in enumerate(frames):
            if number >= CREDIT:
                self._router.recv_multipart()
            self._router.send(self._name, zmq.SNDMORE)
            self._router.send(frame, copy=False)
        for _ in frames[:CREDIT]:
            self._router.recv_multipart()

    def round(self, params: Any) -> Any:
        """Give the sum of the data sent since the last sum if params[0] is not 0, else params."""
        if not params[0]:
            return params
        self._router.send_multipart([self._name, b""])
        return np.frombuffer(self._router.recv_multipart()[1])


@contextmanager
def raw_tcp() -> Iterator[Party]:
    """Run another process, with a plain socket over loopback to it."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(ANSWER_MS / 1e3)
        stack.enter_context(ends.child(ends.program("sinks", "tcp", str(listener.getsockname()[1]))))
        sock = stack.enter_context(listener.accept()[0])
        sock.settimeout(ANSWER_MS / 1e3)
        yield RawTcp(sock)


@contextmanager
def raw_zmq(curve: bool) -> Iterator[Party]:
    """Run another process, with plain pyzmq over loopback to it."""
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        router = stack.enter_context(context.socket(zmq.ROUTER))
        router.linger = 0
        router.rcvtimeo = ANSWER_MS
        keys = [key.decode() for key in (*zmq.curve_keypair(), *zmq.curve_keypair())] if curve else []
        if curve:
            router.curve_server, router.curve_secretkey = True, keys[1].encode()
        router.bind("tcp://127.0.0.1:*")
        address = router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        stack.enter_context(ends.child(ends.program("sinks", "zmq", address, str(os.getpid()), *keys)))
        name = router.recv_multipart()[0]
        yield RawZmq(router, name)
        router.send_multipart([name, b"", b""])
