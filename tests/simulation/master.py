"""The master of a simulated cluster: the real Dispatch; the engine and the supervisor around it are played."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qjam.data.leases import Lease
from qjam.dispatch.call import Function
from qjam.dispatch.commands import Block, Command, Done, Ended, Fail, Failure, Gone, Load, Lost, Note, Send, Unload
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.rounds import RoundSpec
from qjam.dispatch.states import COMING, NodeState
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import Part, Ref, of_params

from . import call_checks, checks
from .plans import HostPlan
from .world import Broken, Message, Process, told

if TYPE_CHECKING:
    from .calls import CallRun
    from .cluster import Cluster
    from .node import Node

# Params above this many bytes are pulled as a ref. (In reality 4 MiB.)
INLINE = 500
FIRST_PAUSE, MAX_PAUSE, STEADY = 0.5, 60.0, 60.0
START_TIMEOUT, STOP_TIMEOUT = 60.0, 5.0


def gone_header(command: Gone) -> dict[str, Any]:
    return {"ref": command.ref, "offset": 0, "total": 0, "gone": True}


@dataclass
class Member:
    """A host that belongs to the master."""

    host: int
    plan: HostPlan
    name: str
    starting: bool = True
    launches: int = 0
    names: int = 0
    restarts: int = 0
    ready_at: float | None = None


class Master(Process):
    """Carries out what dispatch decides, in the order of the decisions."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster, "master")
        self.cluster = cluster
        self.dispatch = Dispatch(speculation=cluster.plan.speculation)
        self.members: dict[str, Member] = {}
        self.blobs: dict[str, set[Ref]] = {}
        self.leaving_nodes: set[str] = set()
        self.leaving = False
        self.loader_free = 0.0
        self._commands: deque[Command] = deque()
        self._acting = False
        self._perform: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            Load: self._load,
            Block: self._chunk,
            Unload: lambda command: self.blobs.get(command.node, set()).discard(command.ref),
            Done: lambda command: cluster.on_end(command.round, command),
            Fail: lambda command: cluster.on_end(command.round, command),
            Gone: lambda command: self._send(Send(command.node, Kind.REFS, gone_header(command), (b"",))),
            Ended: lambda command: cluster.callers.on_ended(command),
            Lost: self._lost,
            Note: lambda command: cluster.say("master", f"notes: {command.text}"),
        }
        self._receive: dict[Kind, Callable[[str, dict[str, Any], list[Any]], list[Command]]] = {
            Kind.HELLO: lambda name, header, buffers: self.dispatch.on_hello(name, header),
            Kind.STATE: self._on_state,
            Kind.GET: self._on_get,
            Kind.CREDIT: lambda name, header, buffers: self.dispatch.refs.on_credit(name, header["bytes"]),
            Kind.RESULT: self.dispatch.on_result,
            Kind.ERROR: self.dispatch.on_error,
            Kind.RETURNS: self.dispatch.calls.on_returns,
            Kind.PONG: lambda name, header, buffers: [],
            Kind.BYE: lambda name, header, buffers: self.dispatch.on_node_lost(name, header["reason"]),
        }

    def next_deadline(self) -> float | None:
        return self.dispatch.next_deadline()

    def on_timer(self) -> None:
        self.act(self.dispatch.on_timer(self.world.now))

    def check(self) -> None:
        checks.check_master(self)
        call_checks.check_master(self)

    # Messages and commands

    def act(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, (Send, Load, Block)) and not self.is_there(command.node):
                raise Broken(f"{command} is for a node that is not there")
        self.cluster.callers.check_sent([c for c in commands if isinstance(c, Send) and c.kind is Kind.CALLS])
        self._commands.extend(commands)
        if self._acting:
            return
        self._acting = True
        while self._commands:
            command = self._commands.popleft()
            self._perform[type(command)](command)
        self._acting = False

    def is_there(self, name: str) -> bool:
        record = self.dispatch.nodes.get(name)
        return name in self.leaving_nodes if record is None else record.state is not NodeState.LOST

    def on_message(self, node: Node, message: Message) -> None:
        self._hear(node, message)
        if message.kind is Kind.RESULT and self.cluster.duplicates(node):
            self.cluster.say("master", f"the RESULT of {node.name} comes twice")
            delay = 0.1 * self.world.noise(6, node.link.key, self.world.steps)
            self.world.at(self.world.now + delay, self, self._hear, node, message)

    def _hear(self, node: Node, message: Message) -> None:
        name, record = node.name, self.dispatch.nodes.get(node.name)
        if record is None or not self.is_there(name):
            return
        self.cluster.on_heard(name, message)
        commands = self.dispatch.on_heard(name, self.world.now)
        try:
            commands += self._receive[message.kind](name, message.header, message.buffers)
        except ValueError:
            if record.state is not NodeState.CLOSED:
                raise
        self.act(commands)

    def _on_state(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        if header["state"] == "ready":
            commands = self.dispatch.on_ready(name, header["workers"])
            self._on_ready(name)
            return commands
        if header["state"] == "replaced":
            return self.dispatch.on_worker_replaced(name, header["worker"], header["pid"])
        if header["state"] == "shared":
            self.cluster.counts["shared"] += len(header["indices"])
            return self.dispatch.on_shared(name, header)
        return self.dispatch.on_worker_lost(name, header)

    def _on_get(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        parts = [Part(Ref(*ref), offset, end) for ref, offset, end in header["refs"]]
        return self.dispatch.refs.on_get(name, header["round"], parts)

    def _send(self, command: Send) -> None:
        if not self.is_there(command.node):
            return
        node = self.cluster.nodes.get(command.node)
        if node is None:  # it has not been started yet
            self.lose(command.node, "its connection is gone")
            return
        if self.world.trace is not None:
            self.cluster.say("master", f"-> {command.node}: {told(command.kind, command.header)}")
        header, buffers = command.header, list(command.buffers)
        if command.kind is Kind.TASK and header["params"] == "send":
            large = self.cluster.size(of_params(header["round"])) > INLINE
            header, buffers = {**header, "params": "ref" if large else "inline"}, [] if large else [b"params"]
        self._deliver(node, Message(command.kind, header, buffers), 100 + sum(map(len, buffers)))

    def _deliver(self, node: Node, message: Message, size: int) -> None:
        if node.link.broken:
            if self.world.noise(8, node.link.key, self.world.steps) < 0.5:
                self.lose(node.name, "its connection is gone")
            return
        node.link.down.send(node, node.receive, message, size)

    def _load(self, command: Load) -> None:
        node, ref = command.node, command.ref
        size, failure = self.cluster.content(command.round, ref)
        self.loader_free = max(self.world.now, self.loader_free) + 1e-4 + size / 2e9
        self.world.at(self.loader_free, self, self._loaded, node, ref, size, failure)

    def _loaded(self, node: str, ref: Ref, size: int, failure: Failure | None) -> None:
        if node not in self.dispatch.nodes:
            return
        if failure is not None:
            self.act(self.dispatch.refs.on_load_failed(node, ref, failure))
            return
        self.blobs[node].add(ref)
        self.act(self.dispatch.refs.on_loaded(node, ref, size))

    def _chunk(self, command: Block) -> None:
        if not self.is_there(command.node):
            return
        if command.ref not in self.blobs[command.node]:
            raise Broken(f"{command} is of what is not loaded")
        node = self.cluster.nodes[command.node]
        header = {"ref": command.ref, "offset": command.offset, "total": self.cluster.size(command.ref)}
        if command.offset + command.size == header["total"] and self.cluster.has_changed(command.round, command.ref):
            self.act(self.dispatch.refs.on_changed(command, Failure("load", "it has changed")))
            return
        if self.world.trace is not None:
            self.cluster.say("master", f"-> {command.node}: {command.size} bytes of {command.ref} at {command.offset}")
        self._deliver(node, Message(Kind.REFS, header, [command.size]), command.size)

    # Rounds

    def submit(self, number: int, spec: RoundSpec, wait: float | None) -> None:
        """In the loop, as all that follows."""
        if self.leaving:
            self.cluster.on_end(number, Fail(number, Failure("closed", "closed")))
            return
        deadline = None if wait is None else self.cluster.runs[number].began + wait
        self.act(self.dispatch.on_submit(number, spec, deadline, self.world.now))

    def cancel(self, number: int) -> None:
        self.act(self.dispatch.on_cancel(number, Failure("cancelled", "cancelled")))

    def let_go(self, lease: Lease, at_once: bool) -> None:
        self.act(self.dispatch.on_let_go(lease, at_once, self.world.now))

    def say_goodbye(self) -> None:
        self.leaving = True
        for number in [*self.dispatch._line._waiting, *self.dispatch.rounds]:
            self.act(self.dispatch.on_cancel(number, Failure("closed", "closed")))
        self.act(self.dispatch.calls.fail_all(Failure("closed", "closed")))
        self.act(self.dispatch.on_close())

    # Calls

    def submit_calls(self, runs: list[CallRun]) -> None:
        calls = [run.call for run in runs]
        if self.leaving:
            for call in calls:
                call.over = True
            self.cluster.callers.on_ended(Ended([], [], [(call, Failure("closed", "closed")) for call in calls]))
            return
        commands = self.dispatch.on_calls(calls, self.world.now)
        self.cluster.callers.by_id.update((run.call.id, run) for run in runs)
        self.act(commands)

    def cancel_calls(self, runs: list[CallRun]) -> None:
        self.act(self.dispatch.calls.cancel([run.call for run in runs]))

    def forget_function(self, function: Function) -> None:
        self.act(self.dispatch.calls.forget(function))

    # Hosts

    def add(self, host: int, plan: HostPlan, first: bool) -> None:
        """Start a host. `first`: with the master itself."""
        if self.leaving:
            return
        name = f"h{host}"
        member = self.members[name] = Member(host, plan, name)
        self.blobs[name] = set()
        self.dispatch.add_node(name, name, plan.workers)
        self._launch(member, name, first)
        self.world.at(self.world.now + START_TIMEOUT, self, self._settle, member)

    def _launch(self, member: Member, name: str, calm: bool = False) -> None:
        if self.members.get(name) is not member or self.leaving:
            return
        member.launches += 1
        self.cluster.launch(member.host, name, member.plan, member.launches, calm)
        if not member.starting:
            self.world.at(self.world.now + START_TIMEOUT + 6.0, self, self._watch, member, name)

    def _watch(self, member: Member, name: str) -> None:
        if self.members.get(name) is member and member.ready_at is None:
            self.lose(name, f"not ready after {START_TIMEOUT:.0f} s")

    def _settle(self, member: Member) -> None:
        """Nobody waits for the start of a host any longer."""
        if member.starting and self.members.get(member.name) is member:
            self.take_out(member, "it did not start")

    def take_out(self, member: Member, why: str) -> None:
        """Have a host leave."""
        name = member.name
        del self.members[name]
        record = self.dispatch.nodes.get(name)
        if record is not None:
            self.leaving_nodes.add(name)
            self.act(self.dispatch.on_remove(name, why))
        self.world.at(self.world.now + STOP_TIMEOUT, self, self._forget, name)

    def _forget(self, name: str) -> None:
        self.leaving_nodes.discard(name)
        self.blobs.pop(name, None)
        self.cluster.end_of_lease(name)

    def _on_ready(self, name: str) -> None:
        member = self.members.get(name)
        if member is not None:
            member.ready_at, member.starting = self.world.now, False

    def lose(self, name: str, why: str) -> None:
        """A launcher says that a node has ended, or it is found to be gone."""
        self.act(self.dispatch.on_node_lost(name, why))

    def _lost(self, command: Lost) -> None:
        name = command.node
        successor = None if self.leaving else self._successor(name)
        if self.world.trace is not None:
            self.cluster.say("master", f"loses {name}: {command.why}; its successor is {successor}")
        self.blobs[name].clear()
        if successor is not None:
            del self.blobs[name]
            self.dispatch.add_successor(name, successor)
        self.act(self.dispatch.reassign())

    def _successor(self, name: str) -> str | None:
        self.cluster.end_of_lease(name)
        member = self.members.get(name)
        if member is None or member.starting:
            return None
        now = self.world.now
        if member.ready_at is not None and now - member.ready_at > STEADY:
            member.restarts = 0
        member.ready_at = None
        if member.restarts >= self.cluster.plan.restarts:
            return None
        pause = min(FIRST_PAUSE * 2**member.restarts, MAX_PAUSE)
        member.restarts += 1
        del self.members[name]
        member.names += 1
        member.name = successor = f"h{member.host}.{member.names}"
        self.members[successor] = member
        self.blobs[successor] = set()
        self.world.at(now + pause, self, self._launch, member, successor)
        return successor

    @property
    def somebody_comes(self) -> bool:
        """Whether a node may yet be ready."""
        return any(record.state in COMING for record in self.dispatch.nodes.values())
