"""What nodes say: each message is checked, becomes an event of dispatch, and its commands are carried out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from qjam.dispatch.commands import Command
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.states import NodeState
from qjam.stats import Stats
from qjam_worker.wire.frames import Kind, Message, WireError, unpack
from qjam_worker.wire.messages import MAX_REASON
from qjam_worker.wire.refs import Part, Ref

from .carrying_out import Carrier
from .peers import Peers

# Bytes that a node may have printed and nobody has read yet, 64 more counted for each piece. It lets its workers print
# 1 MiB ahead; beyond that comes what is left in the pipes of workers that die.
MAX_UNREAD, PIECE = 128 * 1024 * 1024, 64

# What a node may say before HELLO: BYE, when it could not start.
FIRST_WORDS = frozenset({Kind.HELLO, Kind.BYE})

OnPrint = Callable[[str, str, int, int, bytes], None]  # node, host, worker, stream, data
Header = dict[str, Any]
Buffers = list[Any]


class Inbox:
    """Takes messages, in the loop. `on_print` is called with what user code has printed."""

    def __init__(self, dispatch: Dispatch, peers: Peers, carrier: Carrier, stats: Stats) -> None:
        self.on_print: OnPrint = lambda *_: None
        self._dispatch = dispatch
        self._peers = peers
        self._carrier = carrier
        self._stats = stats
        self._receive: dict[Kind, Callable[[str, Header, Buffers], list[Command]]] = {
            Kind.HELLO: lambda name, header, buffers: dispatch.on_hello(name, header),
            Kind.STATE: lambda name, header, buffers: self._states[header["state"]](name, header),
            Kind.GET: self._on_get,
            Kind.CREDIT: lambda name, header, buffers: dispatch.refs.on_credit(name, header["bytes"]),
            Kind.RESULT: self._on_result,
            Kind.ERROR: dispatch.on_error,
            Kind.RETURNS: dispatch.calls.on_returns,
            Kind.LOG: self._on_log,
            Kind.PONG: self._on_pong,
            Kind.BYE: self._on_bye,
        }
        self._states: dict[str, Callable[[str, Header], list[Command]]] = {
            "ready": self._on_ready,
            "replaced": self._on_worker_replaced,
            "lost": self._on_worker_lost,
            "shared": dispatch.on_shared,
            "note": self._on_note,
        }

    def on_frames(self, name: str, frames: list[memoryview]) -> None:
        """A message came over a socket."""
        if self._carrier.is_there(name):
            try:
                message = unpack(frames)
            except WireError as error:
                self._carrier.lose(name, _not_understood(error))
            else:
                self.on_message(name, message)

    def on_message(self, name: str, message: Message) -> None:
        """A node says this. Whatever is wrong with it ends that node alone."""
        if not self._carrier.is_there(name):
            return
        record = self._dispatch.nodes.get(name)
        if record is None:  # it was removed
            if message.kind is Kind.BYE:
                self._peers.set_gone(name)
            return
        commands: list[Command] = []
        try:
            if message.kind not in self._receive:
                raise ValueError(f"{message.kind.name} is for nodes")
            if record.state is NodeState.STARTING and message.kind not in FIRST_WORDS:
                raise ValueError(f"{message.kind.name} came before HELLO")
            commands += self._dispatch.on_heard(name, time.monotonic())
            commands += self._receive[message.kind](name, message.header, message.buffers)
        except Exception as error:  # noqa: BLE001
            commands += self._dispatch.on_node_lost(name, _not_understood(error))
        self._carrier.act(commands)

    def acknowledge(self, name: str, size: int) -> None:
        """So many bytes of what a node printed have been shown."""
        if name in self._peers:
            self._peers[name].unread -= size + PIECE

    # By kind

    def _on_result(self, name: str, header: Header, buffers: Buffers) -> list[Command]:
        commands = self._dispatch.on_result(name, header, buffers)
        self._stats.results_received += sum(memoryview(buffer).nbytes for buffer in buffers)
        return commands

    def _on_get(self, name: str, header: Header, buffers: Buffers) -> list[Command]:
        parts = [Part(Ref(*ref), offset, end) for ref, offset, end in header["refs"]]
        return self._dispatch.refs.on_get(name, header["round"], parts)

    def _on_log(self, name: str, header: Header, buffers: Buffers) -> list[Command]:
        data, peer, record = bytes(buffers[0]), self._peers[name], self._dispatch.nodes[name]
        if header["worker"] >= record.workers:
            raise ValueError(f"it has no worker {header['worker']}")
        if peer.unread + len(data) + PIECE > MAX_UNREAD:
            raise ValueError("it sends more text than it may before that is read")
        peer.unread += len(data) + PIECE
        self._stats.output_received += len(data)
        self.on_print(name, record.host, header["worker"], header["stream"], data)
        return []

    def _on_pong(self, name: str, header: Header, buffers: Buffers) -> list[Command]:
        ping = self._peers[name].pings.get(header["t"])
        if ping is not None:
            ping.set()
        return []

    def _on_bye(self, name: str, header: Header, buffers: Buffers) -> list[Command]:
        self._peers.set_gone(name)
        return self._dispatch.on_node_lost(name, header["reason"][:MAX_REASON] or "it has left")

    # By state

    def _on_ready(self, name: str, header: Header) -> list[Command]:
        commands = self._dispatch.on_ready(name, header["workers"])
        self._peers[name].ready_at = time.monotonic()
        self._peers[name].changed.set()
        self._carrier.observer.on_ready(name)
        return commands

    def _on_worker_replaced(self, name: str, header: Header) -> list[Command]:
        worker, now = header["worker"], time.monotonic()
        commands = self._dispatch.on_worker_replaced(name, worker, header["pid"])
        took = now - self._peers[name].died_at.pop(worker, now)
        text = f"worker {worker} on {self._dispatch.nodes[name].host} is replaced after {took:.2f} s"
        self._carrier.observer.on_note(text, logging.INFO)
        return commands

    def _on_worker_lost(self, name: str, header: Header) -> list[Command]:
        commands = self._dispatch.on_worker_lost(name, header)
        self._stats.resent_slices = self._dispatch.resent
        self._peers[name].died_at[header["worker"]] = time.monotonic()
        text = f"worker {header['worker']} on {self._dispatch.nodes[name].host} {header['how']}"
        if header.get("round") in self._dispatch.rounds:
            self._carrier.observer.on_note(f"{text}; its slices are given out again", logging.WARNING)
        else:
            self._carrier.observer.on_note(text, logging.INFO)
        return commands

    def _on_note(self, name: str, header: Header) -> list[Command]:
        self._carrier.observer.on_note(f"{self._dispatch.nodes[name].host}: {header['text'][:MAX_REASON]}")
        return []


def _not_understood(error: Exception) -> str:
    return f"it sent what this version of qjam does not understand: {type(error).__name__}: {error}"[:MAX_REASON]
