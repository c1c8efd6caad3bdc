"""Simulated nodes around a real Dispatch, all in memory. Only the time in Dispatch counts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from random import Random
from typing import Any

from qjam.dispatch.commands import Command, Done, Fail, Send
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.rounds import RoundSpec
from qjam_worker.values.codec import Encoded
from qjam_worker.values.reduction import Span, parent
from qjam_worker.wire.frames import Kind, pack, unpack

PARAMS = (b"header", bytes(3934 * 8))  # as many as the paper's autoencoder has
CREDIT = 16 * 1024 * 1024
ENTRY = {"epoch": 1, "reduce": False, "code": None, "module": "work", "function": None}
AT_A_TIME = 100  # messages that are made before the master takes them

Message = tuple[Kind, str, dict[str, Any], list[Any]]
"""A message from a node: kind, name of the node, header, buffers."""


def nothing(round_: int, lo: int, hi: int) -> list[Any]:
    """Give frames for a result that nobody looks at."""
    return [b"result"]


@dataclass
class Swarm:
    """A master's dispatch and its nodes, which answer when `deliver`, `settle` or `wait` let them.

    Attributes:
        frames: called with a round, lo and hi; gives the frames of the result over slices [lo, hi).
        spent: seconds of CPU in Dispatch so far.
        moment: seconds of simulated time between messages.
        shares: whether nodes share slices when the master asks them.
        wired: seconds of CPU for packing and unpacking messages so far; counted only if `wire` is true.
        given, taken: slices given out so far; slices whose result was taken so far.
        messages: number of messages sent or received so far.
    """

    workers: int
    frames: Callable[[int, int, int], list[Any]] = nothing
    moment: float = 1e-6
    wire: bool = False
    shares: bool = True
    spent: float = 0.0
    wired: float = 0.0
    given: int = 0
    taken: int = 0
    messages: int = 0
    now: float = 1.0
    done: dict[int, list[tuple[Span, Encoded]]] = field(default_factory=dict)
    failed: list[Fail] = field(default_factory=list)
    tasks: dict[tuple[str, int], set[int]] = field(default_factory=dict)  # slices that nodes owe, by node and round
    answers: list[Message] = field(default_factory=list)  # to be delivered next

    def __post_init__(self) -> None:
        self.dispatch = Dispatch()
        self._rounds = self._names = 0
        self._shared: defaultdict[tuple[str, int], set[int]] = defaultdict(set)  # by node and round
        self._take: dict[Kind, Callable[[str, dict[str, Any], list[Any]], list[Command]]] = {
            Kind.HELLO: lambda name, header, buffers: self.dispatch.on_hello(name, header),
            Kind.RESULT: self.dispatch.on_result,
            Kind.PONG: lambda name, header, buffers: [],
            Kind.STATE: self._on_state,
        }
        self._heed: dict[Kind, Callable[[Send], None]] = {
            Kind.WELCOME: self._welcomed,
            Kind.TASK: self._tasked,
            Kind.CANCEL: self._cancelled,
            Kind.SHARE: self._asked,
            Kind.PING: self._pinged,
        }

    # What a play can do

    def join(self, count: int) -> list[str]:
        """Let `count` nodes join; gives their names."""
        names = [self._new_name() for _ in range(count)]
        self._count(partial(self._add, names))
        for name in names:
            self._say_hello(name)
        self.settle()
        return names

    def lose(self, names: Iterable[str]) -> list[str]:
        """Lose nodes, one after the other; their hosts start new ones. Gives the names of the new nodes."""
        successors = []
        for name in names:
            for owner, number in [key for key in self.tasks if key[0] == name]:
                del self.tasks[owner, number]
            successor = self._new_name()
            self._carry_out(self._count(partial(self._replace, name, successor)))
            self._say_hello(successor)
            successors.append(successor)
        return successors

    def _replace(self, name: str, successor: str) -> list[Command]:
        commands = self.dispatch.on_node_lost(name, "lost")
        self.dispatch.add_successor(name, successor)
        return [*commands, *self.dispatch.reassign()]

    def submit(self, spec: RoundSpec) -> int:
        """Begin a round; gives its number."""
        self._rounds += 1
        number, deadline = self._rounds, self.now + 3600.0
        submit = partial(self.dispatch.on_submit, number, spec, deadline, self.now)
        self._carry_out(self._count(submit))
        return number

    def results(
        self, names: Iterable[str] | None = None, *, each: bool = False, order: Random | None = None
    ) -> Iterator[Message]:
        """Give the RESULTs of these nodes (None: of all) for the slices that they owe.

        One RESULT per node and round or, with `each`, per slice; node by node, or shuffled by `order`.
        """
        whose = None if names is None else set(names)
        keys = [key for key in self.tasks if whose is None or key[0] in whose]
        done: list[tuple[str, int, int, Iterable[int]]] = []
        for name, number in keys:
            indices, nslices = self.tasks.pop((name, number)), self.dispatch.rounds[number].data.nslices
            done += [(name, number, nslices, its) for its in ([(i,) for i in indices] if each else [indices])]
        if order is not None:
            order.shuffle(done)
        return (self._result(*some) for some in done)

    def _result(self, name: str, number: int, nslices: int, indices: Iterable[int]) -> Message:
        roots = spans(indices, nslices)
        frames = [self.frames(number, lo, hi) for lo, hi in roots]
        header = {
            "round": number,
            "roots": [[lo, hi, len(its)] for (lo, hi), its in zip(roots, frames, strict=True)],
            "seconds": 0.1,
        }
        return Kind.RESULT, name, header, [frame for its in frames for frame in its]

    def deliver(self, messages: Iterable[Message]) -> None:
        """Let the master take these messages, and run its timers in between, as its engine would.

        `messages` is consumed a few at a time, since in reality messages have just arrived and lie in the caches.
        """
        messages = iter(messages)
        while some := list(islice(messages, AT_A_TIME)):
            self.messages += len(some)
            results = (header for kind, _, header, _ in some if kind is Kind.RESULT)
            self.taken += sum(hi - lo for header in results for lo, hi, _ in header["roots"])
            self._carry_out(self._count(partial(self._hear, some)))
            if self.wire:
                frames = [pack(kind, header, buffers) for kind, _, header, buffers in some]
                began = time.process_time()
                for message in frames:
                    unpack(message)
                self.wired += time.process_time() - began

    def settle(self) -> None:
        """Deliver the immediate answers of nodes (HELLO, PONG, shares) until there are none."""
        while self.answers:
            answers, self.answers = self.answers, []
            self.deliver(answers)

    def wait(self, seconds: float) -> None:
        """Let `seconds` of simulated time pass; run every timer at its time, and deliver immediate answers."""
        until = self.now + seconds
        while (due := self.dispatch.next_deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self._carry_out(self._count(partial(self.dispatch.on_timer, self.now)))
            self.settle()
        self.now = until

    # Inside

    def _count(self, call: Callable[[], list[Command]]) -> list[Command]:
        began = time.process_time()
        commands = call()
        self.spent += time.process_time() - began
        return commands

    def _add(self, names: list[str]) -> list[Command]:
        for name in names:
            self.dispatch.add_node(name, name.partition("/")[0], self.workers)
        return []

    def _hear(self, messages: list[Message]) -> list[Command]:
        dispatch, take = self.dispatch, self._take
        commands: list[Command] = []
        for kind, name, header, buffers in messages:
            self.now = now = self.now + self.moment
            if name not in dispatch.nodes:
                continue
            commands += dispatch.on_heard(name, now)
            commands += take[kind](name, header, buffers)
            due = dispatch.next_deadline()
            if due is not None and due <= now:
                commands += dispatch.on_timer(now)
        return commands

    def _on_state(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        if header["state"] == "ready":
            return self.dispatch.on_ready(name, header["workers"])
        return self.dispatch.on_shared(name, header)

    def _carry_out(self, commands: list[Command]) -> None:
        sends = [command for command in commands if isinstance(command, Send)]
        self.messages += len(sends)
        if self.wire:
            began = time.process_time()
            for send in sends:
                pack(*_as_sent(send))
            self.wired += time.process_time() - began
        for command in commands:
            if isinstance(command, Send):
                if command.kind in self._heed:
                    self._heed[command.kind](command)
            elif isinstance(command, Done):
                self.done[command.round] = command.roots
            elif isinstance(command, Fail):
                self.failed.append(command)

    def _new_name(self) -> str:
        self._names += 1
        return f"host{self._names:05}/1"

    def _say_hello(self, name: str) -> None:
        self.answers.append((Kind.HELLO, name, {"workers": self.workers, "credit": CREDIT}, []))

    def _welcomed(self, send: Send) -> None:
        pids = list(range(1000, 1000 + self.workers))
        self.answers.append((Kind.STATE, send.node, {"state": "ready", "workers": pids}, []))

    def _tasked(self, send: Send) -> None:
        self.given += len(send.header["indices"])
        self.tasks.setdefault((send.node, send.header["round"]), set()).update(send.header["indices"])

    def _cancelled(self, send: Send) -> None:
        key = send.node, send.header["round"]
        self._shared.pop(key, None)
        left = self.tasks.get(key, set()).difference(send.header.get("indices", self.tasks.get(key, ())))
        if left:
            self.tasks[key] = left
        else:
            self.tasks.pop(key, None)

    def _asked(self, send: Send) -> None:
        """Answer as a node that has begun nothing yet; it shares no slice twice."""
        number, count = send.header["round"], send.header["count"]
        key = send.node, number
        indices = sorted(self.tasks.get(key, set()).difference(self._shared[key]))[-count:] if self.shares else []
        self._shared[key].update(indices)
        header = {"state": "shared", "round": number, "for": send.header["for"], "indices": indices}
        self.answers.append((Kind.STATE, send.node, header, []))

    def _pinged(self, send: Send) -> None:
        self.answers.append((Kind.PONG, send.node, send.header, []))


def spans(indices: Iterable[int], nslices: int) -> list[Span]:
    """Give the largest complete subtrees, in the tree over `nslices` slices, that `indices` make up."""
    held = {(index, index + 1) for index in indices}
    level = held
    while level:
        above = {parent(span, nslices) for span in level} - level
        whole = {span for span in above if set(_halves(span, nslices)) <= held}
        held = held.difference(half for span in whole for half in _halves(span, nslices)) | whole
        level = whole
    return sorted(held)


def _halves(span: Span, nslices: int) -> tuple[Span, Span]:
    lo, hi = span
    middle = lo + (1 << ((hi - lo - 1).bit_length() - 1))
    return (lo, middle), (middle, hi)


def _as_sent(send: Send) -> tuple[Kind, dict[str, Any], tuple[Any, ...]]:
    """Give kind, header and buffers as the engine sends them: with the params if the node lacks them."""
    if send.kind is Kind.TASK and send.header["params"] == "send":
        return send.kind, {**send.header, "params": "inline"}, PARAMS
    return send.kind, send.header, send.buffers
