"""What a node does for calls: makes the queue, the arenas and the rings, and carries out what the desk decides."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any, Callable, Optional

from qjam_worker.ipc.arenas import Arenas
from qjam_worker.ipc.call_pipe import CallPipe
from qjam_worker.ipc.files import Files, map_file, remove
from qjam_worker.ipc.returns import RETURNS, STOP, YIELD, Ring, returns_name
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import Ref

from .calls import CallDesk
from .commands import Command, GiveCalls, Kill, Spare, StopCall, YieldCalls
from .pool import Pool
from .scheduler import Scheduler
from .store import Store

PIPE = "calls"  # the name of the queue's file


class CallService:
    """Does nothing until the first calls come. `act` carries out commands."""

    def __init__(
        self, files: Files, pool: Pool, scheduler: Scheduler, store: Store, act: Callable[[Iterable[Command]], None]
    ) -> None:
        self._files, self._pool, self._scheduler, self._store, self._act = files, pool, scheduler, store, act
        self._desk: Optional[CallDesk] = None
        self._pipe: Optional[CallPipe] = None
        self._arenas = Arenas(files)
        self._rings: list[Ring] = []
        self.handlers: dict[Kind, Callable[[dict[str, Any], list[Any]], None]] = {
            Kind.CALLS: self._on_calls,
            Kind.RECALL: self._on_recall,
            Kind.FORGET: self._on_forget,
        }
        self.perform: dict[type, Callable[[Any], None]] = {
            GiveCalls: self._give,
            YieldCalls: self._yield,
            StopCall: self._stop,
            Spare: lambda command: pool.spare(pool.workers[command.worker]),
            Kill: lambda command: pool.workers[command.worker].kill(),
        }

    # What the master says

    def _on_calls(self, header: dict[str, Any], buffers: list[Any]) -> None:
        desk = self._desk or self._open()
        now = time.monotonic()
        self._act([*desk.on_calls(header, buffers), *self._scheduler.assign(now)])

    def _on_recall(self, header: dict[str, Any], buffers: list[Any]) -> None:
        desk = self._desk or self._open()
        now = time.monotonic()
        self._act([*desk.on_recall(header, now), *self._scheduler.assign(now)])

    def _on_forget(self, header: dict[str, Any], buffers: list[Any]) -> None:
        desk = self._desk or self._open()
        self._act(desk.on_forget(header))

    def expects(self, ref: Ref) -> bool:
        """Whether a call needs this ref."""
        return self._desk is not None and self._desk.expects(ref)

    def on_arrived(self, ref: Ref) -> None:
        """A ref that a call needs is here."""
        if self._desk is not None:
            self._act([*self._desk.on_arrived(ref), *self._scheduler.assign(time.monotonic())])

    def on_no_room(self, ref: Ref, why: str) -> None:
        """There is no room for a ref that a call needs."""
        if self._desk is not None:
            self._act(self._desk.on_no_room(ref, why))

    def _open(self) -> CallDesk:
        for worker in self._pool.workers:
            self._rings.append(Ring(self._files.create(returns_name(worker.index), RETURNS).view))
        self._pipe = CallPipe(os.path.join(self._files.directories[0], PIPE))
        self._desk = CallDesk(self._pipe, self._arenas, self._rings, _opened, self._store)
        self._scheduler.calls = self._desk
        return self._desk

    # What the workers do

    def on_called(self, worker: int, now: float) -> list[Command]:
        """A worker takes no more calls."""
        assert self._desk is not None
        return [*self._desk.on_called(worker, now), *self._scheduler.on_called(worker, now)]

    def look(self, now: float) -> list[Command]:
        """Some worker has something to tell."""
        return [] if self._desk is None else self._desk.look(now)

    def on_exit(self, worker: int, how: str, now: float) -> list[Command]:
        """A worker process has ended."""
        return [] if self._desk is None else self._desk.on_exit(worker, how, now)

    def next_deadline(self) -> Optional[float]:
        """When `on_timer` is due."""
        return None if self._desk is None else self._desk.at

    def on_timer(self, now: float) -> None:
        """Look at what the workers may have to tell."""
        if self._desk is not None and self._desk.at is not None and self._desk.at <= now:
            self._act([*self._desk.look(now), *self._scheduler.assign(now)])

    # What is decided

    def _give(self, command: GiveCalls) -> None:
        assert self._desk is not None
        assert self._pipe is not None
        self._desk.on_given(command.worker, time.monotonic())
        message = {"op": "calls", "pipe": self._pipe.path, "seconds": command.seconds}
        self._pool.assign(self._pool.workers[command.worker], message)

    def _yield(self, command: YieldCalls) -> None:
        self._rings[command.worker].words[YIELD] = self._pool.workers[command.worker].seq

    def _stop(self, command: StopCall) -> None:
        self._rings[command.worker].words[STOP] = command.call
        self._pool.interrupt(self._pool.workers[command.worker], time.monotonic(), call=True)

    def close(self) -> None:
        """Close and unmap everything."""
        self._arenas.clear()
        self._rings.clear()
        self._scheduler.calls = self._desk = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def _opened(path: str, sizes: list[int]) -> list[Any]:
    """The parts of a result that lies in a file, which is removed."""
    view, parts, at = map_file(path, sum(sizes)), [], 0
    remove(path)
    for size in sizes:
        parts.append(view[at : at + size])
        at += size
    return parts
