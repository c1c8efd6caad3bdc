"""A real node without processes: its workers compute in place, its uplink is a queue."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from qjam_worker.ipc.arenas import MappedArenas
from qjam_worker.ipc.call_pipe import CallSource
from qjam_worker.ipc.files import map_file
from qjam_worker.ipc.returns import CALL, STOP
from qjam_worker.node import node as node_module
from qjam_worker.node.commands import Kill
from qjam_worker.node.node import Node
from qjam_worker.node.options import NodeOptions
from qjam_worker.values import codec, flat
from qjam_worker.values.outcomes import STOPPED, VALUE
from qjam_worker.values.reduction import Tree, default_reduce
from qjam_worker.wire.frames import Kind, Message, pack, unpack

from .mutation import Frames
from .peer import MODULES, mapped


class Uplink:
    """In place of a Dealer."""

    def __init__(self) -> None:
        self.inbox: deque[list[memoryview]] = deque()
        self.out: deque[Frames] = deque()
        self.on_broken: Callable[[], None] = lambda: None

    def files(self) -> Iterator[Any]:
        return iter(())

    def close(self) -> None: ...

    def send(self, kind: Kind, header: dict[str, Any], buffers: Any) -> None:
        self.out.append([bytes(frame) for frame in pack(kind, header, buffers)])

    def receive(self) -> Message | None:
        return unpack(self.inbox.popleft()) if self.inbox else None


class Answers:
    """Where a worker hears of modules."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.heard.append(message)


