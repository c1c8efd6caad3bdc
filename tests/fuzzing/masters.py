"""Lies to the master: one node of two does not play by the rules, while rounds are in flight."""

from __future__ import annotations

from collections import Counter, deque
from random import Random
from typing import Any

from qjam_worker.wire.frames import Kind, Message
from refs_as_text import ref

from .bench import Bench, Broken, Clock
from .mutation import TEXTS, Frames, Mutator, packed, sealed
from .peer import Peer

HONEST = "honest/1"
KINDS = {bytes([kind]) for kind in Kind}
STEPS = 20_000  # for the honest to bring all to an end


class Liar(Peer):
    """Honest at first. What it says goes through `tell`, which may say something else."""

    def deliver(self, message: Message) -> None:
        self.inbox.append(message)


class Episode:
    """One engine, one honest node, one liar after another."""

    def __init__(self, clock: Clock, rng: Random, tally: Counter[str]) -> None:
        self.rng = rng
        self.tally = tally
        self.bench = Bench(clock, rng, speculation=rng.random() < 0.7)
        self.bench.successor = self.successor
        self.mutator = Mutator(rng)
        self.said: deque[Frames] = deque(maxlen=40)  # by anybody, to be said again
        self.liars = 0
        self.boldness = rng.choice((0.6, 0.6, 0.2, 0.05))  # those that lie seldom come far
        self.ending = False
        self.told = 0
        self.last: tuple[str, Frames] = ("", [])
        self.honest = self.join(HONEST)
        self.liar = self.join("liar/0")

    def join(self, name: str) -> Peer:
        workers = self.rng.choice((1, 2, 3))
        if name not in self.bench.engine.dispatch.nodes:
            self.bench.engine.add_node(name, name.partition("/")[0], workers, self.rng.choice((workers, None)))
        else:
            workers = self.bench.engine.dispatch.nodes[name].asked or workers
        peer = Liar(name, workers, self.rng)
        self.bench.deliver[name] = peer.deliver
        return peer

    def successor(self, name: str) -> str | None:
        if name == HONEST:
            self.bench.broken.append(f"the honest node is lost: {self.bench.lost[name]}")
        self.liars += 1
        return None if self.ending else f"liar/{self.liars}"

    def run(self, messages: int) -> None:
        """So many messages of the liars."""
        try:
            while self.told < messages:
                self.step()
            self.finish()
        finally:
            self.bench.close()

    def step(self) -> None:
        rng, what = self.rng, self.rng.random()
        if self.liar.name not in self.bench.deliver and rng.random() < 0.8:
            self.liar = self.join(f"liar/{self.liars}")
        if what < 0.05 and len(self.bench.runs) < 4:
            self.bench.submit()
        elif what < 0.08:
            rng.choice((self.bench.cancel, self.bench.submit_calls, self.bench.submit_calls, self.bench.cancel_calls))()
        elif what < 0.10:
            self.bench.pass_time(rng.choice((0.001, 0.01, 0.1, 1.0, 3.0)))
        elif what < 0.20 and self.bench.loads:
            self.bench.do_load()
        elif what < 0.55:
            self.live(self.honest)
            while self.honest.out and rng.random() < 0.8:
                self.tell_truth(self.honest)
        else:
            try:
                self.live(self.liar)
            except Exception as error:  # it was answered as the node that it says it is
                engine = self.bench.engine
                engine._carrier.act(engine.dispatch.on_node_lost(self.liar.name, f"it failed: {error!r}"))
            if rng.random() > (self.boldness if self.is_trusted() else self.boldness / 8):
                if self.liar.out:
                    self.tell_truth(self.liar)
            else:
                self.lie()

    def is_trusted(self) -> bool:
        """Whether the liar has work: there is most to be gained by a lie."""
        return any(run.given[self.liar.name] for run in self.bench.runs.values())

    def live(self, peer: Peer) -> None:
        """One thing that a node does."""
        rng = self.rng
        peer.now = self.bench.clock.now
        if peer.inbox and rng.random() < 0.7:
            peer.receive()
        elif peer.todo and rng.random() < 0.7:
            peer.work()
        elif peer.calls and rng.random() < 0.7:
            peer.call()
        elif rng.random() < 0.05:
            peer.print(rng.randbytes(rng.choice((1, 100))))
        elif rng.random() < 0.02 and self.bench.printed[peer.name]:
            self.bench.engine.acknowledge(peer.name, self.shown(peer.name))
            self.bench.turn()
        elif peer is self.liar and rng.random() < 0.03:
            rng.choice((peer.lose_worker, peer.raise_error))()

    def shown(self, name: str) -> int:
        size, self.bench.printed[name] = self.bench.printed[name], 0
        return size

    def tell_truth(self, peer: Peer) -> None:
        frames = peer.out.popleft()
        self.said.append(frames)
        verdict = self.bench.say(peer.name, frames)
        if peer is self.honest and verdict not in ("harmless", "ignored"):
            raise Broken(f"the honest node was not believed: {frames}")

    def lie(self) -> None:
        """Something that no node would say, or not now."""
        rng, liar = self.rng, self.liar
        what = rng.random()
        if what < 0.35 and liar.out:
            frames = self.mutator.message(liar.out.popleft(), self.bench.lore())
        elif what < 0.5 and self.said:
            frames = self.mutator.message(rng.choice(self.said), self.bench.lore())
        elif what < 0.6 and self.said:
            frames = rng.choice(self.said)
        elif what < 0.62 and liar.out:
            liar.out.rotate(rng.randrange(3))
            return
        else:
            frames = self.forged()
            if rng.random() < 0.1:
                frames = self.mutator.message(frames, self.bench.lore())
        self.told += 1
        self.last = liar.name, frames
        verdict = self.bench.say(liar.name, frames)
        self.tally[verdict] += 1
        self.tally[f"{Kind(frames[0][5]).name if frames and frames[0][5:6] in KINDS else None} {verdict}"] += 1
        self.bench.check_credit()
        if not self.bench.is_present(HONEST) and self.honest.welcome and not self.honest.out:
            raise Broken(f"the honest node is {self.bench.state(HONEST)}")

    def forged(self) -> Frames:
        """A message without a flaw but for what it says."""
        rng, runs = self.rng, self.bench.runs
        lore = self.bench.lore()
        known = [number for number, run in runs.items() if run.given[self.liar.name]]
        shared = [number for number in known if runs[number].given[HONEST] - runs[number].given[self.liar.name]]
        number = rng.choice([*known] * 10 + [*shared] * 20 + [*runs] * 3 + lore.numbers)
        nslices = runs[number].nslices if number in runs else 4
        mine = runs[number].given[self.liar.name] if number in runs else set()
        indices = sorted({rng.randrange(nslices + 1) for _ in range(rng.randrange(4))}) or [0]
        if mine and rng.random() < 0.5:
            indices = sorted(mine)[: rng.randrange(1, 4)]
        round_ = self.bench.engine.dispatch.rounds.get(number)
        data = None if round_ is None else self.liar.scheduler.data.get(round_.data.number)
        told = set() if data is None else set(data.refs)
        if told - mine and rng.random() < 0.5:  # it has the data of some that others are given now
            indices = sorted(told - mine)[: rng.randrange(1, 4)]
        worker, pid = rng.randrange(5), rng.randrange(1, 1000)
        roots = [[lo, rng.choice((lo + 1, lo + 1, lo + 2, lo + 4, nslices)), 1] for lo in indices]
        if rng.random() < 0.2:
            roots[-1][2] = rng.choice((0, 2, -1))
        seconds = rng.choice((0.0, 0.001, 1e9))
        many = rng.choice((1, 1, 3))
        offsets, ends = (0, 0, 0, 10, 64, 1 << 40), (None, None, None, 5, 70, 1 << 40)
        missing = [[ref(rng.choice(lore.names)), rng.choice(offsets), rng.choice(ends)] for _ in range(many)]
        frames = [rng.choice((b"", b"x", rng.randbytes(50))) for _ in roots]
        if rng.random() < 0.5:
            frames = frames[: sum(max(0, count) for _, _, count in roots)]
        if rng.random() < 0.2:
            frames.append(b"x")
        if rng.random() < 0.1:
            missing = [[ref(f"module:1:m{rng.random()}"), 0, None] for _ in range(rng.choice((10, 900)))]
        at = self.bench.engine.dispatch.calls.at.get(self.liar.name)
        mine_too = [*(at.calls if at is not None else ())] * 3 + [*self.bench.calls, *lore.numbers]
        ids = [rng.choice(mine_too) for _ in range(many)]
        returned = {"ids": ids, "how": [rng.randrange(8) for _ in ids], "frames": [1] * many, "begun": ids[:1],
                    "left": worker}  # fmt: skip
        few = rng.choice((0, 1, 2, 1 << 40))
        forgeries: list[tuple[Kind, dict[str, Any], list[bytes]]] = [
            (Kind.RETURNS, returned, [b"lie"] * many),
            (Kind.RETURNS, {**returned, "how": [rng.choice((0, 4, 5)) for _ in ids], "recalled": True},
             [b"lie"] * many),
            (Kind.RETURNS, {**returned, "frames": [few] * many}, [b"lie"] * rng.choice((0, 1, 2))),
            (Kind.RETURNS, {**returned, "ids": [], "how": [], "frames": [], "begun": [few], "left": few}, []),
            (Kind.CALLS, {"ids": ids, "of": ids, "new": []}, [b"lie"] * many),
            (Kind.RECALL, {"count": few, "cancelled": ids}, []),
            (Kind.FORGET, {"functions": [1], "arguments": []}, []),
            (Kind.RESULT, {"round": number, "roots": roots, "seconds": seconds}, frames),
            (Kind.RESULT, {"round": number, "roots": roots[:1], "seconds": seconds}, frames[:1]),
            (Kind.ERROR, {"round": number, "what": rng.choice(("task", "room", "node", *TEXTS)), "text": "t",
                          "summary": "s", "worker": rng.choice((None, worker)),
                          "slice": rng.choice((None, *indices))}, []),
            (Kind.STATE, {"state": "lost", "worker": worker, "how": "was killed", "pid": pid, "round": number,
                          "slice": rng.choice((None, *indices)), "slices": indices}, []),
            (Kind.STATE, {"state": "lost", "worker": worker, "how": "was killed", "pid": pid, "round": number}, []),
            (Kind.STATE, {"state": "lost", "worker": worker, "how": "was killed", "pid": pid}, []),
            (Kind.STATE, {"state": "replaced", "worker": worker, "pid": pid}, []),
            (Kind.STATE, {"state": "ready", "workers": [pid] * rng.randrange(1, 4)}, []),
            (Kind.GET, {"round": rng.choice((number, None)), "refs": missing}, []),
            (Kind.STATE, {"state": "shared", "round": number, "for": rng.choice(lore.names), "indices": indices}, []),
            (Kind.STATE, {"state": "shared", "round": number, "for": HONEST, "indices": sorted(mine) or [0]}, []),
            (Kind.STATE, {"state": "shared", "round": number, "for": HONEST, "indices": sorted(mine) or [0],
                          "attempts": [rng.choice((2, 2**40)) for _ in sorted(mine) or [0]]}, []),
            (Kind.CREDIT, {"bytes": rng.choice((0, 1, 64, 1024, 1 << 50))}, []),
            (Kind.LOG, {"worker": worker, "stream": rng.choice((1, 2))}, [rng.randbytes(rng.choice((0, 1, 5000)))]),
            (Kind.PONG, {"t": rng.choice((0.0, 1e6))}, []),
            (Kind.HELLO, {"workers": rng.choice((1, 2, 3, 100)), "credit": rng.choice((1, 1 << 30))}, []),
            (Kind.BYE, {"reason": rng.choice(("done", "x" * 100_000))}, []),
            (Kind.TASK, {"job": 1, "data": 1, "round": number, "indices": indices, "params": "inline"}, [b"x"]),
            (Kind.CANCEL, {"round": number}, []),
            (Kind.REFS, {"ref": ref(rng.choice(lore.names)), "offset": 0, "total": 1}, [b"x"]),
            (Kind.SHARE, {"round": number, "count": 1, "seconds": 0.1, "for": HONEST}, []),
        ]  # fmt: skip
        kind, header, buffers = rng.choice(forgeries if rng.random() < 0.7 or not told - mine else forgeries[:2])
        return sealed(kind, packed(header), buffers)

    def finish(self) -> None:
        """The liar leaves; the honest node brings all rounds to an end."""
        bench, engine = self.bench, self.bench.engine
        self.ending = True
        self.last = "", []
        for name in [name for name in engine.dispatch.nodes if name != HONEST]:
            engine._carrier.act(engine.dispatch.on_node_lost(name, "it is time"))
        self.honest.told_bye = False
        for _ in range(STEPS):
            if not bench.runs and not bench.calls and not self.honest.inbox and not self.honest.out and not bench.loads:
                break
            if bench.loads:
                bench.do_load()
            self.honest.now = bench.clock.now
            if self.honest.inbox:
                self.honest.receive()
            if self.honest.todo:
                self.honest.work()
            if self.honest.calls:
                self.honest.call()
            if self.honest.out:
                self.tell_truth(self.honest)
            else:
                bench.pass_time(0.01)
        else:
            raise Broken(f"rounds do not end: {list(engine.dispatch.rounds.values())}, {self.honest.scheduler}")
        bench.check_empty()
        self.tally["rounds"] += bench.made
        self.tally["calls"] += bench.calls_made
        self.tally["liars lost"] += self.liars
