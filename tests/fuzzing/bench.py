"""A real engine without its thread: virtual time, a network of queues, rounds whose every part has a known origin."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgpack
import numpy as np

from qjam.data.leases import Lease
from qjam.dispatch.call import Call, Function
from qjam.dispatch.commands import Ended, Failure
from qjam.dispatch.jobs import JobSpec
from qjam.dispatch.rounds import RoundSpec
from qjam.dispatch.states import PRESENT, NodeState
from qjam.engine import call_queue, carrying_out, inbox, loader, loop
from qjam.engine.engine import Engine
from qjam.engine.loader import Blob, Loader
from qjam.engine.pending import Pending
from qjam_worker.node import node, params, pool
from qjam_worker.values import codec
from qjam_worker.values.outcomes import VALUE
from qjam_worker.values.reduction import Tree, default_reduce
from qjam_worker.wire import transfers
from qjam_worker.wire.frames import Kind, Message, WireError, unpack

from .mutation import Frames, Lore
from .peer import CREDIT, MODULES, mapped

# Everything small, so that a few messages reach every limit.
BLOCK_BYTES, INLINE, MAX_UNREAD, SLOT = 64, 200, 20_000, 4096


class Broken(AssertionError):
    """What must never happen has happened."""


class Clock:
    """Stands for the module `time` in the engine."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@contextlib.contextmanager
def small() -> Iterator[Clock]:
    """With a clock of our own and small limits."""
    clock = Clock()
    changes: list[tuple[Any, str, Any]] = [
        (carrying_out, "time", clock), (inbox, "time", clock), (loop, "time", clock), (call_queue, "time", clock),
        (carrying_out, "PARAMS_INLINE", INLINE),
        (inbox, "MAX_UNREAD", MAX_UNREAD), (transfers, "BLOCK_BYTES", BLOCK_BYTES),
        (pool, "SLOT", SLOT), (params, "SLOT", SLOT),
        (node, "CREDIT", CREDIT),
        (loader, "HashedBlob", lambda pieces, *_: Blob(pieces)),  # slices have names here that are no hashes
    ]  # fmt: skip
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield clock
    finally:
        for (module, name, _), value in zip(changes, before):
            setattr(module, name, value)


class Data:
    """A data set: slice i of it is found by its ref."""

    def __init__(self, number: int, nslices: int) -> None:
        self.refs = [f"d{number}-{index}" for index in range(nslices)]
        self.known = {ref: np.arange(index, index + 12.0) for index, ref in enumerate(self.refs)}

    def slice_from_hash(self, hash: str) -> Any:
        return self.known[hash]


class Run:
    """One round and what is known of it from outside."""

    def __init__(self, pending: Pending, params: Any, data: Data | None) -> None:
        self.pending = pending
        self.params = params
        self.data = data
        self.nslices = pending.spec.nslices
        self.cancelled = False
        self.given: dict[str, set[int]] = defaultdict(set)  # by the TASKs that went out
        self.sent: dict[tuple[int, int], list[tuple[str, list[bytes]]]] = defaultdict(list)  # root -> who, what
        self.accused: set[str] = set()  # nodes that were in it and have said that it cannot go on

    @property
    def over(self) -> bool:
        return self.pending.roots is not None or self.pending.failure is not None

    def value(self, lo: int, hi: int) -> Any:
        """The right result of a node of the tree."""
        tree = Tree(self.nslices)
        for index in range(lo, hi):
            part = None if self.data is None else self.data.known[self.data.refs[index]]
            tree.add((index, index + 1), mapped(self.params, part, index))
        tree.fold(default_reduce)
        return tree.values[lo, hi]


