"""Lies to a node: what the master has said arrives as something else."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from random import Random
from typing import Any

from qjam_worker.wire.frames import Kind, WireError, pack, unpack
from refs_as_text import ref

from .bench import Bench, Broken, Clock
from .inplace import InPlace
from .mutation import Frames, Mutator
from .peer import noise

STEPS = 20_000  # for a node that hears no lies to bring all to an end
KINDS = {bytes([kind]) for kind in Kind}


class Episode:
    """One engine that is honest, and one node after another that hears lies."""

    def __init__(self, clock: Clock, rng: Random, tally: Counter[str], base: Path | None = None) -> None:
        self.rng = rng
        self.tally = tally
        self.base = base
        self.bench = Bench(clock, rng, speculation=rng.random() < 0.7)
        self.mutator = Mutator(rng)
        self.said: deque[Frames] = deque(maxlen=40)
        self.waiting: deque[Frames] = deque()  # on their way to the node
        self.made = 0
        self.told = 0
        self.last: tuple[str, Frames] = ("", [])
        self.bench.successor = lambda name: f"node/{self.made + 1}"
        self.node = self.join()

    def join(self) -> InPlace:
        self.made += 1
        name, workers = f"node/{self.made}", self.rng.choice((1, 2, 3))
        if name not in self.bench.engine.dispatch.nodes:
            self.bench.engine.add_node(name, name, workers)
        self.bench.deliver[name] = lambda message: self.waiting.append([bytes(f) for f in pack(*message)])
        self.waiting.clear()
        return InPlace(name, workers, self.rng, self.base)

    def run(self, messages: int) -> None:
        try:
            while self.told < messages:
                self.step()
            self.finish()
        finally:
            self.node.close()
            self.bench.close()

    def leave(self, why: str) -> None:
        """The node goes, and another one comes."""
        if not why:
            raise Broken("a node has left without a word why")
        self.node.close()
        bye = unpack(self.node.out[-1])
        if bye.kind is not Kind.BYE or bye.header["reason"] != why:
            raise Broken(f"the last words are {bye}")
        while self.node.out and self.node.name in self.bench.deliver:
            self.bench.say(self.node.name, self.node.out.popleft())
        self.bench.engine._carrier.act(self.bench.engine.dispatch.on_node_lost(self.node.name, why))
        self.tally["nodes that left"] += 1
        self.node = self.join()

    def step(self) -> None:
        rng, what, node = self.rng, self.rng.random(), self.node
        if node.name not in self.bench.deliver:  # the engine has had enough of it
            node.node.leave("it is not wanted")
            self.leave("it is not wanted")
        elif what < 0.06 and len(self.bench.runs) < 4:
            self.bench.submit()
        elif what < 0.09:
            rng.choice((self.bench.cancel, self.bench.submit_calls, self.bench.submit_calls, self.bench.cancel_calls))()
        elif what < 0.11:
            self.bench.pass_time(rng.choice((0.001, 0.1, 1.0)))
        elif what < 0.2 and self.bench.loads:
            self.bench.do_load()
        elif what < 0.4 and node.workers.assigned:
            node.work()
        elif what < 0.43 and node.ready:
            node.look()
            rng.choice((node.import_module, node.import_module, node.print, node.lose_worker))()
        elif what < 0.6 and node.out:
            self.bench.say(node.name, node.out.popleft())
        elif what < 0.62:
            self.acknowledge()
        elif what < 0.85 and self.waiting:
            self.tell(self.waiting.popleft())
        elif rng.random() < (0.5 if node.node.scheduler.rounds else 0.1):
            self.lie()

    def finish(self) -> None:
        """A node that hears the truth brings all rounds to an end."""
        if self.node.name in self.bench.deliver:
            self.bench.engine._carrier.act(self.bench.engine.dispatch.on_node_lost(self.node.name, "it is time"))
        self.node.close()
        self.node, self.last = self.join(), ("", [])
        for _ in range(STEPS):
            if not self.bench.runs and not self.bench.calls:
                break
            self.node.look()
            if self.bench.loads:
                self.bench.do_load()
            if self.waiting:
                self.tell(self.waiting.popleft())
            if self.node.workers.assigned:
                self.node.work()
            while self.node.out:
                if self.bench.say(self.node.name, self.node.out.popleft()) != "harmless":
                    raise Broken(f"the node was not believed: {self.bench.lost}")
        else:
            raise Broken(f"rounds do not end: {self.bench.engine.dispatch.rounds}, {self.node.node.scheduler}")
        self.bench.check_empty()

    def acknowledge(self) -> None:
        name, size = self.node.name, self.bench.printed[self.node.name]
        if size:
            self.bench.printed[name] = 0
            self.bench.engine.acknowledge(name, size)
            self.bench.turn()

    def tell(self, frames: Frames) -> None:
        """The truth, or what is left of it after a lie."""
        self.said.append(frames)
        self.node.hear(frames)
        if not self.node.receive():
            self.leave(self.node.node.leaving or "")

    def lie(self) -> None:
        rng = self.rng
        what = rng.random()
        if what < 0.35 and self.waiting:
            frames = self.mutator.message(self.waiting.popleft(), self.bench.lore())
        elif what < 0.55 and self.said:
            frames = self.mutator.message(rng.choice(self.said), self.bench.lore())
        elif what < 0.65 and self.said:
            frames = rng.choice(self.said)
        else:
            frames = self.forged()
        self.told += 1
        self.last = self.node.name, frames
        verdict = "harmless"
        try:
            message = unpack(frames)
        except WireError as error:
            message = None
            verdict = "schema" if str(error).startswith("the header of") or " buffers" in str(error) else "frames"
        self.node.hear(frames)
        stays = self.node.receive()
        if not stays:
            if verdict == "harmless":
                verdict = "left" if message is not None and message.kind is Kind.BYE else "meaning"
            self.leave(self.node.node.leaving or "")
        elif verdict != "harmless":
            raise Broken("a node has heard what is no message and stays")
        self.tally[verdict] += 1
        self.tally[f"{Kind(frames[0][5]).name if frames and frames[0][5:6] in KINDS else None} {verdict}"] += 1

    def forged(self) -> Frames:
        rng, lore, rounds = self.rng, self.bench.lore(), self.node.node.scheduler.rounds
        jobs, datas = self.node.node.scheduler.jobs, self.node.node.scheduler.data
        number = rng.choice([*rounds] * 6 + lore.numbers)
        job = rng.choice([*jobs] * 6 + lore.numbers)
        data = rng.choice([*datas] * 6 + lore.numbers)
        nslices = datas[data].nslices if data in datas else rng.choice((1, 4, 1 << 20))
        indices = sorted({rng.randrange(min(nslices, 13) + 1) for _ in range(rng.randrange(4))}) or [0]
        entry = {"epoch": rng.choice((1, 1, 2)), "reduce": False, "code": rng.choice((None, "abc")), "shadows": []}
        if job in jobs and rng.random() < 0.7:
            entry = jobs[job].entry
        refs = [rng.choice(lore.names) for _ in indices]
        if rng.random() < 0.5:
            refs = [f"d9-{index}" for index in indices]
        asked = sorted(self.node.node.scheduler.wants)
        its = rng.choice(asked * 8 + [ref(name) for name in lore.names])
        here = self.node.node.store.have(its)
        offset, piece = rng.choice((here, here, here, 0, 1, 64, 1 << 40)), rng.randbytes(rng.choice((0, 1, 64, 100)))
        total = rng.choice((offset + len(piece), 64, 1000, 1 << 20, 1 << 52))
        params = rng.choice(("inline", "ref", "have"))
        task = {"job": job, "data": data, "indices": indices, "params": params}
        desk = self.node.node.calls._desk
        functions = [*(desk._functions if desk is not None else ())] * 3 + lore.numbers
        known = [*(desk._given if desk is not None else ()), *self.bench.calls, *lore.numbers, 1 << 40]
        calls = [rng.choice(known) for _ in indices]
        of, new = [rng.choice(functions) for _ in calls], rng.choice(([], [], [1 << 41], [rng.choice(functions)]))
        pieces = [piece] * (len(calls) + len(new))
        forgeries: list[tuple[Kind, dict[str, Any], list[bytes]]] = [
            (Kind.CALLS, {"ids": calls, "of": of, "new": new}, pieces),
            (Kind.CALLS, {"ids": calls, "of": new * len(calls) or of, "new": new}, pieces),
            (Kind.CALLS, {"ids": calls, "of": of, "new": new, "large": [[rng.choice((0, 1, 99)), refs]]}, pieces),
            (Kind.CALLS, {"ids": calls, "of": of[1:], "new": new}, pieces[1:]),
            (Kind.RECALL, {"count": rng.choice((0, 1, 1 << 40)), "cancelled": calls}, []),
            (Kind.FORGET, {"functions": of[:1], "arguments": rng.choice(([], refs))}, []),
            (Kind.RETURNS, {"ids": calls, "how": calls, "frames": calls, "begun": [], "left": 0}, []),
            (Kind.WELCOME, {"node": self.node.name, "host": "host", "speculation": rng.random() < 0.5}, []),
            (Kind.JOB, {"job": job, "entry": entry, "forget": rng.choice(([], [number], [job], [*jobs]))}, []),
            (Kind.DATA, {"data": data, "slices": list(map(list, zip(indices, refs))), "nslices": nslices,
                         "forget": rng.choice(([], [number], [job], [*jobs]))}, []),
            (Kind.RELEASE, {"data": rng.choice(([], [1], [data], [1 << 40])),
                            "forget": rng.choice(([], [number], [*jobs]))}, []),
            (Kind.TASK, {**task, "round": number}, rng.choice(([], [b"x"], [piece, piece]))),
            (Kind.TASK, {**task, "round": self.bench.made + 5}, [piece]),
            (Kind.TASK, {**task, "round": number, "data": None, "nslices": nslices}, [piece]),
            (Kind.REFS, {"ref": its, "offset": offset, "total": total}, [piece]),
            (Kind.REFS, {"ref": its, "offset": offset, "total": offset + len(piece)}, [piece]),
            (Kind.REFS, {"ref": its, "offset": here, "total": total}, [piece[:1], piece[1:]]),
            (Kind.REFS, {"ref": its, "offset": 0, "total": 0, "gone": True}, [b""]),
            (Kind.CREDIT, {"bytes": rng.choice((0, 1, 10, 1 << 40))}, []),
            (Kind.CANCEL, {"round": number}, []),
            (Kind.CANCEL, {"round": number, "indices": indices}, []),
            (Kind.SHARE, {"round": number, "count": rng.choice((0, 1, 100)), "for": rng.choice(lore.names),
                          "seconds": rng.choice((0.0, abs(noise(number))))}, []),
            (Kind.PING, {"t": rng.choice((0.0, 1.5))}, []),
            (Kind.BYE, {"reason": rng.choice(("done", "x" * 100_000))}, []),
            (Kind.RESULT, {"round": number, "roots": [[0, 1, 1]], "seconds": 0.0}, [piece]),
        ]  # fmt: skip
        kind, header, buffers = rng.choice(forgeries)
        return [bytes(frame) for frame in pack(kind, header, buffers)]
