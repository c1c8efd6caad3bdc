"""Messages between the master and the processes that hold its ssh connections: lines of JSON on a socket."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

READ = 64 * 1024
MAX_MESSAGE = 4 * 1024 * 1024  # bytes of a message


class JsonLines:
    """One end. `send` may be called from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; a peer that is gone is not an error here: reading tells of it."""
        with self._sending:
            try:
                self.sock.sendall(json.dumps(message).encode() + b"\n")
            except (BrokenPipeError, ConnectionResetError):
                pass

    def receive(self) -> list[dict[str, Any]]:
        """Block for the next messages. Raises EOFError when the other end is closed, or says what is no message."""
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
