"""Carries out what dispatch decides: messages to nodes over their links, loads, the ends of rounds."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

from qjam.dispatch.call import Call
from qjam.dispatch.commands import Block, Command, Done, Ended, Fail, Failure, Gone, Load, Lost, Note, Send, Unload
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.states import NodeState
from qjam.stats import Stats
from qjam_worker.values import flat
from qjam_worker.wire.frames import Kind, Message, pack
from qjam_worker.wire.refs import ARGUMENT, CODE, MODULE, PARAMS, SLICE, Ref

from .call_queue import CallQueue
from .loader import Blob, Changed, Loader
from .local_nodes import LocalNodes
from .peers import Peers
from .pending import Pending
from .router import Router

# Params up to so many bytes ride in the task; a node pulls larger ones in blocks, so that nothing queues behind them.
PARAMS_INLINE = 4 * 1024 * 1024

CLOSED = Failure("closed", "the master was closed while the round was running")
CALLS_CLOSED = Failure("closed", "the master was closed before the call had ended")

# The figure of Stats that counts the bytes of a ref.
COUNTERS = {
    MODULE: "code_sent",
    CODE: "code_sent",
    PARAMS: "params_sent",
    SLICE: "dataset_sent",
    ARGUMENT: "params_sent",
}


class NodeObserver(Protocol):
    """Who looks after the nodes; called in the loop. `on_lost` may add a successor (`Engine.add_successor`)."""

    def on_ready(self, name: str) -> None: ...
    def on_lost(self, name: str, why: str) -> None: ...
    def on_note(self, text: str, level: int = logging.WARNING) -> None: ...


class Nobody:
    """Looks after no node."""

    def on_ready(self, name: str) -> None: ...
    def on_lost(self, name: str, why: str) -> None: ...
    def on_note(self, text: str, level: int = logging.WARNING) -> None: ...


class Carrier:
    """Carries commands out in the order in which they were decided, in the loop."""

    def __init__(
        self,
        dispatch: Dispatch,
        peers: Peers,
        router: Router,
        local_nodes: LocalNodes,
        loader: Loader,
        calls: CallQueue,
        stats: Stats,
    ) -> None:
        self.observer: NodeObserver = Nobody()
        self.on_ended: Callable[[Ended], None] = lambda command: None
        self.pending: dict[int, Pending] = {}  # the rounds that run, by number
        self.leaving = False  # whether all nodes have been told to leave
        self.leaving_nodes: set[str] = set()  # that were removed and have not left yet
        self._dispatch, self._peers, self._router, self._local_nodes = dispatch, peers, router, local_nodes
        self._loader, self._calls, self._stats = loader, calls, stats
        self._numbers = count(1)
        self._commands: deque[Command] = deque()
        self._acting = False
        self._perform: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            Load: self._load,
            Block: self._block,
            Unload: self._unload,
            Gone: self._gone,
            Done: self._done,
            Fail: self._fail,
            Ended: lambda command: self.on_ended(command),  # noqa: PLW0108  it is set later
            Lost: self._lost,
            Note: lambda command: self.observer.on_note(command.text),
        }

    def act(self, commands: list[Command]) -> None:
        """Carry these out. What follows from carrying one out (a node is found to be gone) comes after the rest."""
        self._commands.extend(commands)
        if self._acting or not self._commands:
            return
        self._acting = True
        try:
            while self._commands:
                command = self._commands.popleft()
                self._perform[type(command)](command)
        finally:
            self._acting = False

    def is_there(self, name: str) -> bool:
        """Whether a node can be sent to and heard."""
        record = self._dispatch.nodes.get(name)
        return name in self.leaving_nodes if record is None else record.state is not NodeState.LOST

    def lose(self, name: str, why: str) -> None:
        """A node has ended or is of no use any more."""
        self.act(self._dispatch.on_node_lost(name, why))

    def submit(self, pending: Pending) -> None:
        """Begin a round."""
        if self.leaving:
            pending.end(None, CLOSED)
            return
        number = pending.number = next(self._numbers)
        self.pending[number] = pending
        self.act(self._dispatch.on_submit(number, pending.spec, pending.deadline, time.monotonic()))

    def crash(self, failure: Failure) -> None:
        """Nothing is carried out any more: end all waiting."""
        for pending in self.pending.values():
            pending.end(None, failure)
        self.end_calls(list(self._dispatch.calls.calls.values()), failure)
        self._peers.release()

    def end_calls(self, calls: list[Call], failure: Failure) -> None:
        """No calls are made any more."""
        self.on_ended(Ended([], [], [(call, failure) for call in calls]))

    def _send(self, command: Send) -> None:
        node, kind, header, buffers = command
        if not self.is_there(node):
            return
        lane = self._local_nodes.lanes.get(node)
        if kind is Kind.TASK and header["params"] == "send":
            params = self.pending[header["round"]].params
            if lane is None and flat.size(params) > PARAMS_INLINE:
                header = {**header, "params": "ref"}
            else:
                header, buffers = {**header, "params": "inline"}, (params.header, *params.buffers)
                self._stats.params_sent += sum(memoryview(buffer).nbytes for buffer in buffers)
        if lane is not None:
            lane.down.append(Message(kind, header, list(buffers)))
        elif not self._router.send(node, pack(kind, header, buffers)):
            self._peers.set_gone(node)  # it cannot say BYE
            self.lose(node, "its connection is gone")

    def _lost(self, command: Lost) -> None:
        name = command.node
        self._stats.resent_slices = self._dispatch.resent
        self._peers[name].changed.set()
        self._local_nodes.end(name)
        if not self.leaving:
            self.observer.on_lost(name, command.why)
        self.act(self._dispatch.reassign())

    def _load(self, command: Load) -> None:
        node, ref = command.node, command.ref

        def failed(error: BaseException) -> None:
            failure = Failure("load", f"a slice of the data set could not be made: {error!r}", error=error)
            self._calls.post(lambda: self._load_failed(node, ref, failure))

        def done(blob: Blob) -> None:
            self._calls.post(lambda: self.loaded(node, ref, blob))

        self._loader.load(ref, self.pending.get(command.round), done, failed)

    def loaded(self, node: str, ref: Ref, blob: Blob) -> None:
        """The loader has made the content of a ref."""
        if node in self._dispatch.nodes:
            self._peers[node].blobs[ref] = blob
            self.act(self._dispatch.refs.on_loaded(node, ref, blob.size))

    def _load_failed(self, node: str, ref: Ref, failure: Failure) -> None:
        if node in self._dispatch.nodes:
            self.act(self._dispatch.refs.on_load_failed(node, ref, failure))

    def _block(self, command: Block) -> None:
        if not self.is_there(command.node):
            return
        blob = self._peers[command.node].blobs[command.ref]
        header = {"ref": command.ref, "offset": command.offset, "total": blob.size}
        try:
            buffers = tuple(blob.range(command.offset, command.size))
        except Changed as error:
            self.act(self._dispatch.refs.on_changed(command, Failure("load", str(error), error=error)))
            return
        self._send(Send(command.node, Kind.REFS, header, buffers))
        counter = COUNTERS[command.ref.kind]
        setattr(self._stats, counter, getattr(self._stats, counter) + command.size)

    def _unload(self, command: Unload) -> None:
        peer = self._peers.get(command.node)
        if peer is not None:
            peer.blobs.pop(command.ref, None)

    def _gone(self, command: Gone) -> None:
        header = {"ref": command.ref, "offset": 0, "total": 0, "gone": True}
        self._send(Send(command.node, Kind.REFS, header, (b"",)))

    def _done(self, command: Done) -> None:
        self._stats.rounds += 1
        self.pending.pop(command.round).end(command.roots, None)

    def _fail(self, command: Fail) -> None:
        self._stats.failed_rounds += 1
        self.pending.pop(command.round).end(None, command.failure)
