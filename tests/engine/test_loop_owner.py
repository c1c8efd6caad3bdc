"""Who runs the engine's loop: a caller himself, and what that must not change for him."""

from __future__ import annotations

import inspect
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arraycode
import usercode
from qjam import Master
from qjam.engine import loop_owner
from qjam.engine.deferred_signals import DeferredSignals
from qjam.engine.loop_owner import LoopOwner


class Loop:
    """A loop with a thread of its own, whose turns wait for `wake`."""

    def __init__(self) -> None:
        self.woken = threading.Event()
        self.at_it: list[str] = []
        self.over = False
        self.turns = LoopOwner(self.woken.set)
        self.thread = threading.Thread(target=self.turns.serve, args=[self.turn, lambda: self.over], name="own")
        self.thread.start()

    def turn(self) -> None:
        self.woken.wait()
        self.woken.clear()
        self.at_it.append(threading.current_thread().name)

    def close(self) -> None:
        self.over = True
        self.turns.wake()
        self.thread.join()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def wait_until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.001)


def test_a_caller_takes_the_loop_out_of_the_wait_of_its_own_thread(loop: Loop) -> None:
    assert loop.turns.take()
    assert not loop.turns.take()  # for another caller
    loop.woken.set()
    loop.turn()
    assert loop.at_it[-1] == "MainThread"
    loop.turns.leave(lambda: False)
    assert loop.turns.take()
    loop.turns.leave(lambda: False)


def test_its_own_thread_goes_on_at_once_when_there_is_something_to_do(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_owner, "MIN_PAUSE", 1e6)
    assert loop.turns.take()
    loop.turns.leave(lambda: True)
    loop.woken.set()
    wait_until(lambda: loop.at_it[-1:] == ["own"])


def test_its_own_thread_is_called_back_by_who_has_something_to_do(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_owner, "MIN_PAUSE", 1e6)
    assert loop.turns.take()
    loop.turns.leave(lambda: False)
    loop.turns.wake()
    wait_until(lambda: loop.at_it[-1:] == ["own"])


def test_its_own_thread_goes_on_a_while_after_the_last_caller(loop: Loop) -> None:
    assert loop.turns.take()
    loop.turns.leave(lambda: False)
    loop.woken.set()
    wait_until(lambda: loop.at_it[-1:] == ["own"])


def test_its_own_thread_looks_more_and_more_seldom_while_a_caller_is_at_it_for_long() -> None:
    pauses: list[float] = []
    mine = LoopOwner(lambda: None)
    assert mine.take()

    class Back:
        def acquire(self, timeout: float) -> bool:
            pauses.append(timeout)
            if len(pauses) == 6:
                mine.leave(lambda: False)
            return len(pauses) == 8

    mine._back = Back()  # type: ignore[assignment]
    mine._yield()
    assert pauses[:6] == [min(loop_owner.MIN_PAUSE * 2**n, loop_owner.MAX_PAUSE) for n in range(6)]
    assert loop_owner.MIN_PAUSE < loop_owner.MAX_PAUSE == pauses[5]
    assert pauses[6:] == [loop_owner.MIN_PAUSE] * 2  # the caller has just left, and may come back


# ---- signals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals SIGUSR1 that python code has handled."""
    handled: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
    yield handled
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_put_off_and_told_of(handled: list[int]) -> None:
    told: list[int] = []
    signals = DeferredSignals(lambda: told.append(len(handled)))
    signals.begin()
    signal.raise_signal(signal.SIGUSR1)
    assert told == [0]
    signals.end()
    assert handled == [signal.SIGUSR1]
    signal.raise_signal(signal.SIGUSR1)
    assert told == [0]
    assert len(handled) == 2


def test_what_a_handler_raises_comes_at_the_end() -> None:
    signals = DeferredSignals(lambda: None)
    signals.begin()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signals.end()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_is_put_off(handled: list[int]) -> None:
    signals = DeferredSignals(lambda: None)
    thread = threading.Thread(target=signals.begin)
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGUSR1)
    assert handled == [signal.SIGUSR1]


# ---- a master whose callers run the loop ------------------------------------------------------------------------


@pytest.fixture
def master() -> Iterator[Master]:
    with Master(2) as master:
        yield master


def test_a_handler_that_raises_nothing_runs_in_the_middle_of_a_round(master: Master, tmp_path: Path) -> None:
    path = tmp_path / "now"
    before = signal.signal(signal.SIGALRM, lambda number, frame: path.touch())
    timer = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGALRM])
    try:
        timer.start()
        assert master.run(arraycode.wait_for_file, str(path)) == 2  # which ends only when the handler has run
    finally:
        timer.join()
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_ends_a_round_again_and_again(master: Master, tmp_path: Path) -> None:
    for _ in range(3):
        timer = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            master.run(arraycode.wait_for_file, str(tmp_path / "never"))
        timer.join()
        assert master.run(usercode.forty_two) == 84


def test_ctrl_c_while_the_loop_is_taken_leaves_it_to_others(master: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    take = master._engine._loop._owner.take

    def interrupted() -> bool:
        taken = take()
        signal.raise_signal(signal.SIGINT)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(master._engine._loop._owner, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            master.run(usercode.forty_two)
    assert master.run(usercode.forty_two) == 84


def test_a_caller_that_is_deep_in_calls_gets_its_result(master: Master) -> None:
    def run(depth: int) -> Any:
        return master.run(usercode.forty_two) if depth == 0 else run(depth - 1)

    here = len(inspect.stack(0))
    for left in (60, 80, 95, 110, 150):
        assert run(sys.getrecursionlimit() - here - left) == 84


def test_a_short_round_does_not_wait_for_the_long_one_of_another_thread(master: Master, tmp_path: Path) -> None:
    path = tmp_path / "now"
    results: list[Any] = []
    long = threading.Thread(target=lambda: results.append(master.run(arraycode.wait_for_file, str(path), [0])))
    long.start()
    wait_until(lambda: master._engine._carrier.pending)
    assert master.run(usercode.add_up, 1, [1]) == 1
    assert master.submit(usercode.add_up, 2, [1]).result() == 2
    assert results == []
    path.touch()
    long.join()
    assert results == [1]


def test_many_threads_run_rounds_at_once(master: Master) -> None:
    def run(number: int) -> None:
        for turn in range(20):
            array = np.full(4000, number * 1000.0 + turn)
            results[number] += [np.array_equal(master.run(arraycode.twice, array), 4 * array)]

    results: list[list[bool]] = [[] for _ in range(5)]
    threads = [threading.Thread(target=run, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 20] * 5


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_result_is_not_written_to_by_later_rounds(workers: int) -> None:
    with Master(workers) as master:
        arrays = [np.full(4000, float(number)) for number in range(8)]
        kept = [master.run(arraycode.twice, array) for array in arrays]
        futures = [master.submit(arraycode.twice, array) for array in arrays]
        for array, result, future in zip(arrays, kept, futures, strict=True):
            assert np.array_equal(result, 2 * workers * array)
            assert np.array_equal(future.result(), 2 * workers * array)
            result[:] = 0  # it is the caller's own
        assert np.array_equal(master.run(arraycode.twice, arrays[3]), 2 * workers * arrays[3])


def test_how_the_caller_has_numpy_treat_errors_is_its_own_affair(master: Master) -> None:
    with np.errstate(all="raise"):
        assert np.isinf(master.run(arraycode.twice, np.full(2000, 6e307))).all()
        with pytest.raises(FloatingPointError):
            np.full(3, 1e308) * 10
