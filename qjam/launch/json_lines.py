"""Messages between the master and its host processes: lines of JSON on a socket."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

READ = 64 * 1024
MAX_MESSAGE = 4 * 1024 * 1024  # bytes of a message


class JsonLines:
    """One end of the socket. `send` may be called from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, **message: Any) -> None:
        """Send a message. It is no error if the peer has gone: `receive` reports that."""
        with self._sending:
            try:
                self.sock.sendall(json.dumps(message).encode() + b"\n")
            except (BrokenPipeError, ConnectionResetError):
                pass

    def receive(self) -> list[dict[str, Any]]:
        """Wait for data, and return the messages that are complete. Raises EOFError if the other end is closed or sends
        something that is not a message.
        """
        try:
            data = self.sock.recv(READ)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        *whole, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in whole]
        except (ValueError, RecursionError):
            raise EOFError from None
        if len(self._rest) > MAX_MESSAGE or not all(type(message) is dict for message in messages):
            raise EOFError
        return messages
