"""Reads what processes print: before the answers that come after it, and only while it is not muted."""

from __future__ import annotations

import os
import select
import selectors
from typing import Callable

READ = 64 * 1024  # bytes
# Bytes that are still read of the output of a process that has ended or is let go. A pipe holds no more, but a process
# that it left behind may write to it without end.
LAST_WORDS = 1024 * 1024

Take = Callable[[bytes], None]


class OutputPump:
    """Pipes, each with a function that takes what comes out of it.

    While it is muted, pipes that are not `urgent` stay full, and the processes wait in print() as on a slow terminal.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.muted = False
        self._selector = selector
        self._ready = select.epoll()
        self._pipes: dict[int, Take] = {}
        self._urgent: set[int] = set()
        self._polled: set[int] = set()
        selector.register(self._ready, selectors.EVENT_READ, self.read)

    def add(self, fd: int, take: Take, *, urgent: bool = False) -> None:
        """Read this pipe from now on."""
        os.set_blocking(fd, False)
        self._pipes[fd] = take
        if urgent:
            self._urgent.add(fd)
        if urgent or not self.muted:
            self._poll(fd)

    def _poll(self, fd: int) -> None:
        self._ready.register(fd, select.EPOLLIN)
        self._polled.add(fd)

    def _ignore(self, fd: int) -> None:
        if fd in self._polled:
            self._polled.discard(fd)
            self._ready.unregister(fd)

    def read(self) -> None:
        """Read once from each pipe that has something."""
        for fd, _ in self._ready.poll(0):
            if fd in self._polled:  # what came from the last one may have muted all
                self._read(fd, 1)

    def drain(self, fd: int) -> None:
        """Read what is in this pipe, also while muted."""
        if fd in self._pipes:
            self._read(fd, LAST_WORDS)

    def _read(self, fd: int, left: int) -> None:
        while left > 0:
            try:
                data = os.read(fd, READ)
            except BlockingIOError:
                return
            if data:
                self._pipes[fd](data)
            else:
                self._ignore(fd)  # it has ended
            left -= len(data) or left

    def remove(self, fd: int) -> None:
        """Close a pipe."""
        self._ignore(fd)
        self._urgent.discard(fd)
        if self._pipes.pop(fd, None) is not None:
            os.close(fd)

    def mute(self, muted: bool) -> None:
        """Stop reading, or go on."""
        if muted == self.muted:
            return
        self.muted = muted
        for fd in self._pipes.keys() - self._urgent:
            if muted:
                self._ignore(fd)
            else:
                self._poll(fd)

    def abandon(self) -> None:
        """In a fork of the program: close its copies of the descriptors."""
        for fd in self._pipes:
            os.close(fd)
        self._ready.close()

    def close(self) -> None:
        """Close all pipes."""
        for fd in list(self._pipes):
            self.remove(fd)
        self._selector.unregister(self._ready)
        self._ready.close()
