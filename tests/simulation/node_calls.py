"""The calls of a simulated node: the real CallDesk and Arenas; the queue, the rings and the workers' side are played.

What is done with messages and decisions is what qjam_worker.node.call_service does, step by step what a worker does is
what qjam_worker.worker.calls does.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgpack

from qjam_worker.ipc.arenas import Arenas, arena_name
from qjam_worker.ipc.call_pipe import Record
from qjam_worker.ipc.files import Mapped
from qjam_worker.ipc.returns import CALL, IDLE, STOP, WROTE, YIELD, Return
from qjam_worker.node.calls import CallDesk
from qjam_worker.node.commands import GiveCalls, Kill, Spare, StopCall, YieldCalls
from qjam_worker.node.pool import GRACE
from qjam_worker.values.outcomes import AGAIN, IN_FILE, RAISED, STOPPED, VALUE
from qjam_worker.wire.frames import Kind
from qjam_worker.worker.calls import AWAKE, FLUSH, PAUSE

from .world import Broken

if TYPE_CHECKING:
    from .calls import CallRun
    from .node import Node, Worker

# What the queue and a ring hold. (In reality 8192 calls and 256 KiB.)
QUEUE, RING = 6, 4
STEP = 2e-6  # seconds, about, for what a worker does between calls
BELL = 3e-5  # seconds until a node hears a worker


class Queue:
    """The queue of a node."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque()

    def __len__(self) -> int:
        return len(self.records)

    def put(self, records: list[Record]) -> int:
        some = records[: QUEUE - len(self.records)]
        self.records += some
        return len(some)

    def drain(self) -> list[Record]:
        records, self.records = [*self.records], deque()
        return records


class Ring:
    """What the calls of one worker have come to. `spoilt`: its process has written over it."""

    def __init__(self) -> None:
        self.words = [0] * 6
        self.records: deque[Return] = deque()
        self.since = 0.0  # when the oldest one was written
        self.spoilt = False

    def put(self, one: Return, now: float) -> bool:
        if len(self.records) >= RING:
            return False
        self.since = self.since if self.records else now
        self.records.append(one)
        self.words[WROTE] += 1
        return True

    def take(self) -> list[Return]:
        if self.spoilt:
            raise ValueError("it makes no sense")
        records, self.records = [*self.records], deque()
        return records

    def clear(self) -> None:
        self.words = [0] * 6
        self.records.clear()
        self.spoilt = False


