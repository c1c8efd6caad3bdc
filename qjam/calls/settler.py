"""The threads that set futures."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

# Seconds for which a callback may run before another thread goes on with the other results.
SLOW_CALLBACK = 0.05
STOP_TIMEOUT = 5.0  # seconds for each thread
SPARE_LOOK = 0.2  # seconds between two looks whether a thread beside the first one is still needed


class Settler:
    """Sets futures, in a thread of its own: decoding and callbacks run user code. A callback that takes long, or waits
    for another future, does not keep the others waiting: another thread goes on with them.
    """

    def __init__(self, later: Callable[[float, Callable[[], None]], None]) -> None:
        self._later = later
        self._items: deque[Callable[[], None]] = deque()
        self._ready = threading.Semaphore(0)
        self._busy: dict[threading.Thread, float | None] = {}  # since when a thread is at an item
        self._first = threading.current_thread()  # the thread that stays, once it is started
        self._looking = self._closed = False

    def put(self, items: list[Callable[[], None]]) -> None:
        """Have these called, in this order as long as none takes long. In the loop."""
        if self._closed:  # nobody waits for the loop any more
            for item in items:
                item()
            return
        self._items.extend(items)
        if not self._busy:
            self._start()
        self._ready.release()
        self._look_later()

    def _look_later(self) -> None:
        if not self._looking:
            self._looking = True
            self._later(SLOW_CALLBACK, self._look)

    def _look(self) -> None:
        self._looking = False
        if not self._items or self._closed:
            return
        slow = time.monotonic() - SLOW_CALLBACK
        if all(since is not None and since < slow for since in list(self._busy.values())):
            self._start()
            self._ready.release()
        self._look_later()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="qjam-settle", daemon=True)
        if not self._busy:
            self._first = thread
        self._busy[thread] = None
        thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            self._ready.acquire(timeout=None if me is self._first else SPARE_LOOK)
            self._work(me)
            if self._closed or (me is not self._first and self._busy[self._first] is None):
                del self._busy[me]
                self._ready.release()  # for the next one
                return

    def _work(self, me: threading.Thread) -> None:
        busy, items = self._busy, self._items
        while items:
            try:
                item = items.popleft()
            except IndexError:
                break
            busy[me] = time.monotonic()
            try:
                item()
            except BaseException:  # a callback may raise anything
                logging.getLogger("concurrent.futures").exception("a callback of a call has raised")
            busy[me] = None

    def close(self) -> None:
        """Wait for the items to be done, a while for each thread, and end the threads."""
        self._closed = True
        threads = list(self._busy)
        self._ready.release()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(STOP_TIMEOUT)
