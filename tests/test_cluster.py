"""Dispatch in whole clusters that live in memory: a seed decides who is slow, who dies, and what comes when.

A connection keeps the order of its messages, as ZeroMQ does; anything else may come in any order, and results also
twice. After each run: every round has ended, with the naive tree over its slices where it is done; nothing was sent to
a lost node; nobody waits for anything, and all credit is back.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from simulated_node import Message, SimNode, joined, mapped

from qjam.commands import Chunk, Command, Done, Fail, Failure, Load, Send, Unload
from qjam.dispatch import Dispatch, JobSpec
from qjam.states import NodeState
from qjam.transfers import CHUNK
from qjam_worker.reducing import Tree
from qjam_worker.wire import Kind

MIB = 1024 * 1024
CREDIT = 16 * MIB
STEPS = 160  # of a run, before the network calms down


def naive(params: str, nslices: int) -> str:
    """Level by level: pairs, then pairs of pairs, an odd one moves up."""
    level = [mapped(params, index) for index in range(nslices)]
    while len(level) > 1:
        pairs = [joined(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0]


@dataclass
class Faults:
    """What may go wrong in a run; how likely one step does it."""

    worker_dies: float = 0.02
    node_dies: float = 0.006
    node_gives_up: float = 0.0
    cancel: float = 0.01
    timer: float = 0.01
    raises: float = 0.1  # of the jobs
    poison: float = 0.05  # of the jobs
    unloadable: float = 0.0  # of the jobs
    late: float = 0.0  # of the results that a node had sent when it was given up


@dataclass
class Behaviour:
    """What the user code of a round does, and what the test did to the round."""

    nslices: int
    params: str
    spec: JobSpec
    raises: set[int]
    kills: set[int]
    unloadable: bool
    stopped: set[str] = field(default_factory=set)  # cancelled, timeout, room
    end: Done | Fail | None = None


class World:
    """A master's engine, its network and its nodes, all driven by one seed."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.dispatch = Dispatch()
        self.nodes: dict[str, SimNode] = {}
        self.behaviours: dict[int, Behaviour] = {}
        self.loads: deque[Load] = deque()
        self.loaded: deque[Callable[[], None]] = deque()
        self.blobs: dict[str, set[str]] = {}
        self.sizes: dict[str, int] = {}
        self.commands: deque[Command] = deque()
        self.working = False
        self.now = 0.0
        self.specs = [self._spec(number) for number in range(self.rng.randint(1, 3))]
        # A data set that raises does so for all rounds over it: the same object lies behind them.
        with_data = [spec.key for spec in self.specs if spec.refs is not None]
        self.unloadable = {key for key in with_data if self.chance(self.faults.unloadable)}
        for _ in range(self.rng.randint(1, 3)):
            self.add_node()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def raises(self, number: int) -> set[int]:
        return self.behaviours[number].raises

    def kills(self, number: int) -> set[int]:
        return self.behaviours[number].kills

    def _spec(self, number: int) -> JobSpec:
        nslices = self.rng.randint(1, 13)
        refs = None
        if self.chance(0.8):
            data = self.rng.choice("AB")  # jobs may share a data set, and slices may be alike
            refs = [f"{data}-{self.rng.choice([index, 0])}" for index in range(nslices)]
        code = f"code:{number}" if self.chance(0.3) else None
        return JobSpec(number, {"reduce": self.chance(0.5), "code": code, "job": number}, refs, nslices)

    # What the engine does

    def act(self, commands: list[Command]) -> None:
        """Do the commands in their order, those that follow from one behind the others."""
        for command in commands:
            if isinstance(command, (Send, Load, Chunk)):
                state = self.dispatch.nodes[command.node].state
                assert state is not NodeState.LOST, f"{command} is for a lost node"
        self.commands.extend(commands)
        if self.working:
            return
        self.working = True
        while self.commands:
            self.perform(self.commands.popleft())
        self.working = False

    def perform(self, command: Command) -> None:
        if isinstance(command, (Done, Fail)):
            behaviour = self.behaviours[command.round]
            assert behaviour.end is None, "a round ended twice"
            behaviour.end = command
        elif isinstance(command, Unload):
            self.blobs[command.node].discard(command.ref)
        elif self.dispatch.nodes[command.node].state is NodeState.LOST:
            pass  # lost since the command was given
        elif isinstance(command, Load):
            self.loads.append(command)
        elif isinstance(command, Chunk):
            assert command.ref in self.blobs[command.node], "a chunk of what is not loaded"
            assert 0 < command.size <= CHUNK
            header = {"ref": command.ref, "offset": command.offset, "total": self.size(command.ref)}
            self.deliver(command.node, Message(Kind.REFS, header, (command.size,)))
        else:
            self.deliver(command.node, Message(command.kind, command.header, command.buffers))

    def deliver(self, name: str, message: Message) -> None:
        node = self.nodes[name]
        if node.alive:
            node.down.append(message)
            under_way = sum(m.buffers[0] for m in node.down if m.kind is Kind.REFS and "gone" not in m.header)
            assert under_way <= CREDIT, "credit overdrawn"
        elif self.chance(0.5):
            self.lose(name)  # ROUTER_MANDATORY: the connection is gone

    def size(self, ref: str) -> int:
        sizes = [10_000] if ref.startswith(("module:", "code:")) else [1, 100, 5 * MIB, 40 * MIB]
        return self.sizes.setdefault(ref, self.rng.choice(sizes))

    def lose(self, name: str) -> None:
        node = self.nodes[name]
        late = [message for message in node.up if message.kind is Kind.RESULT]
        node.alive = False
        node.up.clear()
        node.down.clear()
        self.act(self.dispatch.on_node_lost(name, "gone"))
        node.up.extend(message for message in late if self.chance(self.faults.late))

    # Steps

    def add_node(self) -> None:
        name = f"node{len(self.nodes)}"
        workers = self.rng.randint(1, 3)
        self.nodes[name] = node = SimNode(self, name, workers)
        self.blobs[name] = set()
        self.dispatch.add_node(name, f"host of {name}", workers)
        node.send(Kind.HELLO, {"credit": CREDIT})
        node.send(Kind.STATE, {"state": "ready", "workers": [1] * workers})

    def submit(self) -> None:
        number, spec = len(self.behaviours) + 1, self.rng.choice(self.specs)
        if spec.refs is None:
            nslices = max(1, self.dispatch.capacity)
            spec = JobSpec((spec.key, nslices), spec.entry, None, nslices)
        behaviour = Behaviour(spec.nslices, f"p{number}", spec, set(), set(), False)
        if self.chance(self.faults.raises):
            behaviour.raises = {self.rng.randrange(spec.nslices)}
        if self.chance(self.faults.poison):
            behaviour.kills = {self.rng.randrange(spec.nslices)}
        behaviour.unloadable = spec.key in self.unloadable
        self.behaviours[number] = behaviour
        params_ref = f"params:{number}" if self.chance(0.2) else None
        deadline = self.now + self.rng.randint(1, 5) if self.chance(0.2) else None
        frames = () if params_ref else (behaviour.params,)
        self.act(self.dispatch.on_submit(number, spec, frames, params_ref, deadline))

    def load(self) -> None:
        command = self.loads.popleft()
        behaviour = self.behaviours[command.round]
        is_slice = not command.ref.startswith(("module:", "params:", "code:"))
        if behaviour.unloadable and is_slice:
            failure = Failure("load", "a slice could not be made")
            self.loaded.append(lambda: self.act(self.dispatch.on_load_failed(command.node, command.ref, failure)))
            return

        def loaded() -> None:
            if self.dispatch.nodes[command.node].state is not NodeState.LOST:
                self.blobs[command.node].add(command.ref)
            self.act(self.dispatch.on_loaded(command.node, command.ref, self.size(command.ref)))

        self.loaded.append(loaded)

    def hear(self, node: SimNode) -> None:
        message = node.up.popleft()
        name, header, buffers = node.name, message.header, list(message.buffers)
        state = self.dispatch.nodes[name].state
        if message.kind is Kind.RESULT:
            self.act(self.dispatch.on_result(name, header, buffers))
            if self.chance(0.1):
                self.act(self.dispatch.on_result(name, header, buffers))
        elif state is NodeState.LOST:
            return
        elif message.kind is Kind.HELLO:
            self.act(self.dispatch.on_hello(name, header))
        elif message.kind is Kind.CREDIT:
            self.act(self.dispatch.on_credit(name, header["bytes"]))
        elif message.kind is Kind.ERROR:
            self.act(self.dispatch.on_error(name, header, buffers))
        else:
            self.act(self.on_state(name, header))

    def on_state(self, name: str, header: dict[str, Any]) -> list[Command]:
        if header["state"] == "ready":
            return self.dispatch.on_ready(name, header["workers"])
        if header["state"] == "replaced":
            self.dispatch.on_worker_replaced(name, header["worker"], header["pid"])
            return []
        if header["state"] == "lost":
            return self.dispatch.on_worker_lost(name, header)
        return self.dispatch.on_missing(name, header["round"], [(ref, at) for ref, at in header["missing"]])

    def cancel(self) -> None:
        number = self.rng.choice(list(self.dispatch.rounds))
        self.behaviours[number].stopped.add("cancelled")
        self.act(self.dispatch.on_cancel(number, Failure("cancelled", "cancelled")))

    def timer(self) -> None:
        deadline = self.dispatch.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        for number, round_ in self.dispatch.rounds.items():
            if round_.deadline is not None and round_.deadline <= self.now:
                self.behaviours[number].stopped.add("timeout")
        self.act(self.dispatch.on_timer(self.now))

    def ordinary(self) -> list[Callable[[], None]]:
        """What can happen without anything going wrong."""
        steps: list[Callable[[], None]] = []
        for node in self.nodes.values():
            if node.up:
                steps.append(lambda node=node: self.hear(node))  # type: ignore[misc]
            if node.down and node.alive:
                steps.append(node.receive)
            if node.alive:
                for worker in node.workers:
                    if not worker.ready:
                        steps.append(lambda node=node, worker=worker: node.worker_comes_back(worker))  # type: ignore[misc]
                    elif worker.seq and worker.importing is None:
                        steps.append(lambda node=node, worker=worker: node.work(worker))  # type: ignore[misc]
        if self.loads:
            steps.append(self.load)
        if self.loaded:
            steps.append(lambda: self.loaded.popleft()())
        return steps

    def mishap(self) -> None:
        alive = [node for node in self.nodes.values() if node.alive]
        if alive and self.chance(self.faults.worker_dies):
            node = self.rng.choice(alive)
            ready = [worker for worker in node.workers if worker.ready]
            if ready and self.dispatch.nodes[node.name].state is NodeState.READY:
                node.worker_dies(self.rng.choice(ready))
        if alive and self.chance(self.faults.node_dies):
            node = self.rng.choice(alive)
            node.alive = False  # what it has sent may still come, up to the moment that its end is noticed
        if self.chance(self.faults.node_gives_up):
            rounds = [(node, round_) for node in alive for round_ in node.rounds.values()]
            if rounds:
                node, round_ = self.rng.choice(rounds)
                self.behaviours[round_.number].stopped.add("room")
                node.give_up(round_)
        if self.dispatch.rounds and self.chance(self.faults.cancel):
            self.cancel()
        if self.dispatch.next_deadline() is not None and self.chance(self.faults.timer):
            self.timer()
        if self.unnoticed() and self.chance(0.2):
            self.lose(self.rng.choice(self.unnoticed()))
        if len(self.nodes) < 6 and self.chance(0.01):
            self.add_node()

    def unnoticed(self) -> list[str]:
        """The dead nodes that are not known to be."""
        records = self.dispatch.nodes
        return [n for n, node in self.nodes.items() if not node.alive and records[n].state is not NodeState.LOST]

    def run(self) -> None:
        for _ in range(STEPS):
            steps = self.ordinary()
            if not steps or (len(self.dispatch.rounds) < 4 and self.chance(0.08)):
                self.submit()
            else:
                self.rng.choice(steps)()
            self.mishap()
            self.check_credit()
        self.calm()

    def calm(self) -> None:
        """Let everything come to its end; nothing goes wrong any more, and what has is noticed."""
        for name in self.unnoticed():
            self.lose(name)
        for _ in range(100_000):
            steps = self.ordinary()
            if not steps:
                return
            self.rng.choice(steps)()
            self.check_credit()
        pytest.fail("the cluster does not come to rest")

    # What always holds

    def check_credit(self) -> None:
        assert all(node.credit >= 0 for node in self.dispatch.nodes.values()), "credit overdrawn"

    def check(self) -> None:
        assert not self.dispatch.rounds, f"rounds that nobody works on: {list(self.dispatch.rounds)}"
        for number, behaviour in self.behaviours.items():
            self.check_end(number, behaviour)
        for name, record in self.dispatch.nodes.items():
            assert not record.transfers, f"{name} still waits for {record.transfers}"
            node = self.nodes[name]
            if node.alive:
                assert not self.blobs[name], f"contents that nobody needs are kept for {name}"
                assert not node.rounds, f"{name} was not told of the end of {node.rounds}"
                assert not [worker for worker in node.workers if worker.seq]
                assert record.credit == CREDIT, "credit was not given back"

    def check_end(self, number: int, behaviour: Behaviour) -> None:
        end = behaviour.end
        assert end is not None
        if isinstance(end, Done):
            assert not behaviour.raises
            assert not behaviour.kills
            self.check_result(end, behaviour)
            return
        what = end.failure.what
        if what == "task":
            assert end.failure.slice in behaviour.raises
        elif what == "lost":
            assert behaviour.kills or self.faults.worker_dies
        elif what == "load":
            assert behaviour.unloadable
        elif what == "unreachable":
            assert NodeState.LOST in {node.state for node in self.dispatch.nodes.values()}
        else:
            assert what in behaviour.stopped

    def check_result(self, end: Done, behaviour: Behaviour) -> None:
        tree = Tree(behaviour.nslices)
        slices: list[int] = []
        for (lo, hi), buffers in end.roots:
            slices += range(lo, hi)
            assert tree.add((lo, hi), buffers[0])
        assert slices == list(range(behaviour.nslices)), "each slice counts once"
        tree.fold(joined)
        assert tree.values[0, behaviour.nslices] == naive(behaviour.params, behaviour.nslices)


