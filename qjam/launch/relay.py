"""Relays between the master's ROUTER and a host that cannot reach it: through a forwarded port, or through stdio."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

from qjam_worker.wire.stdio_frames import FRAME, UPLINK

READ = 1 << 20  # bytes; paramiko moves what it keeps of its buffer at each read, so few large reads
# Connections through the forwarded port at a time: the probe's and the node's, and some that strangers may hold.
_open = threading.BoundedSemaphore(8)
SEND = 32 * 1024  # bytes; what fits a packet of ssh: sendall() of more copies the rest again and again


class Channel(Protocol):
    """As paramiko has it."""

    def recv(self, size: int) -> bytes: ...
    def send(self, data: Any) -> int: ...
    def close(self) -> None: ...
    def shutdown_write(self) -> None: ...


def dial(endpoint: str) -> socket.socket:
    """A connection to the ROUTER's endpoint on this machine's loopback, `tcp://127.0.0.1:port`."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(channel: Channel, data: bytes | memoryview, *, patient: bool = False) -> None:
    """Send all of it, in pieces that ssh takes whole. Raises OSError when the channel is closed, and TimeoutError when
    it takes nothing for as long as its time-out; `patient` waits on, for a link may be slow.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[channel.send(rest[:SEND]) :]
        except TimeoutError:
            if not patient:
                raise


def join(channel: Channel, endpoint: str, heard: Callable[[], None]) -> None:
    """Relay a forwarded connection until one side ends; at once, in threads of its own. `heard` is called with each
    sign of life from there.
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
            heard()
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
            pass  # it has gone first

    def both() -> None:
        other = _start(run, up)
        run(down)
        other.join()
        sock.close()
        _open.release()

    _start(both)


class StdioUplink:
    """The uplink of a node that has only the stdin and stdout of its exec. `put` takes what came from it."""

    def __init__(self, channel: Channel, endpoint: str, sending: threading.Lock) -> None:
        self._channel = channel
        self._sending = sending  # beats go the same way
        self._sock = dial(endpoint)
        _start(self._down)

    def put(self, data: memoryview) -> None:
        """Bytes for the ROUTER. Raises OSError when it has hung up."""
        self._sock.sendall(data)

    def _down(self) -> None:
        buffer = bytearray(FRAME.size + READ)  # of frames of 32 KB each would cost a packet more for its last bytes
        view = memoryview(buffer)
        try:
            while size := self._sock.recv_into(view[FRAME.size :]):
                FRAME.pack_into(buffer, 0, UPLINK, size)
                with self._sending:
                    send(self._channel, view[: FRAME.size + size], patient=True)
            self._channel.shutdown_write()  # the ROUTER has hung up: so do we
        except (OSError, EOFError):
            pass  # ssh has gone first


def _start(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread
