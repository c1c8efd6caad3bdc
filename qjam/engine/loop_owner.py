"""Whose turn it is to run the engine's loop: its own thread's, or that of a caller who waits for a round."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Seconds for which the loop stands still after a caller has left it, before its own thread goes on with it: the next
# round comes at once, as a rule.
LINGER = 0.02
# For so long it may stand still when a caller has had it for longer. To look every LINGER seconds cost each round that
# takes long some 30 us a time of a core that a worker is busy on.
LONGEST = 0.16


class Turns:
    """A caller who runs the loop himself waits for no other thread. To wake one and to be woken by it took 0.09 of the
    0.31 ms of a round of 2 workers (31 KB each way).

    `wake` ends the wait of a turn in another thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._loop = threading.Lock()  # held by who runs the loop
        self._caller = threading.Lock()  # held by the one caller who runs it, or is about to
        self._back = threading.Lock()  # released to have the loop's own thread go on
        self._back.acquire()
        self._wanted = False
        self._left_at = 0.0

    def serve(self, turn: Callable[[], None], is_over: Callable[[], bool]) -> None:
        """For the loop's own thread: take turns whenever no caller does, until it is over."""
        while not is_over():
            with self._loop:
                while not (self._wanted or is_over()):
                    turn()
            if not is_over():
                self._stand_back()

    def _stand_back(self) -> None:
        pause = LINGER
        while not self._back.acquire(timeout=pause):
            if self._loop.locked():
                pause = min(2 * pause, LONGEST)
            elif time.monotonic() - self._left_at >= LINGER:
                return
            else:
                pause = LINGER

    def take(self) -> bool:
        """For a caller: have the loop, until `leave`; False when another caller has it."""
        if not self._caller.acquire(blocking=False):
            return False
        if not self._loop.acquire(blocking=False):
            self._wanted = True
            self._wake()
            self._loop.acquire()
            self._wanted = False
        return True

    def leave(self, is_needed: Callable[[], bool]) -> None:
        """Give the loop back; at once where it `is_needed`."""
        self._left_at = time.monotonic()
        self._loop.release()
        self._caller.release()
        if is_needed():
            self.call_back()

    def nudge(self) -> None:
        """There is something for the loop to do: it is woken, and where nobody runs it, its own thread is."""
        self._wake()
        if not self._loop.locked():
            self.call_back()

    def call_back(self) -> None:
        """Have the loop's own thread go on as soon as it can."""
        try:
            self._back.release()
        except RuntimeError:
            pass  # it has been called already
