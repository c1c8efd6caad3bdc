"""Virtual time, what runs in it, and the links between: everything that is neither the master's nor a node's."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from qjam_worker.wire.frames import Kind, pack, unpack
from qjam_worker.wire.refs import Ref, is_ref

from .plans import Plan
from .usercode import noise


class Broken(AssertionError):
    """An invariant does not hold."""


def hold(truth: Any, what: str, *about: Any) -> None:
    """Broken unless `truth` holds."""
    if not truth:
        raise Broken(" ".join([what, *map(str, about)]))


class Message(NamedTuple):
    kind: Kind
    header: dict[str, Any]
    buffers: list[Any]


class Process:
    """Something with a loop of its own: what happens to it waits while it is frozen, and is lost once it is dead."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.frozen = False
        self.frozen_at = self.thawed_at = 0.0
        self.deferred: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._timer_at: float | None = None

    def freeze(self, seconds: float) -> None:
        self.frozen, self.frozen_at = True, self.world.now
        self.world.at(self.world.now + seconds, None, self.thaw)

    def thaw(self) -> None:
        if not (self.alive and self.frozen):
            return
        self.frozen, self.thawed_at = False, self.world.now
        if self.world.trace is not None:
            self.world.say(self.name, "runs again")
        while self.deferred:
            call, args = self.deferred.popleft()
            call(*args)
        self.after()

    def next_deadline(self) -> float | None:
        raise NotImplementedError

    def on_timer(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError

    def after(self) -> None:
        """To be called after each event."""
        self.check()
        deadline = self.next_deadline()
        if deadline is not None and (self._timer_at is None or deadline < self._timer_at):
            self._timer_at = deadline
            self.world.at(max(deadline, self.world.now), None, self._timer, deadline)

    def _timer(self, deadline: float) -> None:
        if deadline != self._timer_at or not self.alive:
            return
        self._timer_at = None
        if self.frozen:
            return  # looked at again when it is thawed
        due = self.next_deadline()
        if due is not None and due <= self.world.now:
            self.on_timer()
        self.after()


class World:
    """The events to come, by time."""

    def __init__(self, plan: Plan, *, trace: bool = False) -> None:
        self.plan = plan
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.trace: list[str] | None = [] if trace else None
        self.steps = 0
        self._heap: list[tuple[float, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._made = 0

    def say(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:10.4f}  {who:<10} {what}")

    def at(self, time: float, process: Process | None, call: Callable[..., None], *args: Any) -> None:
        """Have something happen, to a process if it is given."""
        self._made += 1
        heapq.heappush(self._heap, (time, self._made, process, call, args))

    def noise(self, *key: int) -> float:
        return noise(self.plan.seed, *key)

    def run(self, until: float) -> None:
        """Let everything happen. Broken when it goes on for longer than `until`, or never moves on."""
        heap, at_once = self._heap, 0
        while heap:
            time, _, process, call, args = heapq.heappop(heap)
            at_once = 0 if time > self.now else at_once + 1
            if at_once > 5000:
                raise Broken("time does not move on: something is done again and again")
            if time > until:
                if process is not None and self.is_stale(call, args):
                    continue
                raise Broken(self.late())
            self.now = time
            self.steps += 1
            if process is None:
                call(*args)
            elif process.frozen:
                process.deferred.append((call, args))
            elif process.alive:
                call(*args)
                process.after()

    def is_stale(self, call: Callable[..., None], args: tuple[Any, ...]) -> bool:
        """Whether nothing is going to come of an event, because things have turned out otherwise."""
        raise NotImplementedError

    def late(self) -> str:
        raise NotImplementedError


class Way:
    """One direction of a link: what is sent comes in that order, each message after a while, or not at all."""

    def __init__(self, link: Link, key: int) -> None:
        self.link = link
        self.key = key
        self.under_way: deque[Message] = deque()
        self._last = 0.0
        self._sent = 0

    def send(self, receiver: Process, receive: Callable[[Message], None], message: Message, size: int) -> None:
        link, world = self.link, self.link.world
        if link.broken:
            return
        if world.plan.wire:
            message = _through_the_wire(message)
        self._sent += 1
        drawn = world.noise(link.key, self.key, self._sent)
        delay = link.latency * (0.5 + link.jitter * drawn * drawn * drawn) + size / link.bandwidth
        self._last = max(self._last + 1e-9, world.now + delay, link.up_at + 1e-6 * drawn)
        self.under_way.append(message)
        world.at(self._last, receiver, self._deliver, link.epoch, receive)

    def _deliver(self, epoch: int, receive: Callable[[Message], None]) -> None:
        if epoch == self.link.epoch:
            receive(self.under_way.popleft())


class Link:
    """What lies between the master and one node."""

    def __init__(self, world: World, key: int, latency: float, jitter: float, bandwidth: float) -> None:
        self.world = world
        self.key = key
        self.latency, self.jitter, self.bandwidth = latency, jitter, bandwidth
        self.up_at = self.down_at = 0.0
        self.epoch = 0
        self.broken = False
        self.down = Way(self, 1)
        self.up = Way(self, 2)

    def lose(self, *, both: bool = True) -> None:
        """It breaks; what was on its way is lost, that to the master perhaps not."""
        self.broken = True
        self.down.under_way.clear()
        if both:
            self.epoch += 1
            self.up.under_way.clear()


def _through_the_wire(message: Message) -> Message:
    frames = pack(message.kind, message.header, [b"" for _ in message.buffers])
    read = unpack(frames)
    return Message(read.kind, read.header, message.buffers)


def told(kind: Kind, header: dict[str, Any]) -> str:
    """A message in a few words."""
    keys = ("state", "round", "job", "indices", "slices", "slice", "what", "roots", "refs", "for", "count", "ref",
            "offset", "gone", "bytes", "worker", "forget", "reason", "ids", "of", "how", "new", "begun", "left",
            "cancelled", "recalled", "functions", "arguments")  # fmt: skip
    words = [f"{key} {_short(header[key])}" for key in keys if header.get(key) not in (None, [])]
    return " ".join([kind.name, *words])


def _short(value: Any) -> Any:
    return str(Ref(*value)) if is_ref(value, 1000) else value
