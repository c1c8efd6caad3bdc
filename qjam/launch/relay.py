"""Relays between the master's ROUTER and a host that cannot connect to it: over a forwarded port, or over stdio."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

from qjam_worker.wire.stdio_frames import FRAME, UPLINK

READ = 1 << 20  # bytes; large, because at each read paramiko moves the rest of its buffer
# Limits the connections over forwarded ports: the probe's, the node's, and some from other users of the host.
_open = threading.BoundedSemaphore(8)
SEND = 32 * 1024  # bytes, one packet of ssh; with more, sendall() would copy the rest again and again


class Channel(Protocol):
    """What relays use of a paramiko channel."""

    def recv(self, size: int) -> bytes: ...
    def send(self, data: Any) -> int: ...
    def close(self) -> None: ...
    def shutdown_write(self) -> None: ...


def dial(endpoint: str) -> socket.socket:
    """Connect to the ROUTER at `tcp://127.0.0.1:port`. Raises OSError."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(channel: Channel, data: bytes | memoryview, *, patient: bool = False) -> None:
    """Send all of `data`, in pieces of one ssh packet. Raises OSError if the channel is closed, and TimeoutError if it
    takes nothing for the length of its time-out; with `patient`, which is for slow links, wait on instead.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[channel.send(rest[:SEND]) :]
        except TimeoutError:
            if not patient:
                raise


def join(channel: Channel, endpoint: str, on_received: Callable[[], None]) -> None:
    """Start two threads that relay a forwarded connection until one side ends. They call `on_received` whenever the
    host sends something.
    """
    if not _open.acquire(blocking=False):
        channel.close()
        return
    try:
        sock = dial(endpoint)
    except OSError:
        channel.close()
        _open.release()
        return

    def up() -> None:
        while data := channel.recv(READ):
            on_received()
            sock.sendall(data)

    def down() -> None:
        data = bytearray(READ)
        while size := sock.recv_into(data):
            send(channel, memoryview(data)[:size])

    def run(move: Callable[[], None]) -> None:
        try:
            move()
        except (OSError, EOFError):
            pass
        channel.close()
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    def both() -> None:
        other = _start(run, up)
        run(down)
        other.join()
        sock.close()
        _open.release()

    _start(both)


class StdioUplink:
    """Relays between the ROUTER and a node whose only link is stdin and stdout of the ssh command.

    A thread sends the ROUTER's bytes to the node; `put` is called with those of the node.
    """

    def __init__(self, channel: Channel, endpoint: str, sending: threading.Lock) -> None:
        self._channel = channel
        self._sending = sending  # heartbeats use the channel too
        self._sock = dial(endpoint)
        _start(self._down)

    def put(self, data: memoryview) -> None:
        """Send bytes to the ROUTER. Raises OSError if it has closed the connection."""
        self._sock.sendall(data)

    def _down(self) -> None:
        buffer = bytearray(FRAME.size + READ)  # large: each frame ends with a packet that is partly empty
        view = memoryview(buffer)
        try:
            while size := self._sock.recv_into(view[FRAME.size :]):
                FRAME.pack_into(buffer, 0, UPLINK, size)
                with self._sending:
                    send(self._channel, view[: FRAME.size + size], patient=True)
            self._channel.shutdown_write()  # the ROUTER has closed the connection
        except (OSError, EOFError):
            pass  # the ssh connection is closed already


def _start(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread
