"""Calls that a loop makes for other threads, and calls that it makes later."""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from itertools import count
from typing import TypeVar

T = TypeVar("T")
Call = Callable[[], None]


class CallQueue:
    """`post`, `leave`, `ask` and `wake` may be used from any thread; all else in the loop, which waits for `fileno` to
    be readable. `wake_owner` has a loop that may stand still look for calls.
    """

    def __init__(self, wake_owner: Callable[[], None]) -> None:
        self._wake_owner = wake_owner
        self.posted: deque[Call] = deque()
        self.timers: list[tuple[float, int, Call]] = []
        self.failed = ""  # why the loop has ended, where that is a defect
        self._numbers = count()
        self._lock = threading.Lock()
        self._waking = threading.RLock()  # a signal handler may come in between
        self._closed = self._ended = False
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Readable when something was posted."""
        return self._read

    def post(self, call: Call) -> bool:
        """Have the loop make a call; False when there is no loop any more."""
        posted = self.leave(call)
        self._wake_owner()
        return posted

    def leave(self, call: Call) -> bool:
        """The same, for when the loop next looks."""
        with self._lock:
            if not self._closed:
                self.posted.append(call)
            return not self._closed

    def wake(self) -> None:
        """End the loop's wait."""
        with self._waking:
            if not self._ended:
                try:
                    os.write(self._write, b"!")
                except BlockingIOError:
                    pass  # the pipe is full of wake-ups already

    def ask(self, call: Callable[[], T]) -> T:
        """What a call in the loop gives, or raises. OSError when there is no loop any more."""
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001  belongs to the caller
                answer.set_exception(error)

        if not self.post(ask):
            raise OSError("the master is closed")
        while not self.failed:
            try:
                return answer.result(1.0)
            except FutureTimeoutError:
                if answer.done():  # the call itself has raised it
                    raise
                continue  # a program that is in C code, with the GIL held, holds this up as well
        raise OSError(self.failed)

    def later(self, delay: float, call: Call) -> None:
        """Have the loop make a call after `delay` seconds."""
        heapq.heappush(self.timers, (time.monotonic() + delay, next(self._numbers), call))

    def next_deadline(self) -> float | None:
        """When the first of the later calls is due."""
        return self.timers[0][0] if self.timers else None

    def take_wakes(self) -> None:
        """Take the wake-ups; to be called when there are any."""
        os.read(self._read, 4096)

    def make(self) -> None:
        """Make the calls that were posted."""
        while self.posted:
            self.posted.popleft()()

    def make_due(self, now: float) -> None:
        """Make the later calls whose time has come."""
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()

    def refuse(self) -> None:
        """No more calls: the loop has ended."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Give everything back."""
        with self._waking:
            self._ended = True
            os.close(self._read)
            os.close(self._write)
