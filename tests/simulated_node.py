"""A node without processes, bytes or sockets, for clusters that live in memory.

It keeps the real books of a round (qjam_worker.rounds) and asks, answers and forgets as qjam_worker.node does. Values
are texts, so that adding them is not associative; a ref is its size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, Protocol

from qjam_worker.reducing import Span, Tree
from qjam_worker.rounds import Held, NodeJob, NodeRound
from qjam_worker.wire import Kind


def mapped(params: str, index: int) -> str:
    return f"{params}:{index}"


def joined(left: str, right: str) -> str:
    return f"({left} {right})"


class Message(NamedTuple):
    kind: Kind
    header: dict[str, Any]
    buffers: tuple[Any, ...] = ()


@dataclass
class SimWorker:
    """One worker process. `work` is what it was rung for."""

    index: int
    ready: bool = True
    seq: int = 0
    round: int | None = None
    importing: str | None = None
    op: str = ""
    job: int = 0
    params: str = ""
    block: list[int] = field(default_factory=list)
    fold: dict[Span, Held] = field(default_factory=dict)


class Surroundings(Protocol):
    """What the node needs to know of the run that it is in."""

    rng: Random

    def chance(self, probability: float) -> bool: ...
    def raises(self, number: int) -> set[int]: ...
    def kills(self, number: int) -> set[int]: ...


class SimNode:
    """A node: what qjam_worker.node does with each message, over refs without bytes and values that are texts."""

    def __init__(self, world: Surroundings, name: str, workers: int) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.up: deque[Message] = deque()
        self.down: deque[Message] = deque()
        self.workers = [SimWorker(index) for index in range(workers)]
        self.jobs: dict[int, NodeJob] = {}
        self.rounds: dict[int, NodeRound] = {}
        self.params: dict[int, tuple[str, str | None]] = {}  # round -> the params, or the ref that they are in
        self.store: dict[str, tuple[int, int]] = {}  # ref -> bytes here, bytes in all
        self.asked: set[str] = set()
        self.modules: set[str] = set()
        self.importing: dict[str, list[SimWorker]] = {}
        self.given_up: set[int] = set()
        self.made = 0

    def send(self, kind: Kind, header: dict[str, Any], buffers: tuple[Any, ...] = ()) -> None:
        self.up.append(Message(kind, header, buffers))

    def receive(self) -> None:
        message = self.down.popleft()
        handlers: dict[Kind, Callable[[dict[str, Any], tuple[Any, ...]], None]] = {
            Kind.WELCOME: lambda header, buffers: None,
            Kind.JOB: self.on_job,
            Kind.TASK: self.on_task,
            Kind.REFS: self.on_refs,
            Kind.CANCEL: self.on_cancel,
        }
        handlers[message.kind](message.header, message.buffers)

    def on_job(self, header: dict[str, Any], buffers: tuple[Any, ...]) -> None:
        for old in header["forget"]:
            assert not [r for r in self.rounds.values() if r.job.number == old], "a job in use was forgotten"
            self.jobs.pop(old, None)
        number = header["job"]
        if number not in self.jobs:
            self.jobs[number] = NodeJob(number, header["entry"], header["nslices"], header["reduce"])
        self.jobs[number].add(dict(header["slices"]))

    def on_task(self, header: dict[str, Any], buffers: tuple[Any, ...]) -> None:
        number, job = header["round"], self.jobs[header["job"]]
        round_ = self.rounds.get(number)
        if round_ is None:
            if not buffers and header["params"] is None:
                assert number in self.given_up, "a task without params for a round that is new here"
                return  # the master is going to hear of it
            round_ = self.rounds[number] = NodeRound(number, job, len(self.workers))
            self.params[number] = (buffers[0] if buffers else f"p{number}", header["params"])
        waiting = {index for indices in round_.waiting.values() for index in indices}
        assert not set(header["indices"]) & {*round_.ready, *waiting}, "a slice was given twice"
        round_.lacking |= self.pin(round_, [job.entry["code"], header["params"]])
        round_.add(header["indices"], self.pin(round_, [job.refs[index] for index in header["indices"]]))
        self.ask_for_missing(round_)
        self.assign()

    def pin(self, round_: NodeRound, refs: list[str | None]) -> set[str]:
        """Gives those that are not here."""
        wanted = {ref for ref in refs if ref is not None}
        round_.pinned |= wanted
        return {ref for ref in wanted if not self.has(ref)}

    def has(self, ref: str) -> bool:
        have, total = self.store.get(ref, (0, 1))
        return have == total

    def ask_for_missing(self, round_: NodeRound) -> None:
        missing = [ref for ref in round_.missing if ref not in self.asked]
        if missing:
            self.asked.update(missing)
            refs = [[ref, self.store.get(ref, (0, 0))[0]] for ref in missing]
            self.send(Kind.STATE, {"state": "blocked", "round": round_.number, "missing": refs})

    def on_refs(self, header: dict[str, Any], buffers: tuple[Any, ...]) -> None:
        ref, offset = header["ref"], header["offset"]
        if header.get("gone"):
            self.asked.discard(ref)
            for round_ in [r for r in self.rounds.values() if ref in r.pinned]:
                self.ask_for_missing(round_)
            return
        have, total = self.store.get(ref, (0, header["total"]))
        self.store[ref] = (have + buffers[0] if have == offset else have, total)
        self.send(Kind.CREDIT, {"bytes": buffers[0]})
        if self.has(ref):
            self.asked.discard(ref)
            for round_ in self.rounds.values():
                round_.arrived(ref)
            if ref in self.importing:
                self.modules.add(ref)
                del self.store[ref]
                for worker in self.importing.pop(ref):
                    worker.importing = None
            else:
                self.assign()

    def on_cancel(self, header: dict[str, Any], buffers: tuple[Any, ...]) -> None:
        round_ = self.rounds.get(header["round"])
        if round_ is not None:
            self.end(round_)

    def end(self, round_: NodeRound) -> None:
        del self.rounds[round_.number]
        _, ref = self.params.pop(round_.number)
        self.asked -= round_.pinned - {ref for other in self.rounds.values() for ref in other.pinned}
        self.store.pop(ref or "", None)

    def give_up(self, round_: NodeRound) -> None:
        """As when there is no room for what it needs."""
        self.given_up.add(round_.number)
        self.report(round_, "room", None, None)
        self.end(round_)

    def report(self, round_: NodeRound, what: str, worker: int | None, index: int | None) -> None:
        header = {"round": round_.number, "what": what, "text": what, "worker": worker, "slice": index}
        self.send(Kind.ERROR, {**header, "summary": what})

    def assign(self) -> None:
        for round_ in [r for r in self.rounds.values() if r.has_work]:
            for worker in self.workers:
                if worker.ready and not worker.seq:
                    self.give(worker, round_)

    def give(self, worker: SimWorker, round_: NodeRound) -> None:
        worker.block = round_.take_map(worker.index)
        worker.fold = {} if worker.block else round_.take_fold(worker.index, lambda held: self.world.chance(0.5))
        if not worker.block and not worker.fold:
            return
        self.made += 1
        worker.seq, worker.round, worker.job = self.made, round_.number, round_.job.number
        worker.op = "map" if worker.block else "fold"
        worker.params = self.params[round_.number][0]
        module = f"module:1:{self.world.rng.choice('xyz')}"
        if self.world.chance(0.1) and module not in self.modules:
            worker.importing = module
            self.importing.setdefault(module, []).append(worker)
            if module not in self.asked:
                self.asked.add(module)
                self.send(Kind.STATE, {"state": "blocked", "round": worker.round, "missing": [[module, 0]]})

    def work(self, worker: SimWorker) -> None:
        """The worker comes to the end of what it has, one way or another."""
        assert worker.round is not None
        job = self.jobs.get(worker.job)
        number, round_ = worker.round, self.rounds.get(worker.round)
        kills, raises = self.world.kills(number), self.world.raises(number)
        if round_ is not None and worker.op == "map":
            if kills & set(worker.block):
                self.worker_exits(worker, min(kills & set(worker.block)))
                return
            if raises & set(worker.block):
                self.rest(worker)
                self.report(round_, "task", worker.index, min(raises & set(worker.block)))
                self.assign()
                return
        self.rest(worker)
        if round_ is not None:
            assert job is round_.job
            tree = Tree(round_.job.nslices)
            for index in worker.block:
                tree.add((index, index + 1), Held(None, True, value=mapped(worker.params, index)))
            for span, held in worker.fold.items():
                tree.add(span, held)
            tree.fold(fold_held)
            round_.put(worker.index, list(tree.values.items()))
            if not round_.job.user_reduce:
                for span in list(tree.values):
                    round_.tree.fold_from(span, fold_held)
            self.finish(round_)
        self.assign()

    def rest(self, worker: SimWorker) -> None:
        worker.seq, worker.round = 0, None

    def finish(self, round_: NodeRound) -> None:
        if not round_.settled or not round_.tree.values:
            return
        spans = round_.tree.spans
        roots = [[lo, hi, 1] for lo, hi in spans]
        buffers = tuple(round_.tree.values[span].value for span in spans)
        self.send(Kind.RESULT, {"round": round_.number, "roots": roots}, buffers)
        if round_.tree.complete:
            self.end(round_)
        else:
            for span in spans:
                round_.tree.take(span)

    def worker_exits(self, worker: SimWorker, at: int | None) -> None:
        for asking in self.importing.values():
            if worker in asking:
                asking.remove(worker)
        round_ = self.rounds.get(worker.round) if worker.round is not None else None
        header = {"state": "lost", "worker": worker.index, "how": "was killed", "pid": 1}
        if round_ is not None:
            header |= {"round": round_.number, "slice": at, "slices": round_.lose(worker.index)}
        self.send(Kind.STATE, header)
        worker.ready, worker.importing = False, None
        self.rest(worker)

    def worker_dies(self, worker: SimWorker) -> None:
        at = None
        if worker.seq:
            at = self.world.rng.choice([*worker.block, *(lo for lo, _ in worker.fold)])
        self.worker_exits(worker, at)

    def worker_comes_back(self, worker: SimWorker) -> None:
        worker.ready = True
        self.send(Kind.STATE, {"state": "replaced", "worker": worker.index, "pid": 2})
        self.assign()


def fold_held(left: Held, right: Held) -> Held:
    return Held(None, True, value=joined(left.value, right.value))