class Workers:
    """In place of a Pool, whose files and handles it keeps."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.workers = pool.workers
        self.assigned: deque[tuple[Any, dict[str, Any]]] = deque()
        self.interrupted: set[int] = set()
        self.made = 0
        for worker in self.workers:
            worker.pid, worker.ready, worker.modules = 100 + worker.index, True, Answers()

    def assign(self, worker: Any, message: dict[str, Any]) -> None:
        assert not worker.seq
        self.made += 1
        worker.seq = message["seq"] = self.made
        self.assigned.append((worker, message))

    def wake(self) -> None: ...
    def tell(self, worker: Any, message: dict[str, Any]) -> None: ...

    def rest(self, worker: Any) -> None:
        worker.seq = 0
        self.interrupted.discard(worker.index)

    def interrupt(self, worker: Any, now: float, *, call: bool = False) -> None:
        if worker.seq:
            self.interrupted.add(worker.index)

    @property
    def output(self) -> Workers:
        return self

    def mute(self, muted: bool) -> None: ...
    def on_timer(self, now: float) -> None: ...

    def next_deadline(self) -> None:
        return None

    def close(self) -> None:
        for worker in self.workers:
            worker.modules = None
        self.pool.close()


class InPlace:
    """The node, and what its workers do."""

    def __init__(self, name: str, workers: int, rng: Random, base: Path | None = None) -> None:
        self.name = name
        self.rng = rng
        self.uplink = Uplink()
        self.node = Node(self.uplink, NodeOptions(workers), bases=[str(base or tempfile.gettempdir())])
        self.workers = self.node.pool = Workers(self.node.pool)  # type: ignore[assignment]
        self.node.refs._pool = self.node.calls._pool = self.workers  # type: ignore[assignment]
        self.node.perform[Kill] = lambda command: None
        self.arenas = MappedArenas(self.node.files)
        self.folders = [Path(folder) for folder in self.node.files.directories]
        self.gone = False
        self.node.send(Kind.HELLO, {"workers": workers, "credit": node_module.CREDIT})
        self.ready = False

    def close(self) -> None:
        if not self.gone:
            self.gone = True
            self.node.close()
            assert not any(folder.exists() for folder in self.folders)

    @property
    def out(self) -> deque[Frames]:
        return self.uplink.out

    def deliver(self, message: Message) -> None:
        self.hear([bytes(frame) for frame in pack(*message)])

    def hear(self, frames: Frames) -> None:
        self.uplink.inbox.append([memoryview(frame) for frame in frames])

    def receive(self) -> bool:
        """As in the node's own loop; False when it leaves."""
        stays = self.node.receive()
        if stays and not self.ready:
            self.ready = True
            self.node.on_pool_ready()
        return stays

    def work(self) -> None:
        """A worker comes to an end with what it has."""
        worker, message = self.workers.assigned.popleft()
        if message["op"] == "calls":
            self.call(worker, message["pipe"])
            return
        if worker.index in self.workers.interrupted:
            answer: dict[str, Any] = {"op": "cancelled"}
        else:
            try:
                values = self.fold(message) if message["op"] == "fold" else self.map(message)
                answer = {"op": "done", "roots": self.put(worker, values)}
            except (codec.CodecError, TypeError, ValueError) as error:  # as user code that is given nonsense
                answer = {"op": "error", "slice": None, "text": repr(error), "summary": "s", "pickled": None}
        self.node.on_worker_message(worker, {**answer, "seq": worker.seq})

    def call(self, worker: Any, pipe: str) -> None:
        """A worker takes calls, and ends at one of them now and then."""
        ring, rng = self.node.calls._rings[worker.index], self.rng
        fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        source = CallSource(fd)
        for _ in range(rng.choice((1, 3, 50))):
            record = source.take()
            if record is None:
                break
            if rng.random() < 0.02:
                ring.words[CALL] = rng.choice((0, record.call))
                os.close(fd)
                self.lose(worker)
                return
            size = int.from_bytes(self.arenas.read(record.function_arena, record.function_offset, 8), "little")
            assert len(self.arenas.read(record.function_arena, record.function_offset + 8, size)) == size
            data = bytes(self.arenas.read(record.arena, record.offset, record.size))
            stopped = ring.words[STOP] == record.call
            ring.put(record.call, STOPPED if stopped else VALUE, b"" if stopped else b"value of " + data)
        os.close(fd)
        self.node.on_worker_message(worker, {"op": "called", "seq": worker.seq})

    def look(self) -> None:
        """Time passes."""
        desk = self.node.calls._desk
        if desk is not None and desk.at is not None:
            self.node.act([*desk.look(desk.at), *self.node.scheduler.assign(desk.at)])

    def map(self, message: dict[str, Any]) -> dict[tuple[int, int], Any]:
        values = {}
        params = codec.decode(*flat.read(map_file(*message["params"])))
        for index, path, size, _ in message["slices"]:
            data = None if path is None else codec.decode(*flat.read(map_file(path, size)))
            values[index, index + 1] = mapped(params, data, index)
        return values

    def fold(self, message: dict[str, Any]) -> dict[tuple[int, int], Any]:
        tree = Tree(max(hi for _, hi, *_ in message["items"]) * 4)
        items = {}
        for lo, hi, path, offset, size in message["items"]:
            items[lo, hi] = codec.decode(*flat.read(map_file(path, offset + size)[offset:]))
        (first, left), (second, right) = sorted(items.items())[:2]
        del tree
        assert first[1] == second[0]
        others = dict(sorted(items.items())[2:])
        return {(first[0], second[1]): default_reduce(left, right), **others}

    def put(self, worker: Any, values: dict[tuple[int, int], Any]) -> list[Any]:
        roots, offset = [], 0
        for (lo, hi), value in values.items():
            encoded = codec.encode(value)
            size = flat.write(encoded, worker.slot.view[offset:])
            roots.append((lo, hi, True, (worker.slot.path, offset, size)))
            offset += (size + 63) & ~63
        return roots

    def import_module(self) -> None:
        """User code wants a module."""
        worker = self.rng.choice(self.workers.workers)
        name = self.rng.choice((*MODULES, "x" * 5000))
        self.node.on_worker_message(worker, {"op": "import", "name": name, "epoch": 1})

    def print(self) -> None:
        self.node.on_output(self.rng.choice(self.workers.workers).index, 1, self.rng.randbytes(10))

    def lose_worker(self) -> None:
        self.lose(self.rng.choice(self.workers.workers))

    def lose(self, worker: Any) -> None:
        """Its process ends."""
        for given in [given for given in self.workers.assigned if given[0] is worker]:
            self.workers.assigned.remove(given)
        self.workers.rest(worker)
        worker.jobs.clear()
        self.node.on_worker_exit(worker, "was killed", None, worker.pid)
        self.node.on_worker_replaced(worker)
