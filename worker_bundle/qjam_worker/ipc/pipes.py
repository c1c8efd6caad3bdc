"""Small msgpack messages over a pair of pipes, between a node and each of its workers."""

from __future__ import annotations

import os
import threading
from typing import Any

import msgpack

READ = 16 * 1024
MAX_MESSAGE = 256 * 1024 * 1024  # a module's source or a traceback; data lies in mapped files


class Channel:
    """One end of a pair of pipes; a descriptor of -1 stands for a direction that is not there.

    `send` blocks while the pipe is full, `receive` takes what is there, `wait` blocks for one message. EOFError tells
    that the other process has ended.

    Pipes and not sockets, because the kernel may run the reader of a socket in the writer's place at once: to wake 8
    workers one after the other took half as long again.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self._pack = msgpack.Packer(autoreset=True, unicode_errors="surrogatepass").pack
        self._unpacker = msgpack.Unpacker(
            strict_map_key=False, max_buffer_size=MAX_MESSAGE, unicode_errors="surrogatepass"
        )
        self._fed = 0  # bytes that the unpacker was given
        self._whole = True  # whether it holds no part of a message
        self._waiting: list[Any] = []
        self._sending = threading.Lock()  # user code may import in a thread while another answers

    def send(self, message: Any) -> None:
        """Send one message. That the other process has ended is no error here: reading tells it."""
        with self._sending:
            data = self._pack(message)
            try:
                while data:
                    data = data[os.write(self.write_fd, data) :]
            except BrokenPipeError:
                pass

    def wake(self) -> None:
        """Send a message that says nothing: None."""
        self.send(None)

    def receive(self) -> list[Any]:
        """The messages that have arrived, once the reading end is readable."""
        data = os.read(self.read_fd, READ)
        if not data:
            raise EOFError
        if self._whole:
            try:
                return [msgpack.unpackb(data, strict_map_key=False, unicode_errors="surrogatepass")]
            except ValueError:  # several, or only a part of one
                pass
        self._fed += len(data)
        self._unpacker.feed(data)
        messages = []
        self._whole = False
        for message in self._unpacker:
            messages.append(message)
            self._whole = bool(self._unpacker.tell() == self._fed)
        return messages

    def wait(self) -> Any:
        """The next message, waiting for it."""
        while not self._waiting:
            self._waiting = self.receive()
        return self._waiting.pop(0)

    def close(self) -> None:
        """Close both pipes; the other side sees their end."""
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)