def run_clusters(seeds: range, faults: Faults) -> list[World]:
    worlds = []
    for seed in seeds:
        world = World(seed, faults)
        try:
            world.run()
            world.check()
        except BaseException as error:
            error.add_note(f"seed {seed}") if hasattr(error, "add_note") else print(f"seed {seed}")
            raise
        worlds.append(world)
    return worlds


def outcomes(worlds: list[World]) -> set[str]:
    ends = [behaviour.end for world in worlds for behaviour in world.behaviours.values()]
    return {end.failure.what if isinstance(end, Fail) else "done" for end in ends if end is not None}


def test_every_round_is_done_when_nothing_goes_wrong() -> None:
    calm = Faults(worker_dies=0, node_dies=0, cancel=0, timer=0, raises=0, poison=0)
    assert outcomes(run_clusters(range(150), calm)) == {"done"}


def test_lost_workers_and_nodes_change_no_result() -> None:
    losses = Faults(worker_dies=0.05, node_dies=0.01, cancel=0, timer=0, raises=0, poison=0)
    found = outcomes(run_clusters(range(300), losses))
    assert found == {"done", "lost", "unreachable"}


def test_late_results_of_nodes_that_were_given_up_change_no_result() -> None:
    found = outcomes(run_clusters(range(200), Faults(node_dies=0.02, late=0.5)))
    assert {"done", "unreachable"} <= found