class Taking:
    """A worker that takes calls, until there are none or it is to yield."""

    def __init__(self, calls: NodeCalls, worker: Worker, seconds: float | None) -> None:
        self.calls, self.worker, self.node = calls, worker, worker.node
        self.ring = calls.rings[worker.index]
        self.rung = self.node.world.now
        self.until = None if seconds is None else self.rung + seconds
        self.record: Record | None = None  # until what it has come to is written
        self.run: CallRun | None = None
        self.state, self.since = "idle", 0.0  # taken, runs, ran; since when it runs

    def soon(self, seconds: float, what: Any, *args: Any) -> None:
        """The next thing that its process does."""
        world, worker = self.node.world, self.worker
        drawn = world.noise(worker.seq, worker.index, world.steps)
        world.at(world.now + seconds * worker.slowness * (0.5 + drawn), self.node, self._do, worker.token, what, *args)

    def _do(self, token: int, what: Any, *args: Any) -> None:
        if token == self.worker.token:
            what(*args)

    def die(self, seconds: float) -> None:
        self.soon(seconds, self.worker.exit, "was killed by signal 9")

    # Step by step

    def take(self, polls: int = 0) -> None:
        queue, words = self.calls.queue, self.ring.words
        if not queue.records:
            self._await(polls)
            return
        words[IDLE] = 0
        self.record = record = queue.records.popleft()
        self.state, self.run = "taken", self.node.cluster.callers.by_id[record.call]
        self.calls.taken_at = self.node.world.now
        self.calls.check_order(record)
        if self.run.how_it_ends("taken"):
            self.die(STEP)
        else:
            seconds = self.run.pause() or STEP
            self.node.longest = max(self.node.longest, 2.0 * seconds * self.worker.slowness)
            self.soon(seconds, self.name)

    def _await(self, polls: int) -> None:
        """The queue is empty: it waits for more for a moment, awake."""
        words = self.ring.words
        if not polls:
            self.calls.ring_bell()
        if polls < 3 and words[YIELD] != self.worker.seq:
            words[IDLE] = 1
            self.soon(AWAKE / 2, self.take, polls + 1)
        else:
            words[IDLE] = 0
            self.leave()

    def name(self) -> None:
        record, run = self.record, self.run
        assert record is not None
        assert run is not None
        self.state, self.ring.words[CALL] = "runs", record.call
        function = self.calls.read(
            record.function_arena, record.function_offset, 8 + len(run.call.function.description)
        )
        if function[8:] != run.call.function.description:
            raise Broken(
                f"{self.worker} of {self.node.name} finds another function for call {record.call}: {function!r}"
            )
        if not run.is_fit():
            self.end(AGAIN, b"")
            return
        if self.calls.read(record.arena, record.offset, record.size) != run.call.data:
            raise Broken(f"{self.worker} of {self.node.name} finds what are not the arguments of call {record.call}")
        if self.ring.words[STOP] == record.call:
            self.end(STOPPED, b"")
            return
        run.begin(self.worker)
        self.since = self.node.world.now
        seconds = run.seconds * self.node.plan.slowness
        self.node.longest = max(self.node.longest, 2.0 * seconds * self.worker.slowness)
        if run.hangs():
            self.node.longest = max(self.node.longest, 100.0)
            self.worker.hang(20.0 + 60.0 * self.node.world.noise(run.number, self.worker.seq))
        elif run.how_it_ends("runs"):
            self.die(seconds)
        elif run.raises:
            self.soon(seconds, self.end, RAISED, b"raises")
        elif run.plan.large:
            self.soon(seconds, self.end, IN_FILE, b"")
        else:
            self.soon(seconds, self.end, VALUE, run.value)

    def interrupted(self) -> None:
        if self.state == "runs" and self.record is not None and self.ring.words[STOP] == self.record.call:
            self.end(STOPPED, b"")

    def end(self, how: int, data: bytes) -> None:
        assert self.run is not None
        if how == IN_FILE:
            data = self.calls.keep(self.worker, self.run.value)
        self.worker.token += 1
        self.state, self.ring.words[CALL] = "ran", 0
        if self.run.how_it_ends("ran"):
            self.die(STEP)
        else:
            self.soon(STEP, self.write, how, data)

    def write(self, how: int, data: bytes) -> None:
        assert self.record is not None
        assert self.run is not None
        now = self.node.world.now
        if not self.ring.put(Return(self.record.call, how, data), now):
            self.calls.ring_bell()
            self.soon(PAUSE, self.write, how, data)
            return
        run, self.record, self.state = self.run, None, "idle"
        if how == AGAIN:
            self.calls.reordered = True
        else:
            run.written(self.worker)
        if run.spoils():
            self.ring.spoilt = True
        if run.how_it_ends("wrote"):
            self.die(STEP)
        elif how == AGAIN:  # another process comes
            self.worker.forget()
            self.soon(0.02 / self.worker.slowness, self.answer)
        elif self.ring.words[YIELD] == self.worker.seq or (self.until is not None and now >= self.until):
            self.leave()
        elif now - self.rung >= FLUSH:
            self.rung = now
            self.calls.ring_bell()
            self.soon(5 * STEP, self.take)
        else:
            self.soon(STEP, self.take)

    def leave(self) -> None:
        self.state = "leaves"
        self.soon(BELL, self.answer)

    def answer(self) -> None:
        self.worker.rest()
        self.calls.on_called(self.worker)

    # What the node does to it

    def stop(self, call: int) -> None:
        worker, world = self.worker, self.node.world
        self.ring.words[STOP] = call
        if worker.kill_at is not None:
            return
        worker.kill_at = world.now + GRACE
        world.at(worker.kill_at, self.node, self._kill, worker.seq, worker.kill_at)
        if self.record is not None and not self.node.cluster.callers.by_id[call].stubborn:
            self.soon(1e-4, self.interrupted)

    def _kill(self, seq: int, kill_at: float) -> None:
        if self.worker.seq == seq and self.worker.kill_at == kill_at:
            self.worker.exit("was killed by signal 9 (it was to stop)")


