"""The engine's loop: waits for sockets and timers, makes the calls of other threads, and runs in whoever owns it."""

from __future__ import annotations

import selectors
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from qjam_worker.ipc.spin_wait import SpinWait

from .call_queue import CallQueue
from .deferred_signals import DeferredSignals
from .loop_owner import LoopOwner

# Seconds; epoll takes no more than 24 days, and a caller's timeout may be infinite.
MAX_WAIT = 3600.0

# Calls within calls that the loop may need.
CALLS = 100


class Work(Protocol):
    """What the loop runs; all of it is called in the loop."""

    def exchange(self) -> None: ...
    def on_timer(self, now: float) -> None: ...
    def next_deadline(self) -> float | None: ...
    def round(self) -> int | None: ...
    def on_node_error(self, name: str, error: Exception) -> None: ...
    def on_crash(self, why: str) -> None: ...
    def close(self) -> None: ...


class Waiting(Protocol):
    """What a caller that runs the loop waits for."""

    @property
    def over(self) -> bool: ...


class Loop:
    """Runs `work` in a thread of its own, or in the caller of `run`. `calls` brings calls from any thread."""

    work: Work

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.calls = CallQueue(lambda: self._owner.wake(), lambda: self._owner.wake_running())  # noqa: PLW0108
        self._owner = LoopOwner(self.calls.wake)
        self._waiting = SpinWait(self.selector)
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="qjam-engine", daemon=True)

    def register(self, file: Any, call: Callable[[], None]) -> None:
        """Make this call when the file is readable. In the loop, or before it starts."""
        self.selector.register(file, selectors.EVENT_READ, (call, None))

    def start(self) -> None:
        """Start the thread."""
        self.register(self.calls, self.calls.take_wakes)
        self._thread.start()

    def stop(self) -> None:
        """End the loop; returns when its thread has ended."""

        def stop() -> None:
            self._stopped = True

        self.calls.post(stop)
        self._thread.join()
        self.calls.refuse()

    def close(self) -> None:
        """Close its files."""
        self.calls.close()

    def run(self, pending: Waiting, submit: Callable[[], None]) -> bool:
        """Submit a round, then run the loop in the caller's thread until the round is over or another thread has the
        loop; False when nothing was submitted. What a signal handler raises (Ctrl-C) comes through.
        """
        signals = DeferredSignals(self.calls.wake)
        submitted = False
        while not pending.over:
            taken = False
            try:
                signals.begin()  # before the loop is taken: a caller interrupted in between would keep it for ever
                taken = _has_room() and self._owner.take()
                if not taken or self._stopped or self._error is not None:
                    break
                if not submitted:
                    submitted = True
                    self.calls.leave(submit)
                self._drive(pending, signals)
            finally:
                if taken:
                    self._owner.leave(self._is_needed)
                signals.end()
        return submitted

    def _drive(self, pending: Waiting, signals: DeferredSignals) -> None:
        try:
            with np.errstate(all="ignore"):  # results are added up in this thread now
                self.calls.make()
                self.work.exchange()
                while not (pending.over or signals.came or self._stopped):
                    self._turn()
        except BaseException as error:  # noqa: BLE001  the loop's own thread raises it
            self._crash(error)

    def _is_needed(self) -> bool:
        """Whether the loop must go on at once."""
        return bool(self.work.round() is not None or self.calls.posted or self._error or self._stopped)

    def _run(self) -> None:
        np.seterr(all="ignore")  # for this thread: results are added up in it
        try:
            self._owner.serve(self._turn, lambda: self._stopped or self._error is not None)
        except BaseException as error:  # noqa: BLE001  raised below
            self._crash(error)
        finally:
            self.work.close()
            self.selector.close()
        if self._error is not None:
            raise self._error

    def _turn(self) -> None:
        """Wait for something to happen, and do what follows."""
        deadline = self._next_deadline()
        timeout = None if deadline is None else min(max(0.0, deadline - time.monotonic()), MAX_WAIT)
        if self.calls.posted:  # some wake nobody
            timeout = 0.0
        events = self._waiting.select(timeout, self.work.round())
        for key, _ in events:
            call, node = key.data
            try:
                call()
            except Exception as error:
                if node is None:
                    raise
                self.work.on_node_error(node, error)
        self.calls.make()
        self.work.exchange()
        if deadline is not None and (now := time.monotonic()) >= deadline:
            self._on_time(now)
            self.work.exchange()

    def _on_time(self, now: float) -> None:
        """Do what is due."""
        self.work.on_timer(now)
        self.calls.make_due(now)

    def _next_deadline(self) -> float | None:
        at, other = self.work.next_deadline(), self.calls.next_deadline()
        return other if at is None or (other is not None and other < at) else at

    def _crash(self, error: BaseException) -> None:
        """A defect of qjam: nobody may wait for a loop that does not run."""
        self._error = error
        self.calls.failed = f"the engine has failed ({type(error).__name__}: {error}); this is a defect of qjam"
        self.work.on_crash(self.calls.failed)


def _has_room() -> bool:
    """Whether this thread is far enough from python's limit of calls within calls to run the loop."""
    try:
        sys._getframe(max(0, sys.getrecursionlimit() - CALLS))  # noqa: SLF001  counts them in C
    except ValueError:  # there are fewer
        return True
    return False