def test_exceptions_poison_cancelled_and_late_rounds_leave_the_others_as_they_are() -> None:
    found = outcomes(run_clusters(range(500), Faults()))
    assert found == {"done", "lost", "unreachable", "task", "cancelled", "timeout"}


def test_many_cancelled_rounds_hold_up_no_transfer() -> None:
    found = outcomes(run_clusters(range(200), Faults(cancel=0.1, timer=0.05, node_dies=0, worker_dies=0)))
    assert {"done", "cancelled", "timeout"} <= found


def test_nodes_that_give_rounds_up_end_them_everywhere() -> None:
    found = outcomes(run_clusters(range(200), Faults(node_gives_up=0.02)))
    assert {"done", "room"} <= found


def test_slices_that_cannot_be_made_end_the_rounds_that_want_them() -> None:
    found = outcomes(run_clusters(range(200), Faults(unloadable=0.5, cancel=0.05)))
    assert {"done", "load"} <= found


@pytest.mark.parametrize("nslices", range(1, 40))
def test_the_naive_tree_is_the_fixed_tree(nslices: int) -> None:
    tree = Tree(nslices)
    for index in range(nslices):
        tree.add((index, index + 1), mapped("p", index))
    tree.fold(joined)
    assert tree.values[0, nslices] == naive("p", nslices)
