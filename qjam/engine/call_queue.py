"""Calls that other threads post to the loop, and calls that it makes later."""

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
    """Any thread may call `post`, `leave`, `ask` and `wake`; the loop calls the rest, and waits for `fileno` to be
    readable. `wake_owner` makes a loop that nobody runs look for calls, `wake_running` only one that somebody runs.
    """

    def __init__(self, wake_owner: Callable[[], None], wake_running: Callable[[], None]) -> None:
        self._wake_owner, self._wake_running = wake_owner, wake_running
        self.posted: deque[Call] = deque()
        self.timers: list[tuple[float, int, Call]] = []
        self.failed = ""  # why the loop has ended, if by a defect
        self._numbers = count()
        self._lock = threading.Lock()
        self._waking = threading.RLock()  # a signal handler may interrupt and call it again
        self._closed = self._ended = False
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Readable when a call was posted."""
        return self._read

    def post(self, call: Call) -> bool:
        """Have the loop make a call; False when it has ended."""
        posted = self.leave(call)
        self._wake_owner()
        return posted

    def post_for_next(self, call: Call) -> bool:
        """Like `post`, but do not wake a loop that nobody runs: a caller is about to run it."""
        posted = self.leave(call)
        self._wake_running()
        return posted

    def slip(self, call: Call) -> None:
        """Like `post`, but take no lock, and say nothing: for the garbage collector, which may have interrupted this
        thread anywhere.
        """
        self.posted.append(call)
        self._wake_owner()

    def leave(self, call: Call) -> bool:
        """Like `post`, without waking the loop."""
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
        """What a call in the loop returns or raises. OSError when the loop has ended."""
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
                continue  # a program in C code that holds the GIL delays the loop too
        raise OSError(self.failed)

    def later(self, delay: float, call: Call) -> None:
        """Have the loop make a call after `delay` seconds."""
        heapq.heappush(self.timers, (time.monotonic() + delay, next(self._numbers), call))

    def next_deadline(self) -> float | None:
        """When the first later call is due."""
        return self.timers[0][0] if self.timers else None

    def take_wakes(self) -> None:
        """Read the wake-ups, when `fileno` is readable."""
        os.read(self._read, 4096)

    def make(self) -> None:
        """Make the calls that were posted."""
        while self.posted:
            self.posted.popleft()()

    def make_due(self, now: float) -> None:
        """Make the later calls that are due."""
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()

    def refuse(self) -> None:
        """No more calls: the loop has ended."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Close the pipe."""
        with self._waking:
            self._ended = True
            os.close(self._read)
            os.close(self._write)
