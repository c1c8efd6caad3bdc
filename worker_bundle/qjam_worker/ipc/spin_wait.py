"""Waiting for files to be readable: awake for a moment where the answer is about to come, asleep otherwise."""

from __future__ import annotations

import math
import os
import selectors
import time
from typing import Any, Callable, Optional

# Seconds for which a loop stays awake. A processor that falls asleep takes 25 us to come back, on a virtual machine
# above all, and more the longer it slept. Awake, a round of 2 workers (31 KB each way) takes 0.15 in place of 0.17 ms,
# and over TCP with CURVE 0.39 in place of 0.52.
AWAKE = 0.001


class SpinWait:
    """For a selector whose loop has rounds to do, or none at the moment.

    It stays awake at the beginning of such a time if the last one of its kind was short: rounds of many milliseconds
    cost nothing more. Awake, it gives way to whoever wants the processor: the workers, as a rule.
    """

    def __init__(self, selector: selectors.BaseSelector, clock: Callable[[], float] = time.monotonic) -> None:
        self._selector, self._clock = selector, clock
        self._round: Optional[int] = None
        self._began = self._ended = 0.0  # seconds; of waiting for this round
        self._took = {False: math.inf, True: math.inf}  # the last time without a round, and with one

    def select(self, timeout: Optional[float], round_: Optional[int]) -> list[tuple[selectors.SelectorKey, int]]:
        """What is readable, as the selector gives it. `round_`: the number of the round that is being done, if any."""
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
