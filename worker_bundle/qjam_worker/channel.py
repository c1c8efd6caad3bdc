"""Doorbells: small msgpack messages over a stream socket between a node, its warm parent and its workers."""

from __future__ import annotations

import socket
from typing import Any

import msgpack

READ = 64 * 1024
MAX_MESSAGE = 256 * 1024 * 1024  # a module's source or a traceback; data never rings, it lies in mapped files


class Channel:
    """One end of a socket pair. `send` blocks, `receive` takes what is there, `wait` blocks for one message.

    The end of the other process shows as EOFError from `receive` and `wait`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack
        self._unpacker = msgpack.Unpacker(
            raw=False, strict_map_key=False, use_list=True, max_buffer_size=MAX_MESSAGE
        )

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Any) -> None:
        """Send one message. A peer that is gone is not an error here: `receive` tells of it."""
        try:
            self.sock.sendall(self._pack(message))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self) -> list[Any]:
        """The messages that have arrived, without waiting."""
        try:
            data = self.sock.recv(READ, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            raise EOFError from None
        return self._fed(data)

    def wait(self) -> Any:
        """The next message, waiting for it."""
        while True:
            for message in self._unpacker:
                return message
            try:
                data = self.sock.recv(READ)
            except ConnectionResetError:
                raise EOFError from None
            if not data:
                raise EOFError
            self._unpacker.feed(data)

    def feed(self, data: bytes) -> list[Any]:
        """The messages completed by bytes that the owner has read itself (with file descriptors beside them)."""
        return self._fed(data)

    def _fed(self, data: bytes) -> list[Any]:
        if not data:
            raise EOFError
        self._unpacker.feed(data)
        return list(self._unpacker)

    def close(self) -> None:
        self.sock.close()
