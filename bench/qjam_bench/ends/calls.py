"""The loops that `qjam-bench calls` measures. A loop runs in the process that the calls of a party come from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

SETTLING = 20  # calls at the start of a loop that do not count: they wake processes and bring the function


class Calls(Protocol):
    """What a loop needs of a party."""

    def work(self, name: str) -> Callable[..., Any]:
        """Give a function of qjam_bench_work."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Begin a call; give a handle for its result."""

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for the results of these calls and give them, in this order."""

    def keep(self, array: Any) -> Any:
        """Give what stands for an array in the arguments of many calls."""


class Streamed(NamedTuple):
    """A stream of calls. `seconds`: from the first one's beginning to the last one's result."""

    seconds: float
    calls: int


def one_by_one(calls: Calls, name: str, fixed: tuple[Any, ...], most: int, budget: float) -> list[float]:
    """Give the seconds of each call, none begun before the one before has its result.

    `fixed`: arguments of each call, before its number. `most`: calls, or as many as begin within `budget` seconds.
    """
    function = _settled(calls, name, fixed)
    taken: list[float] = []
    stop = time.perf_counter() + budget
    while len(taken) < most and (not taken or time.perf_counter() < stop):
        began = time.perf_counter()
        answer = calls.gather([calls.submit(function, *fixed, len(taken))])
        taken.append(time.perf_counter() - began)
        _check(answer, range(len(taken) - 1, len(taken)))
    return taken


def stream(calls: Calls, name: str, fixed: tuple[Any, ...], outstanding: int, budget: float) -> Streamed:
    """Keep between half of `outstanding` and all of it under way, until `budget` seconds are over; then wait for all.

    However short the budget, as many calls as `outstanding` are made.
    """
    return _streamed(calls, _settled(calls, name, fixed), fixed, outstanding, budget)


def stream_array(calls: Calls, nbytes: int, outstanding: int, budget: float) -> Streamed:
    """Do as `stream`, with the same array of `nbytes` in every call."""
    kept = (calls.keep(np.ones(nbytes // 8)),)
    return _streamed(calls, _settled(calls, "look_up", kept), kept, outstanding, budget)


def mixed(calls: Calls, naps: Sequence[float]) -> float:
    """Give the seconds until calls that sleep for so long are done, all begun at once."""
    function = _settled(calls, "nap", (0.0,))
    began = time.perf_counter()
    answers = calls.gather([calls.submit(function, seconds, number) for number, seconds in enumerate(naps)])
    taken = time.perf_counter() - began
    _check(answers, range(len(naps)))
    return taken


def _settled(calls: Calls, name: str, fixed: tuple[Any, ...]) -> Callable[..., Any]:
    function = calls.work(name)
    _check(calls.gather([calls.submit(function, *fixed, number) for number in range(SETTLING)]), range(SETTLING))
    return function


def _streamed(
    calls: Calls, function: Callable[..., Any], fixed: tuple[Any, ...], outstanding: int, budget: float
) -> Streamed:
    block = max(1, outstanding // 2)
    under_way: deque[tuple[range, list[Any]]] = deque()
    made = 0

    def begin() -> None:
        nonlocal made
        numbers = range(made, made + block)
        under_way.append((numbers, [calls.submit(function, *fixed, number) for number in numbers]))
        made += block

    began = time.perf_counter()
    begin()
    begin()
    while under_way:
        numbers, handles = under_way.popleft()
        _check(calls.gather(handles), numbers)
        if time.perf_counter() < began + budget:
            begin()
    return Streamed(time.perf_counter() - began, made)


def _check(answers: list[Any], numbers: range) -> None:
    if answers != list(numbers):
        raise ArithmeticError("a wrong result of a call")