class NodeCalls:
    """What a node does for calls."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.queue = Queue()
        self.rings = [Ring() for _ in range(node.plan.workers)]
        self.files: dict[str, bytearray] = {}
        self.arenas = Arenas(self)  # type: ignore[arg-type]
        self.desk: CallDesk | None = None
        self.adrift: dict[int, float] = {}  # calls that dead workers had taken, and since when
        self.taken_at = 0.0  # when a worker has last taken one
        self.order: dict[int, int] = {}  # in which they came
        self.reordered = False
        self.idle_since: float | None = None  # beside calls that wait
        self.unwanted_since: dict[int, float] = {}
        self.handlers = {
            Kind.CALLS: self._on_calls,
            Kind.RECALL: self._on_recall,
            Kind.FORGET: lambda header, buffers: node.act(self._open().on_forget(header)),
        }
        self.perform = {
            GiveCalls: self._give,
            YieldCalls: self._yield,
            StopCall: self._stop,
            Spare: lambda command: node.workers[command.worker].spare(),
            Kill: lambda command: self._kill(node.workers[command.worker]),
        }
        self._made = 0

    # Messages and events

    def _on_calls(self, header: dict[str, Any], buffers: list[Any]) -> None:
        desk = self._open()
        for number in header["ids"]:
            self.order[number] = self._made = self._made + 1
        self.node.act([*desk.on_calls(header, buffers), *self.node.scheduler.assign(self.node.world.now)])

    def _on_recall(self, header: dict[str, Any], buffers: list[Any]) -> None:
        now = self.node.world.now
        for number in header["cancelled"]:
            self.unwanted_since.setdefault(number, now)
        self.node.act([*self._open().on_recall(header, now), *self.node.scheduler.assign(now)])

    def _open(self) -> CallDesk:
        if self.desk is None:
            self.desk = CallDesk(self.queue, self.arenas, self.rings, self._opened, self.node.refs)
            self.node.scheduler.calls = self.desk
        return self.desk

    def on_called(self, worker: Worker) -> None:
        assert self.desk is not None
        now, scheduler = self.node.world.now, self.node.scheduler
        commands = [*self.desk.on_called(worker.index, now), *scheduler.on_called(worker.index, now)]
        self.node.act([*commands, *self.desk.look(now), *scheduler.assign(now)])

    def ring_bell(self) -> None:
        """A worker has something to tell."""
        world = self.node.world
        world.at(world.now + BELL * (0.5 + world.noise(self.node.assigned, world.steps)), self.node, self.look)

    def look(self) -> None:
        if self.desk is not None and not self.node.leaving:
            now = self.node.world.now
            self.node.act([*self.desk.look(now), *self.node.scheduler.assign(now)])

    def on_timer(self) -> None:
        if self.desk is not None and self.desk.at is not None and self.desk.at <= self.node.world.now:
            self.look()

    def next_deadline(self) -> float | None:
        return None if self.desk is None else self.desk.at

    def on_exit(self, worker: Worker, taking: Taking | None, how: str) -> list[Any]:
        """The process of a worker has ended, which took calls perhaps."""
        if self.desk is None:
            return []
        ring = self.rings[worker.index]
        if taking is not None and taking.record is not None:
            if taking.state == "runs":
                self.node.cluster.callers.by_id[taking.record.call].deaths += 1
            else:
                self.adrift[taking.record.call] = self.node.world.now
            self.reordered = True
        if ring.spoilt:
            self.adrift.update(dict.fromkeys([one.call for one in ring.records], self.node.world.now))
            for one in ring.records:
                self.node.cluster.callers.by_id[one.call].unread()
        commands: list[Any] = self.desk.on_exit(worker.index, how, self.node.world.now)
        for path in [path for path in self.files if path.startswith(f"result{worker.index}-")]:
            del self.files[path]
        return commands

    # Decisions

    def _give(self, command: GiveCalls) -> None:
        assert self.desk is not None
        worker = self.node.workers[command.worker]
        if worker.seq or not worker.up:
            raise Broken(f"{worker} is to take calls, and is not idle")
        self.desk.on_given(command.worker, self.node.world.now)
        self.node.assigned += 1
        worker.begin(self.node.assigned)
        worker.taking = Taking(self, worker, command.seconds)
        worker.taking.soon(BELL, worker.taking.take)

    def _yield(self, command: YieldCalls) -> None:
        self.rings[command.worker].words[YIELD] = self.node.workers[command.worker].seq

    def _stop(self, command: StopCall) -> None:
        taking = self.node.workers[command.worker].taking
        if taking is None:
            raise Broken(f"worker {command.worker} of {self.node.name} is to stop a call, and takes none")
        taking.stop(command.call)

    def _kill(self, worker: Worker) -> None:
        if worker.up:
            self.node.world.at(self.node.world.now + 1e-4, self.node, self._killed, worker, worker.life)

    def _killed(self, worker: Worker, life: int) -> None:
        if worker.up and worker.life == life:
            worker.exit("was killed by signal 9, for it has spoilt its ring")

    # Bytes

    def create(self, name: str, size: int) -> Mapped:
        """For the arenas."""
        self.node.allocate()
        self.files[name] = bytearray(size)
        return Mapped(f"{self.node.name}/{name}", memoryview(self.files[name]))

    def read(self, number: int, offset: int, size: int) -> bytes:
        file = self.files.get(arena_name(number))
        if file is None:
            raise Broken(f"a worker of {self.node.name} reads arena {number}, which was removed")
        return bytes(file[offset : offset + size])

    def keep(self, worker: Worker, value: bytes) -> bytes:
        """A result goes into a file of its own."""
        self._made += 1
        path = f"result{worker.index}-{self._made}"
        self.files[path] = bytearray(value)
        packed: bytes = msgpack.packb([path, [len(value)]])
        return packed

    def _opened(self, path: str, sizes: list[int]) -> list[Any]:
        if path not in self.files:
            raise Broken(f"{self.node.name} opens the result {path}, which was removed")
        return [bytes(self.files.pop(path))]

    def check_order(self, record: Record) -> None:
        """Where nothing was put back, calls are taken as they came."""
        if not self.reordered and self.queue.records:
            first = min(self.order[other.call] for other in self.queue.records)
            if first < self.order[record.call]:
                raise Broken(f"call {record.call} is taken before others that came before it")
