"""What a node does, without processes and files: the real scheduler, workers that compute in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from qjam_worker.node.commands import Command, Drop, Ended, Forget, Give, Interrupt, Tell
from qjam_worker.node.results import Held
from qjam_worker.node.scheduler import Scheduler
from qjam_worker.values import codec, flat
from qjam_worker.values.outcomes import AGAIN, LOST, STOPPED, VALUE
from qjam_worker.values.reduction import Tree, default_reduce
from qjam_worker.wire import frames
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import MODULE, Ref, of_module, of_params

from .mutation import Frames

CREDIT = 1024
MODULES = ("helper", "package.part", "absent")


def noise(*key: int) -> float:
    """A number that depends on the key alone, of widely different magnitudes: no two orders of adding give the same."""
    drawn = (hash(key) & 0xFFFFFFFF) / 2.0**32
    return (drawn - 0.5) * 10.0 ** (hash((*key, 7)) % 24 - 12)


def mapped(params: Any, data: Any, index: int) -> Any:
    """The mapfunc of all rounds."""
    factor = 1.0 if params is None else float(np.sum(params))
    own = 0.0 if data is None else float(np.sum(data))
    return np.array([noise(index, 1) * factor, own, noise(index, 2)])


def flat_bytes(value: Any) -> memoryview:
    encoded = codec.encode(value)
    return memoryview(b"".join(flat.pieces(encoded)))


class Refs:
    """The store: refs in memory."""

    def __init__(self) -> None:
        self.content: dict[Ref, tuple[bytearray, int]] = {}

    def __contains__(self, ref: Ref) -> bool:
        data, total = self.content.get(ref, (b"", 1))
        return len(data) == total

    def have(self, ref: Ref) -> int:
        return len(self.content[ref][0]) if ref in self.content else 0

    def pin(self, ref: Ref) -> None: ...
    def unpin(self, ref: Ref) -> None: ...


class Peer:
    """One node that plays by the rules; raises where the master does not."""

    def __init__(self, name: str, workers: int, rng: Random) -> None:
        self.name = name
        self.rng = rng
        self.workers = workers
        self.refs = Refs()
        self.scheduler = Scheduler(workers, self.refs)
        self.inbox: deque[frames.Message] = deque()
        self.out: deque[Frames] = deque()
        self.todo: deque[Give] = deque()
        self.interrupted: set[int] = set()
        self.params: dict[int, Any] = {}
        self.modules: set[str] = set()
        self.calls: deque[tuple[int, bytes]] = deque()
        self.functions: set[int] = set()
        self.unprinted = 0
        self.welcome = False
        self.told_bye = False
        self.now = 0.0
        self.handlers: dict[Kind, Callable[[dict[str, Any], list[Any]], None]] = {
            Kind.WELCOME: self.on_welcome,
            Kind.JOB: lambda header, buffers: self.act(self.scheduler.on_job(header)),
            Kind.DATA: lambda header, buffers: self.act(self.scheduler.on_data(header)),
            Kind.TASK: self.on_task,
            Kind.SHARE: lambda header, buffers: self.act(self.scheduler.on_share(header, self.now)),
            Kind.RELEASE: lambda header, buffers: self.act(self.scheduler.on_release(header)),
            Kind.REFS: self.on_refs,
            Kind.CREDIT: self.on_credit,
            Kind.CANCEL: lambda header, buffers: self.act(self.scheduler.on_cancel(header, self.now)),
            Kind.PING: lambda header, buffers: self.send(Kind.PONG, header),
            Kind.BYE: self.on_bye,
            Kind.CALLS: self.on_calls,
            Kind.RECALL: self.on_recall,
            Kind.FORGET: lambda header, buffers: self.functions.difference_update(header["functions"]),
        }
        self.send(
            Kind.HELLO,
            {"workers": workers, "credit": CREDIT},
        )

    def send(self, kind: Kind, header: dict[str, Any], buffers: Any = ()) -> None:
        self.out.append([bytes(frame) for frame in frames.pack(kind, header, buffers)])

    def receive(self) -> None:
        message = self.inbox.popleft()
        self.handlers[message.kind](message.header, message.buffers)

    def act(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Tell):
                self.send(*command)
            elif isinstance(command, Give):
                self.todo.append(command)
            elif isinstance(command, Interrupt):
                self.interrupted.add(command.worker)
            elif isinstance(command, Ended):
                self.params.pop(command.round, None)
            else:
                assert isinstance(command, (Forget, Drop))

    def on_welcome(self, header: dict[str, Any], buffers: list[Any]) -> None:
        assert not self.welcome
        self.welcome = True
        self.act(self.scheduler.on_welcome(header))
        self.send(Kind.STATE, {"state": "ready", "workers": list(range(100, 100 + self.workers))})
        for worker in range(self.workers):
            self.act(self.scheduler.on_ready(worker, self.now))

    def on_bye(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.told_bye = True

    def on_task(self, header: dict[str, Any], buffers: list[Any]) -> None:
        number = header["round"]
        if number not in self.scheduler.rounds:
            if header["params"] == "have":
                return
            large = header["params"] == "ref"
            self.params[number] = of_params(number) if large else codec.decode(buffers[0], buffers[1:])
        self.act(self.scheduler.on_task(header, self.now))

    def on_refs(self, header: dict[str, Any], buffers: list[Any]) -> None:
        ref = Ref(*header["ref"])
        if header.get("gone"):
            self.act(self.scheduler.on_gone(ref))
            return
        piece = b"".join(buffers)
        data, total = self.refs.content.setdefault(ref, (bytearray(), header["total"]))
        assert total == header["total"]
        assert header["offset"] <= len(data)
        assert header["offset"] + len(piece) <= total
        data += piece[len(data) - header["offset"] :]
        self.send(Kind.CREDIT, {"bytes": len(piece)})
        if ref in self.refs:
            self.act(self.scheduler.on_arrived(ref, self.now))
            if ref.kind == MODULE:
                del self.refs.content[ref]
                self.modules.add(ref)

    def on_credit(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.unprinted -= header["bytes"]
        assert self.unprinted >= 0

    # Calls

    def on_calls(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.functions.update(header["new"])
        assert self.functions.issuperset(header["of"])
        assert {call for call, _ in self.calls}.isdisjoint(header["ids"])
        self.calls += zip(header["ids"], map(bytes, buffers[len(header["new"]) :]))

    def on_recall(self, header: dict[str, Any], buffers: list[Any]) -> None:
        stopped = [call for call, _ in self.calls if call in header["cancelled"]]
        self.calls = deque(pair for pair in self.calls if pair[0] not in stopped)
        back = [self.calls.pop()[0] for _ in range(min(header["count"], len(self.calls)))]
        if stopped or header["count"]:
            more = {"recalled": True} if header["count"] else {}
            self.tell_returned([*stopped, *back], [STOPPED] * len(stopped) + [AGAIN] * len(back), b"", **more)

    def call(self) -> None:
        """A call returns, or its worker has ended, or it comes back."""
        number, data = self.calls.popleft()
        how = self.rng.choice((VALUE, VALUE, VALUE, LOST, AGAIN)) if self.rng.random() < 0.2 else VALUE
        self.tell_returned([number], [how], b"value of " + data, begun=[number] if self.rng.random() < 0.2 else [])

    def tell_returned(self, ids: list[int], how: list[int], data: bytes, **more: Any) -> None:
        header = {"ids": ids, "how": how, "frames": [1] * len(ids), "begun": [], "left": len(self.calls), **more}
        self.send(Kind.RETURNS, header, [data] * len(ids))

    # What its workers do

    def work(self) -> None:
        """A worker comes to an end with what it has; now and then a bad one."""
        give = self.todo.popleft()
        worker, rng = give.worker, self.rng
        if worker in self.interrupted:
            self.interrupted.discard(worker)
            self.act(self.scheduler.on_cancelled(worker, self.now))
            return
        roots = self.fold(give) if give.work.fold else self.map(give)
        if roots is None:
            self.act(self.scheduler.on_cancelled(worker, self.now))
        else:
            self.act(self.scheduler.on_done(worker, roots, self.now))
        module = of_module(1, rng.choice(MODULES))
        if rng.random() < 0.1 and module not in self.modules:
            self.act(self.scheduler.on_import(worker, module))

    def map(self, give: Give) -> Any:
        round_, tree = give.round, Tree(give.round.data.nslices)
        if round_.number not in self.params:
            return None
        params = self.params[round_.number]
        if isinstance(params, Ref):
            params = self.open(params)
        for index in give.work.slices:
            ref = round_.data.refs[index]
            value = mapped(params, None if ref is None else self.open(ref), index)
            tree.add((index, index + 1), value)
            tree.fold_from((index, index + 1), default_reduce)
        return [(span, Held(flat_bytes(value), True)) for span, value in tree.values.items()]

    def fold(self, give: Give) -> Any:
        tree = Tree(give.round.data.nslices)
        for span, held in (give.work.fold or {}).items():
            tree.add(span, held.opened())
        tree.fold(default_reduce)
        return [(span, Held(flat_bytes(value), True)) for span, value in tree.values.items()]

    def open(self, ref: Ref) -> Any:
        return codec.decode(*flat.read(bytes(self.refs.content[ref][0])))

    def print(self, data: bytes) -> None:
        if self.welcome:
            self.unprinted += len(data)
            self.send(Kind.LOG, {"worker": self.rng.randrange(self.workers), "stream": self.rng.choice((1, 2))}, [data])

    def lose_worker(self) -> None:
        """One dies and is replaced."""
        if not self.welcome:
            return
        worker = self.rng.randrange(self.workers)
        for give in [give for give in self.todo if give.worker == worker]:
            self.todo.remove(give)
        self.interrupted.discard(worker)
        self.act(self.scheduler.on_exit(worker, "was killed", None, 100 + worker, self.now))
        self.send(Kind.STATE, {"state": "replaced", "worker": worker, "pid": 200 + worker})
        self.act(self.scheduler.on_ready(worker, self.now))

    def raise_error(self) -> None:
        """User code raises."""
        if not self.todo:
            return
        give = self.todo.popleft()
        at = give.work.slices[0] if give.work.slices else None
        message = {"slice": at, "text": "Traceback", "summary": "ValueError", "pickled": b"pickled"}
        self.act(self.scheduler.on_error(give.worker, message, self.now))
