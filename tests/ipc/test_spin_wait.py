"""A loop stays awake where the answer is about to come, and nowhere else."""

from __future__ import annotations

import os
import selectors
from typing import Any

import pytest

from qjam_worker.ipc.spin_wait import AWAKE, SpinWait

TICK = AWAKE / 10


class Scripted(selectors.BaseSelector):
    """Readable `after` so many seconds; who waits asleep wakes up just then, and to look takes a tick."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ready_at = 100.0
        self.slept: list[float | None] = []
        self.looked = 0

    def comes(self, after: float) -> None:
        self.ready_at, self.slept, self.looked = self.now + after, [], 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout == 0:
            self.looked += 1
            self.now += TICK
        else:
            self.slept.append(timeout)
            self.now = max(self.now, min(self.ready_at, self.now + (1e9 if timeout is None else timeout)))
        return ["event"] if self.now >= self.ready_at else []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        raise NotImplementedError

    unregister = register  # type: ignore[assignment]

    def get_map(self) -> Any:
        raise NotImplementedError


@pytest.fixture
def world() -> tuple[Scripted, SpinWait]:
    selector = Scripted()
    return selector, SpinWait(selector, lambda: selector.now)


def play(world: tuple[Scripted, SpinWait], round_: int | None, after: float, timeout: float | None = None) -> list[Any]:
    selector, waiting = world
    selector.comes(after)
    return waiting.select(timeout, round_)


def test_the_first_wait_is_asleep(world: tuple[Scripted, SpinWait]) -> None:
    selector, _ = world
    assert play(world, 1, AWAKE / 2) == ["event"]
    assert (selector.looked, selector.slept) == (0, [None])


def test_after_a_short_round_the_next_one_is_waited_for_awake(world: tuple[Scripted, SpinWait]) -> None:
    selector, _ = world
    play(world, 1, AWAKE / 2)
    assert play(world, 2, AWAKE / 2) == ["event"]
    assert selector.slept == []
    assert 4 <= selector.looked <= 6


def test_after_a_long_round_it_is_not(world: tuple[Scripted, SpinWait]) -> None:
    selector, _ = world
    for number, after in enumerate((AWAKE / 2, 2 * AWAKE, AWAKE / 2)):
        play(world, number, after)
    assert (selector.looked, selector.slept) == (0, [None])
    play(world, 3, AWAKE / 2)
    assert selector.slept == []


def test_it_falls_asleep_when_nothing_comes(world: tuple[Scripted, SpinWait]) -> None:
    selector, _ = world
    play(world, 1, AWAKE / 2)
    assert play(world, 2, 50 * AWAKE) == ["event"]
    assert selector.slept == [None]
    assert 9 <= selector.looked <= 11
    play(world, 2, 50 * AWAKE)  # the same round goes on
    assert (selector.looked, selector.slept) == (0, [None])


def test_a_round_is_short_when_all_of_its_answers_come_soon(world: tuple[Scripted, SpinWait]) -> None:
    selector, _ = world
    for after in (2 * AWAKE, AWAKE / 10, AWAKE / 10):  # the last answers follow at once
        play(world, 1, after)
    play(world, 2, AWAKE / 2)
    assert (selector.looked, selector.slept) == (0, [None])


def test_rounds_and_the_time_between_them_are_told_apart(world: tuple[Scripted, SpinWait]) -> None:
    selector, _ = world
    for number in (1, 2):
        play(world, number, 20 * AWAKE)  # long rounds
        assert selector.looked == 0
        play(world, None, AWAKE / 2)  # and soon the next one
    play(world, 3, 20 * AWAKE)
    assert selector.looked == 0
    play(world, None, AWAKE / 2)
    assert (selector.slept, selector.looked > 0) == ([], True)


def test_what_the_caller_does_between_rounds_is_not_waiting(world: tuple[Scripted, SpinWait]) -> None:
    selector, _ = world
    for number in range(3):
        play(world, number, AWAKE / 2)
        selector.now += 100.0
    play(world, 3, AWAKE / 2)
    assert selector.slept == []


@pytest.mark.parametrize("timeout", [0.0, TICK, AWAKE / 2, 3 * AWAKE])
def test_a_timeout_is_kept(world: tuple[Scripted, SpinWait], timeout: float) -> None:
    selector, _ = world
    play(world, 1, AWAKE / 2)
    began = selector.now
    assert play(world, 2, 100 * AWAKE, timeout) == []
    assert timeout <= selector.now - began <= timeout + 2 * TICK


def test_a_real_file_is_seen_awake_and_asleep() -> None:
    reading, writing = os.pipe()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ, "pipe")
            waiting = SpinWait(selector)
            os.write(writing, b"x")
            for round_ in (1, 2, 3):
                assert [key.data for key, _ in waiting.select(None, round_)] == ["pipe"]
            os.read(reading, 1)
            assert waiting.select(0.0, 4) == []
    finally:
        os.close(reading)
        os.close(writing)
