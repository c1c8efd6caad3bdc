"""Waiting until files are readable: by polling for a moment if an answer is likely to come soon, else asleep."""

from __future__ import annotations

import math
import os
import selectors
import time
from typing import Any, Callable, Optional

# Seconds for which a loop polls before it sleeps. A processor that went idle takes 25 us to wake up, or more if it was
# idle for long, above all on a virtual machine. With polling, a round of 2 workers (31 KB each way) takes 0.15 ms and
# not 0.17, and over TCP with CURVE 0.39 and not 0.52.
AWAKE = 0.001


class SpinWait:
    """Waits for a selector, during rounds and between them.

    It polls at the beginning of a round if the last round was short, and after a round if the last pause was short:
    long rounds cost no more. While it polls, it yields the processor to every process that wants it, such as a worker.
    """

    def __init__(self, selector: selectors.BaseSelector, clock: Callable[[], float] = time.monotonic) -> None:
        self._selector, self._clock = selector, clock
        self._round: Optional[int] = None
        self._began = self._ended = 0.0  # seconds; of waiting during this round or pause
        self._took = {False: math.inf, True: math.inf}  # how long the last pause and the last round took

    def select(self, timeout: Optional[float], round_: Optional[int]) -> list[tuple[selectors.SelectorKey, int]]:
        """What is readable, as the selector gives it. `round_`: the number of this round; None between rounds."""
        now = self._clock()
        if round_ != self._round:
            self._took[self._round is not None] = self._ended - self._began
            self._round, self._began = round_, now
        end = math.inf if timeout is None else now + timeout
        events: list[Any] = []
        if self._took[round_ is not None] < AWAKE:
            until = min(self._began + AWAKE, end)
            while not events and now < until:
                events = self._selector.select(0)
                if not events:
                    os.sched_yield()
                now = self._clock()
        if not events:
            events = self._selector.select(None if timeout is None else max(0.0, end - now))
            now = self._clock()
        self._ended = now
        return events
