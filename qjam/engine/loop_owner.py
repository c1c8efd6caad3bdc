"""Who runs the engine's loop: its own thread, or a caller that waits for a round."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Seconds that the loop stands still after a caller has left it, before its own thread runs it: the next round usually
# comes at once.
MIN_PAUSE = 0.02
# The longest pause between two checks whether a caller still runs the loop: each check takes 30 us of a core that a
# worker may be busy on.
MAX_PAUSE = 0.16


class LoopOwner:
    """A caller that runs the loop waits for no other thread. To wake one and to be woken by it took 0.09 of the 0.31 ms
    of a round of 2 workers (31 KB each way).

    `wake` ends the wait of a turn in another thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._end_wait = wake
        self._loop = threading.Lock()  # held by the thread that runs the loop
        self._caller = threading.Lock()  # held by the one caller that runs it, or is about to
        self._back = threading.Lock()  # released to make the loop's own thread continue
        self._back.acquire()
        self._wanted = False
        self._left_at = 0.0

    def serve(self, turn: Callable[[], None], is_over: Callable[[], bool]) -> None:
        """For the loop's own thread: run turns while no caller does, until `is_over`."""
        while not is_over():
            with self._loop:
                while not (self._wanted or is_over()):
                    turn()
            if not is_over():
                self._yield()

    def _yield(self) -> None:
        pause, left_at = MIN_PAUSE, self._left_at
        while not self._back.acquire(timeout=pause):
            if self._left_at != left_at:
                pause, left_at = MIN_PAUSE, self._left_at
            elif self._loop.locked():
                pause = min(2 * pause, MAX_PAUSE)
            if self._loop.locked():
                continue
            if time.monotonic() - self._left_at >= MIN_PAUSE:
                return
            pause = MIN_PAUSE

    def take(self) -> bool:
        """For a caller: take the loop until `leave`; False when another caller has it."""
        if not self._caller.acquire(blocking=False):
            return False
        if not self._loop.acquire(blocking=False):
            self._wanted = True
            self._end_wait()
            self._loop.acquire()
            self._wanted = False
        return True

    def leave(self, is_needed: Callable[[], bool]) -> None:
        """Give the loop back. Its own thread continues soon, at once if `is_needed`."""
        self._left_at = time.monotonic()
        self._loop.release()
        self._caller.release()
        if is_needed():
            self.resume()

    def wake(self) -> None:
        """There is something to do: end the wait of the loop, or make its own thread run it."""
        self._end_wait()
        if not self._loop.locked():
            self.resume()

    def wake_running(self) -> None:
        """Like `wake`, but leave a loop that nobody runs to a caller who comes at once."""
        if self._loop.locked():
            self._end_wait()

    def resume(self) -> None:
        """Make the loop's own thread continue as soon as it can."""
        try:
            self._back.release()
        except RuntimeError:
            pass  # it was told so already
