"""The places of a node's workers: what each is at, and how rounds and calls take turns there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional, Protocol

from .commands import Command, GiveCalls, YieldCalls


class WaitingCalls(Protocol):
    """What the scheduler needs to know of calls."""

    @property
    def waiting(self) -> int: ...


class WorkerState:
    """One worker: whether it is ready, whether it is busy, and for which round or with calls.

    `ahead`: seconds for which rounds had it while calls waited; calls get it for as long.
    """

    __slots__ = ("ahead", "began", "busy", "calls", "index", "ready", "round", "yields")

    def __init__(self, index: int) -> None:
        self.index = index
        self.ready = False
        self.busy = False
        self.round: Optional[int] = None
        self.calls = False
        self.yields = False  # whether it is to stop taking calls
        self.began = self.ahead = 0.0

    def rest(self, now: float, calls_wait: bool) -> Optional[int]:
        """It is idle now; gives the number of the round that it worked for."""
        if self.calls:
            self.ahead = 0.0
        elif self.busy and calls_wait:
            self.ahead += now - self.began
        number, self.round, self.busy, self.calls, self.yields = self.round, None, False, False, False
        return number

    def __repr__(self) -> str:
        return f"<worker {self.index} {'busy' if self.busy else 'idle' if self.ready else 'starting'}>"


def give_calls(seats: Iterable[WorkerState], waiting: int, now: float, *, owed: bool = False) -> list[Command]:
    """Have idle workers take calls, of which so many wait. `owed`: only workers that rounds had while calls waited, and
    for as long.
    """
    commands: list[Command] = []
    for seat in seats:
        if len(commands) == waiting:
            break
        if seat.ready and not seat.busy and (seat.ahead > 0.0 or not owed):
            seat.busy, seat.calls, seat.began = True, True, now
            seat.ahead = seat.ahead if owed else 0.0
            commands.append(GiveCalls(seat.index, seat.ahead if owed else None))
    return commands


def yield_calls(seats: Iterable[WorkerState]) -> list[Command]:
    """Have workers that take calls come back: a round has work for them."""
    commands: list[Command] = []
    for seat in seats:
        if seat.calls and not seat.yields and seat.ahead == 0.0:
            seat.yields = True
            commands.append(YieldCalls(seat.index))
    return commands