class Bench:
    """The engine and its rounds. `nodes` is filled by whoever makes the nodes; each takes what the engine sends."""

    def __init__(self, clock: Clock, rng: Random, *, speculation: bool = True) -> None:
        self.clock = clock
        self.rng = rng
        self.engine = Engine(self.find_module, speculation=speculation)
        self.engine._inbox.on_print = self.on_print
        self.engine._carrier.observer = self
        self.loader = Loader(self.find_module)
        self.engine._loader.load = self.load  # type: ignore[method-assign]
        self.engine._router.send = self.send  # type: ignore[method-assign]
        self.loads: deque[tuple[Any, ...]] = deque()
        self.deliver: dict[str, Callable[[Message], None]] = {}
        self.runs: dict[int, Run] = {}
        self.jobs: dict[int, Any] = {}  # code and slices of all there have been
        self.made = 0
        self.data: list[Data] = []
        self.sent_refs: dict[str, int] = defaultdict(int)  # bytes to each node
        self.printed: dict[str, int] = defaultdict(int)
        self.asked_modules: set[str] = set()
        self.lost: dict[str, str] = {}  # and why
        self.broken: list[str] = []  # what was seen where nobody may raise
        self.successor: Callable[[str], str | None] = lambda name: None
        self.calls: dict[int, Call] = {}  # that have not ended
        self.function = Function(1, b"function 1")
        self.calls_made = 0
        self.engine._carrier.on_ended = self.on_ended

    def close(self) -> None:
        engine = self.engine
        engine._router.close()
        engine._loop.selector.close()
        engine._calls.close()

    # What the engine calls

    def find_module(self, name: str) -> bytes:
        self.asked_modules.add(name)
        found = {"source": b"x = 1\n" * 30, "path": f"/{name}.py", "package": False} if name in MODULES[:2] else None
        data: bytes = msgpack.packb(found)
        return data

    def on_print(self, node: str, host: str, worker: int, stream: int, data: bytes) -> None:
        if worker >= self.engine.dispatch.nodes[node].workers or stream not in (1, 2):
            self.broken.append(f"{node} prints as worker {worker} on {stream}")
        self.printed[node] += len(data)

    def load(self, ref: str, pending: Pending | None, done: Any, failed: Any) -> None:
        self.loads.append((ref, pending, done, failed))

    def send(self, name: str, frames: list[Any]) -> bool:
        if name not in self.deliver:
            return False
        message = unpack([memoryview(bytes(frame)) for frame in frames])
        if message.kind is Kind.TASK and message.header["round"] in self.runs:
            self.runs[message.header["round"]].given[name].update(message.header["indices"])
        if message.kind is Kind.REFS:
            self.sent_refs[name] += sum(map(len, message.buffers))
        self.deliver[name](message)
        return True

    def on_ready(self, name: str) -> None: ...

    def on_note(self, text: str, level: int = logging.WARNING) -> None: ...

    def on_lost(self, name: str, why: str) -> None:
        self.lost[name] = why
        self.deliver.pop(name, None)
        successor = self.successor(name)
        if successor is not None:
            self.engine.add_successor(name, successor)

    # What happens

    def submit(self) -> None:
        rng, kind = self.rng, self.rng.randrange(4)
        self.made += 1
        nslices = rng.choice((1, 2, 3, 5, 8, 12))
        data = None
        if kind:
            if len(self.data) < 3:
                self.data.append(Data(len(self.data), nslices))
            data = rng.choice(self.data)
            nslices = len(data.refs)
        params = rng.choice((None, 0.5, np.linspace(0.0, 1.0, 60)))
        code = "abc" if rng.random() < 0.3 else None
        entry = {"epoch": 1, "reduce": False, "code": code, "shadows": [], "module": "m", "function": None}
        lease = None if data is None else Lease(tuple(data.refs), 100, held=rng.random() < 0.5)
        spec = RoundSpec(JobSpec(code, entry), nslices, lease)
        deadline = self.clock.now + 40.0 if rng.random() < 0.1 else None
        pending = Pending(spec, b"code" * 50 if code else None, codec.encode(params), data, deadline)
        pending.number = self.made
        self.runs[self.made] = Run(pending, params, data)
        self.jobs[self.made] = spec.job.key, spec.refs
        self.engine._carrier.submit(pending)

    def cancel(self) -> None:
        if self.runs:
            number = self.rng.choice(list(self.runs))
            self.runs[number].cancelled = True
            self.engine._carrier.act(self.engine.dispatch.on_cancel(number, Failure("cancelled", "cancelled")))

    def submit_calls(self) -> None:
        """Some calls, now and then of another function."""
        rng, calls = self.rng, self.engine.dispatch.calls
        if len(self.calls) > 50:
            return
        if rng.random() < 0.3:
            self.engine._carrier.act(calls.forget(self.function))
            self.function = Function(self.function.number + 1, b"function %d" % (self.function.number + 1))
        datas = [rng.randbytes(rng.choice((4, 50))) for _ in range(rng.choice((1, 3, 20)))]
        made = [Call(rng.randrange(2), self.function, data) for data in datas]
        self.calls_made += len(made)
        self.calls.update(enumerate(made, calls._made + 1))
        self.engine._carrier.act(self.engine.dispatch.on_calls(made, self.clock.now))

    def cancel_calls(self) -> None:
        if self.calls:
            some = self.rng.sample(list(self.calls.values()), self.rng.randint(1, len(self.calls)))
            for call in some:
                del self.calls[call.id]
            self.engine._carrier.act(self.engine.dispatch.calls.cancel(some))

    def on_ended(self, ended: Ended) -> None:
        for returned in ended.returned:
            call = returned.call
            if self.calls.pop(call.id, None) is not call:
                self.broken.append(f"{call} ends, and has ended or was never made")
            honest = self.is_honest(returned.host)
            if honest and (returned.how, b"".join(returned.data)) != (VALUE, b"value of " + call.data):
                self.broken.append(f"{call} has come to {returned}")
        for call, failure in ended.failed:
            if self.calls.pop(call.id, None) is not call or any(map(self.is_honest, self.deliver)):
                self.broken.append(f"{call} has failed: {failure}")

    def do_load(self) -> None:
        """The loader is done with one; what it says is heard by the loop, as all calls are."""
        ref, pending, done, failed = self.loads.popleft()
        try:
            blob = self.loader._blob(ref, pending)
        except Exception as error:
            failed(error)
        else:
            done(blob)
        self.turn()

    def turn(self) -> None:
        """A turn of the engine's loop, without messages."""
        self.engine._calls.make()
        with contextlib.suppress(BlockingIOError):
            self.engine._calls.wake()

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.engine._loop._on_time(self.clock.now)

    def say(self, name: str, frames: Frames) -> str:
        """A message arrives; gives what became of it."""
        engine = self.engine
        message, verdict = None, "harmless"
        try:
            message = unpack(frames)
        except WireError as error:
            verdict = "schema" if str(error).startswith("the header of") or " buffers" in str(error) else "frames"
        if message is not None:
            self._note(name, message)
        there = name in self.deliver
        engine._inbox.on_frames(name, [memoryview(frame) for frame in frames])
        if self.broken:
            raise Broken("; ".join(self.broken))
        if engine._carrier._acting or engine._carrier._commands:
            raise Broken("commands are left over")
        if verdict != "harmless" and there and name in self.deliver:
            raise Broken(f"{name} has sent what is no message and is still there")
        if verdict == "harmless" and there and name not in self.deliver:
            verdict = "left" if message is not None and message.kind is Kind.BYE else "meaning"
        self.check_ends()
        return verdict if there else "ignored"

    def _note(self, name: str, message: Message) -> None:
        number = message.header.get("round")
        run = self.runs.get(number) if type(number) is int else None
        if run is None or name not in self.deliver:
            return
        if message.kind is Kind.RESULT:
            position = 0
            for lo, hi, count in message.header["roots"]:
                frames = [bytes(buffer) for buffer in message.buffers[position : position + count]]
                position += count
                if len(frames) == count > 0:
                    run.sent[lo, hi].append((name, frames))
        if message.kind is Kind.ERROR or message.header.get("state") == "lost":
            run.accused.add(name)

    # What must hold

    def check_ends(self) -> None:
        for number in [number for number, run in self.runs.items() if run.over]:
            self.check_end(self.runs.pop(number))

    def check_end(self, run: Run) -> None:
        """Each part of the result comes from a node that was given it, and is right unless that node is the liar."""
        failure = run.pending.failure
        if failure is not None:
            allowed = {"cancelled": run.cancelled, "timeout": run.pending.deadline is not None}
            at_fault = [name for name in run.accused if run.given[name]]
            if not allowed.get(failure.what, bool(at_fault) and failure.what in ("task", "room", "node", "lost")):
                raise Broken(f"round {run.pending.number} has ended with {failure}")
            return
        roots, end, right = run.pending.roots or [], 0, True
        for (lo, hi), encoded in roots:
            if lo != end:
                raise Broken(f"the roots {[span for span, _ in roots]} do not follow each other")
            end = hi
            data = [bytes(frame) for frame in (encoded.header, *encoded.buffers)]
            origins = [name for name, sent in run.sent[lo, hi] if sent == data]
            if not any(run.given[name].issuperset(range(lo, hi)) for name in origins):
                raise Broken(f"[{lo}, {hi}) of round {run.pending.number} is of {origins}, who were not given it")
            is_right = opened(data) == packed(run.value(lo, hi))
            if not is_right and any(self.is_honest(name) for name in origins):
                raise Broken(f"an honest node has sent a wrong [{lo}, {hi}) of round {run.pending.number}")
            right = right and is_right
        if end != run.nslices:
            raise Broken(f"the roots end at {end} of {run.nslices}")
        if right:
            tree = Tree(run.nslices)
            for span, encoded in roots:
                tree.add(span, codec.decode(encoded.header, encoded.buffers, copy=True))
            tree.fold(default_reduce)
            if packed(tree.values[0, run.nslices]) != packed(run.value(0, run.nslices)):
                raise Broken(f"round {run.pending.number} has a wrong result of right parts")

    def is_honest(self, name: str) -> bool:
        return name.startswith("honest")

    def check_credit(self) -> None:
        for name, record in self.engine.dispatch.nodes.items():
            if record.transfers.credit < 0 or record.transfers.sent < 0:
                raise Broken(f"{name} has the credit {record.transfers.credit}")

    def check_empty(self) -> None:
        """Nothing is left of rounds that are over, nor of nodes that have gone."""
        engine, dispatch = self.engine, self.engine.dispatch
        left = {
            "rounds": dispatch.rounds, "pending": engine._carrier.pending, "commands": engine._carrier._commands,
            "nodes": set(engine._peers) - set(dispatch.nodes),
            "blobs": [ref for node in engine._peers.values() for ref in node.blobs if ":" not in ref],
            "transfers": [
                transfer for node in dispatch.nodes.values() for transfer in node.transfers
                if not transfers.is_module(transfer.ref)
            ],
            "jobs": [] if len(dispatch._jobs) <= 64 + 3 else dispatch._jobs,
        }  # fmt: skip
        calls = dispatch.calls
        left["calls"] = calls.calls
        found = {name: what for name, what in left.items() if what}
        if found:
            raise Broken(f"left over: {found}")

    def lore(self) -> Lore:
        """What a liar may know."""
        numbers = [*self.runs, self.made, self.made + 1, *range(13)]
        refs = [ref for data in self.data for ref in data.refs[:2]]
        names = [*refs, f"params:{self.made}", "code:abc", "module:1:helper", "module:1:os"]
        return Lore(numbers, [*names, *self.engine.dispatch.nodes])

    def is_present(self, name: str) -> bool:
        record = self.engine.dispatch.nodes.get(name)
        return record is not None and record.state in PRESENT

    def state(self, name: str) -> NodeState | None:
        record = self.engine.dispatch.nodes.get(name)
        return None if record is None else record.state


def packed(value: Any) -> bytes:
    encoded = codec.encode(value)
    return b"".join([encoded.header, *encoded.buffers])


def opened(frames: list[bytes]) -> bytes | None:
    """The value that they are, in the one form that values are compared in."""
    try:
        return packed(codec.decode(frames[0], frames[1:], allow_pickle=False))
    except codec.CodecError:
        return None
