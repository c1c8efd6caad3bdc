"""The loop that owns the ROUTER: messages and calls in, dispatch decides, messages and results out."""

from __future__ import annotations

import logging
import selectors
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeVar

import numpy as np
import zmq

from qjam.dispatch.commands import Block, Command, Done, Fail, Failure, Load, Lost, Note, Send, Unload
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.states import PRESENT, NodeState
from qjam.stats import Stats
from qjam_worker.ipc.spin_wait import SpinWait
from qjam_worker.values import flat
from qjam_worker.wire.frames import Kind, Message, WireError, pack, unpack

from .call_queue import CallQueue
from .deferred_signals import DeferredSignals
from .loader import Blob, Loader
from .local_nodes import LocalNodes, Make
from .loop_owner import LoopOwner
from .pending import Pending
from .router import Keys, Router

# Params up to this size ride in the task; larger ones are pulled in chunks, so that nothing queues behind them.
PARAMS_INLINE = 4 * 1024 * 1024

# Seconds; epoll takes no more than 24 days, and a caller's timeout may be infinite.
MAX_WAIT = 3600.0

# Bytes that a node may have printed and nobody has read yet, 64 more counted for each piece. It lets its workers print
# 1 MiB ahead; beyond that comes what is left in the pipes of workers that die.
MAX_UNREAD, PIECE = 128 * 1024 * 1024, 64

# Characters of what a node says of its end, or of what is wrong with it.
MAX_REASON = 8192

# What a node may say before HELLO: BYE, when it could not start.
FIRST_WORDS = frozenset({Kind.HELLO, Kind.BYE})

OnPrint = Callable[[str, str, int, int, bytes], None]  # node, host, worker, stream, data
T = TypeVar("T")

# Calls within calls that the loop may need.
CALLS = 100

CLOSED = Failure("closed", "the master was closed while the round was running")


class NodeObserver(Protocol):
    """Who looks after the nodes; called in the loop."""

    def on_ready(self, name: str) -> None: ...
    def on_lost(self, name: str, why: str) -> None: ...
    def on_note(self, text: str, level: int = logging.WARNING) -> None: ...


@dataclass
class _Node:
    """The engine's own record of a node; its life is dispatch's."""

    changed: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    ready_at: float = 0.0
    pinged: dict[float, threading.Event] = field(default_factory=dict)
    died_at: dict[int, float] = field(default_factory=dict)  # workers that are being replaced
    unread: int = 0  # as counted for MAX_UNREAD
    blobs: dict[str, Blob] = field(default_factory=dict)


class Engine:
    """One loop with the ROUTER, run by a thread of its own, or by the caller of `run`. The methods without underscore
    may be called from any thread.
    """

    def __init__(self, endpoint: str, find_module: Callable[[str], bytes], *, speculation: bool = True) -> None:
        self.endpoint = endpoint
        self.stats = Stats()
        self._on_print: OnPrint = lambda *_: None
        self._observer: NodeObserver | None = None
        self._dispatch = Dispatch(speculation=speculation)
        self._nodes: dict[str, _Node] = {}
        self._leaving_nodes: set[str] = set()  # that were removed and have not left yet
        self._pending: dict[int, Pending] = {}
        self._calls = CallQueue(lambda: self._owner.wake())  # noqa: PLW0108  they need each other
        self._numbers = count(1)
        self._router = Router(endpoint)
        self._selector = selectors.DefaultSelector()
        self._waiting = SpinWait(self._selector)
        self._local_nodes = LocalNodes(self._selector, self._on_local_failed)
        self._owner = LoopOwner(self._calls.wake)
        self._loader = Loader(find_module)
        self._commands: deque[Command] = deque()
        self._acting = False
        self._stopped = False
        self._error: BaseException | None = None
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="qjam-engine", daemon=True)
        self._perform: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            Load: self._load,
            Block: self._send_block,
            Unload: self._unload,
            Done: self._done,
            Fail: self._failed,
            Lost: self._lost,
            Note: lambda command: self._note(command.text),
        }
        self._receive: dict[Kind, Callable[[str, dict[str, Any], list[Any]], list[Command]]] = {
            Kind.HELLO: lambda name, header, buffers: self._dispatch.on_hello(name, header),
            Kind.STATE: self._on_state,
            Kind.CREDIT: lambda name, header, buffers: self._dispatch.on_credit(name, header["bytes"]),
            Kind.RESULT: self._on_result,
            Kind.ERROR: self._dispatch.on_error,
            Kind.LOG: self._on_log,
            Kind.PONG: self._on_pong,
            Kind.BYE: self._on_bye,
        }

    def start(self, on_print: OnPrint, observer: NodeObserver | None = None) -> None:
        """Start the loop; in it `on_print` is called with what user code has printed, `hosts` with the fate of nodes:
        its `on_lost` may call `add_successor`.
        """
        self._on_print = on_print
        self._observer = observer
        self._thread.start()
        self._loader.start()

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """For nodes that connect over inproc."""
        return self._router.context

    # Calls from other threads

    def admit(self, name: str) -> Keys:
        """The keys with which a node may connect as `name`."""
        return self._router.admit(name)

    def bind(self, address: str) -> str:
        """The endpoint of the ROUTER on an address of this machine, as in `Router.bind`. Raises OSError."""

        def bind() -> str:
            try:
                return self._router.bind(address)
            finally:
                if self._router.zap is not None and self._router.zap not in self._selector.get_map():
                    self._selector.register(self._router.zap, selectors.EVENT_READ, (self._on_zap, None))

        return self.ask(bind)

    def ask(self, call: Callable[[], T]) -> T:
        """What a call in the loop gives, or raises. OSError when there is no loop any more."""
        return self._calls.ask(call)

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        """Have the loop make a call after `delay` seconds. To be called in the loop."""
        self._calls.later(delay, call)

    def ping(self, name: str, timeout: float) -> float:
        """Seconds for a small message to a node and back. Raises TimeoutError."""
        start, pinged = time.perf_counter(), threading.Event()
        node = self._nodes.get(name)
        if node is not None:
            node.pinged[start] = pinged
            self._calls.post(lambda: self._ping(name, start))
        try:
            if node is None or not pinged.wait(timeout):
                raise TimeoutError(f"{name.rpartition('/')[0]} did not answer within {timeout} s")
            return time.perf_counter() - start
        finally:
            if node is not None:
                node.pinged.pop(start, None)

    def _ping(self, name: str, start: float) -> None:
        record = self._dispatch.nodes.get(name)
        if record is not None and record.state in PRESENT:  # one that starts has no connection that could be gone
            self._send(Send(name, Kind.PING, {"t": start}))

    def add_node(self, name: str, host: str, workers: int, asked: int | None = None) -> None:
        """Expect a node; before its launcher starts it. `asked`: how many workers it must come with."""
        self._nodes[name] = _Node()
        self._dispatch.add_node(name, host, workers, asked)

    def add_local(self, name: str, make: Make) -> None:
        """Make a node that lives in this loop: no thread has to wake another for it, which would take longer than
        a small round does.
        """

        def host() -> None:
            try:
                self._local_nodes.add(name, make)
            except Exception as error:  # noqa: BLE001  no room for its files, say: the caller is told
                self._set_gone(name)
                self._act(self._dispatch.on_node_lost(name, f"{type(error).__name__}: {error}"))

        self._calls.post(host)

    def lose_node(self, name: str, why: str) -> None:
        """Its launcher says that a node has ended or will not come."""
        self._set_gone(name)
        self._calls.post(lambda: self._act(self._dispatch.on_node_lost(name, why)))

    def remove_node(self, name: str, why: str) -> None:
        """Nobody wants this node any more: what it owes goes to others, and it is told to leave. In the loop."""
        record = self._dispatch.nodes.get(name)
        if record is None or record.state in (NodeState.STARTING, NodeState.LOST):
            self._set_gone(name)  # it cannot say BYE
        if record is not None:
            self._leaving_nodes.add(name)
            self._act(self._dispatch.on_remove(name, why))
            self._nodes[name].changed.set()

    def add_successor(self, lost: str, name: str) -> None:
        """Expect another node of the host of a lost one, before its launcher starts it. In the loop."""
        self.forget(lost)
        self._nodes[name] = _Node()
        self._dispatch.add_successor(lost, name)

    def forget(self, name: str) -> None:
        """The node has gone, and nobody will ask for it again."""
        self._router.dismiss(name)
        self._leaving_nodes.discard(name)
        self._nodes.pop(name, None)

    def wait_for_node(self, name: str, timeout: float) -> tuple[NodeState, str]:
        """Block until the node is ready or lost, `timeout` seconds at most; gives its state, and why it is lost."""
        node = self._nodes.get(name)
        if node is not None:
            node.changed.wait(timeout)
        record = self._dispatch.nodes.get(name)
        return (NodeState.CLOSED, "it was removed") if record is None else (record.state, record.why)

    def _set_gone(self, name: str) -> None:
        node = self._nodes.get(name)
        if node is not None:
            node.gone.set()

    def ready_at(self, name: str) -> float:
        """When (time.monotonic()) the node was ready; 0 where it has been removed meanwhile."""
        node = self._nodes.get(name)
        return 0.0 if node is None else node.ready_at

    def wait_for_bye(self, name: str, timeout: float) -> bool:
        """Block until the node has left, `timeout` seconds at most."""
        node = self._nodes.get(name)
        return node is None or node.gone.wait(timeout)

    @property
    def dispatch(self) -> Dispatch:
        """To look at: only the loop changes it."""
        return self._dispatch

    @property
    def leaving(self) -> bool:
        """Whether all nodes have been told to leave."""
        return self._leaving

    def submit(self, pending: Pending) -> None:
        """Start a round."""
        pending.number = next(self._numbers)
        if not self._calls.post(lambda: self._submit(pending)):
            pending.end(None, CLOSED)
        if self._calls.failed:  # there is no loop to run the call, or it ended in this very moment
            pending.end(None, Failure("crashed", self._calls.failed))

    def run(self, pending: Pending) -> None:
        """Start a round and block until it is over, running the loop meanwhile if no other caller does. What a signal
        handler raises (Ctrl-C) comes through.
        """
        signals = DeferredSignals(self._calls.wake)
        begun = False
        while not pending.over:
            taken = False
            try:
                signals.begin()  # before the loop is taken: who is interrupted in between would have it for ever
                taken = _has_room() and self._owner.take()
                if not taken or self._stopped or self._error is not None:
                    break
                if not begun:
                    begun = True
                    pending.number = next(self._numbers)
                    self._calls.leave(lambda: self._submit(pending))
                self._drive(pending, signals)
            finally:
                if taken:
                    self._owner.leave(self._is_needed)
                signals.end()
        if not begun:
            self.submit(pending)
        pending.wait()

    def _drive(self, pending: Pending, signals: DeferredSignals) -> None:
        try:
            with np.errstate(all="ignore"):  # results are added up in this thread now
                self._calls.make()
                self._exchange()
                while not (pending.over or signals.came or self._stopped):
                    self._turn()
        except BaseException as error:  # noqa: BLE001  the loop's own thread tells of it
            self._crash(error)

    def _is_needed(self) -> bool:
        """Whether the loop must go on at once."""
        return bool(self._pending or self._calls.posted or self._error or self._stopped)

    def cancel(self, pending: Pending) -> None:
        """End a round that nobody waits for; nothing happens when it is over already."""
        self._calls.post(lambda: self._act(self._dispatch.on_cancel(pending.number, Failure("cancelled", "cancelled"))))

    def acknowledge(self, name: str, size: int) -> None:
        """This many bytes of what user code printed have been shown."""

        def acknowledge() -> None:
            node = self._nodes.get(name)
            if node is not None:
                node.unread -= size + PIECE
            self._send(Send(name, Kind.CREDIT, {"bytes": size}))

        self._calls.post(acknowledge)

    def say_goodbye(self) -> None:
        """Tell all nodes to leave and end all rounds."""

        def goodbye() -> None:
            self._leaving = True
            for number in list(self._pending):
                self._act(self._dispatch.on_cancel(number, CLOSED))
            for record in self._dispatch.nodes.values():
                if record.state in (NodeState.STARTING, NodeState.LOST):
                    self._set_gone(record.name)  # it cannot say BYE
            self._act(self._dispatch.on_close())

        self._calls.post(goodbye)

    def stop(self) -> None:
        """End the loop; gives back when its thread, sockets and files are gone."""

        def stop() -> None:
            self._stopped = True

        self._calls.post(stop)
        self._thread.join()
        self._calls.refuse()
        self._loader.stop()
        self._router.close()
        self._calls.close()

    # The loop

    def _run(self) -> None:
        self._selector.register(self._calls, selectors.EVENT_READ, (self._calls.take_wakes, None))
        self._selector.register(self._router.link, selectors.EVENT_READ, (self._router.link.stir, None))
        np.seterr(all="ignore")  # for this thread: results are added up in it
        try:
            self._owner.serve(self._turn, lambda: self._stopped or self._error is not None)
        except BaseException as error:  # noqa: BLE001  raised below
            self._crash(error)
        finally:
            for name in self._local_nodes:
                self._dismiss(name)
            self._selector.close()
        if self._error is not None:
            raise self._error

    def _turn(self) -> None:
        """Wait for something to happen, and do what follows."""
        deadline = self._next_deadline()
        timeout = None if deadline is None else min(max(0.0, deadline - time.monotonic()), MAX_WAIT)
        events = self._waiting.select(timeout, next(iter(self._pending), None))
        for key, _ in events:
            call, local = key.data
            try:
                call()
            except Exception as error:
                if local is None:
                    raise
                self._local_nodes.fail(local, error)
        self._calls.make()
        self._exchange()
        if deadline is not None and (now := time.monotonic()) >= deadline:
            self._on_time(now)
            self._exchange()

    def _on_time(self, now: float) -> None:
        """Do what is due."""
        self._local_nodes.on_timer(now)
        deadline = self._dispatch.next_deadline()
        if deadline is not None and deadline <= now:
            self._act(self._dispatch.on_timer(now))
        self._calls.make_due(now)

    def _next_deadline(self) -> float | None:
        at, others = self._local_nodes.next_deadline(), (self._dispatch.next_deadline(), self._calls.next_deadline())
        for other in others:
            if other is not None and (at is None or other < at):
                at = other
        return at

    def _crash(self, error: BaseException) -> None:
        """A defect of ours: nobody may wait for a loop that does not run."""
        self._error = error
        self._calls.failed = f"the engine has failed ({type(error).__name__}: {error}); this is a defect of qjam"
        for pending in self._pending.values():
            pending.end(None, Failure("crashed", self._calls.failed))
        for node in self._nodes.values():
            node.changed.set()
            node.gone.set()

    def _on_local_failed(self, name: str, why: str) -> None:
        self._act(self._dispatch.on_node_lost(name, why))
        self._dismiss(name)

    def _dismiss(self, name: str) -> None:
        if name in self._local_nodes:
            for message in self._local_nodes.dismiss(name):
                self._on_message(name, message)
            self._set_gone(name)

    def _exchange(self) -> None:
        """Hand messages over until there are none."""
        moved = True
        while moved:
            moved = self._local_nodes.exchange(self._on_message, self._dismiss)
            while (received := self._router.receive()) is not None:
                moved = True
                self._on_frames(*received)

    def _act(self, commands: list[Command]) -> None:
        """Carry commands out in the order in which they were decided: those that follow from carrying one out (a node
        is found to be gone) come after the rest of it.
        """
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

    def _on_zap(self) -> None:
        assert self._router.zap is not None
        self._router.zap.stir()
        self._router.answer_zap()

    def _on_frames(self, name: str, frames: list[memoryview]) -> None:
        if self._is_there(name):
            try:
                message = unpack(frames)
            except WireError as error:
                self._act(self._dispatch.on_node_lost(name, _not_understood(error)))
            else:
                self._on_message(name, message)

    def _on_message(self, name: str, message: Message) -> None:
        record = self._dispatch.nodes.get(name)
        if not self._is_there(name):
            return
        commands: list[Command] = []
        try:
            if record is None:  # it was removed
                if message.kind is Kind.BYE:
                    self._set_gone(name)
                return
            if message.kind not in self._receive:
                raise ValueError(f"{message.kind.name} is for nodes")
            if record.state is NodeState.STARTING and message.kind not in FIRST_WORDS:
                raise ValueError(f"{message.kind.name} came before HELLO")
            commands += self._dispatch.on_heard(name, time.monotonic())
            commands += self._receive[message.kind](name, message.header, message.buffers)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, it is the end of that node alone
            commands += self._dispatch.on_node_lost(name, _not_understood(error))
        self._act(commands)

    def _lost(self, command: Lost) -> None:
        name = command.node
        self.stats.resent_slices = self._dispatch.resent
        self._nodes[name].changed.set()
        if name in self._local_nodes:
            self.call_later(0.0, lambda: self._dismiss(name))
        if self._observer is not None and not self._leaving:
            self._observer.on_lost(name, command.why)
        self._act(self._dispatch.reassign())

    def _note(self, text: str, level: int = logging.WARNING) -> None:
        if self._observer is not None:
            self._observer.on_note(text, level)

    # Messages

    def _on_state(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        if header["state"] == "ready":
            commands = self._dispatch.on_ready(name, header["workers"])
            self._nodes[name].ready_at = time.monotonic()
            self._nodes[name].changed.set()
            if self._observer is not None:
                self._observer.on_ready(name)
            return commands
        if header["state"] == "replaced":
            self._dispatch.on_worker_replaced(name, header["worker"], header["pid"])
            took = time.monotonic() - self._nodes[name].died_at.pop(header["worker"], time.monotonic())
            host = self._dispatch.nodes[name].host
            self._note(f"worker {header['worker']} on {host} is replaced after {took:.2f} s", logging.INFO)
            return []
        if header["state"] == "shared":
            return self._dispatch.on_shared(name, header)
        if header["state"] == "note":
            self._note(f"{self._dispatch.nodes[name].host}: {header['text'][:MAX_REASON]}")
            return []
        if header["state"] == "lost":
            commands = self._dispatch.on_worker_lost(name, header)
            self.stats.resent_slices = self._dispatch.resent
            self._nodes[name].died_at[header["worker"]] = time.monotonic()
            at_work = header.get("round") in self._dispatch.rounds
            text = f"worker {header['worker']} on {self._dispatch.nodes[name].host} {header['how']}"
            what = f"{text}; its slices are given out again" if at_work else text
            self._note(what, logging.WARNING if at_work else logging.INFO)
            return commands
        missing = [(ref, offset) for ref, offset in header["missing"]]
        return self._dispatch.on_missing(name, header["round"], missing)

    def _on_result(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        commands = self._dispatch.on_result(name, header, buffers)
        self.stats.results_received += sum(memoryview(buffer).nbytes for buffer in buffers)
        return commands

    def _on_log(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        data, node, record = bytes(buffers[0]), self._nodes[name], self._dispatch.nodes[name]
        if header["worker"] >= record.workers:
            raise ValueError(f"it has no worker {header['worker']}")
        if node.unread + len(data) + PIECE > MAX_UNREAD:
            raise ValueError("it sends more text than it may before that is read")
        node.unread += len(data) + PIECE
        self.stats.output_received += len(data)
        self._on_print(name, record.host, header["worker"], header["stream"], data)
        return []

    def _on_pong(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        pinged = self._nodes[name].pinged.get(header["t"])
        if pinged is not None:
            pinged.set()
        return []

    def _on_bye(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        self._set_gone(name)
        return self._dispatch.on_node_lost(name, header["reason"][:MAX_REASON] or "it has left")

    # Commands

    def _submit(self, pending: Pending) -> None:
        if self._leaving:
            pending.end(None, CLOSED)
            return
        self._pending[pending.number] = pending
        self._act(self._dispatch.on_submit(pending.number, pending.spec, pending.deadline, time.monotonic()))

    def _send(self, command: Send) -> None:
        if not self._is_there(command.node):
            return
        lane = self._local_nodes.lanes.get(command.node)
        header, buffers = command.header, command.buffers
        if command.kind is Kind.TASK and header["params"] == "send":
            params = self._pending[header["round"]].params
            if lane is None and flat.size(params) > PARAMS_INLINE:
                header = {**header, "params": "ref"}
            else:
                header, buffers = {**header, "params": "inline"}, (params.header, *params.buffers)
                self.stats.params_sent += sum(memoryview(buffer).nbytes for buffer in buffers)
        if lane is not None:
            lane.down.append(Message(command.kind, header, list(buffers)))
        elif not self._router.send(command.node, pack(command.kind, header, buffers)):
            self._set_gone(command.node)  # it cannot say BYE
            self._act(self._dispatch.on_node_lost(command.node, "its connection is gone"))

    def _is_there(self, name: str) -> bool:
        record = self._dispatch.nodes.get(name)
        return name in self._leaving_nodes if record is None else record.state is not NodeState.LOST

    def _load(self, command: Load) -> None:
        node, ref = command.node, command.ref

        def failed(error: BaseException) -> None:
            failure = Failure("load", f"a slice of the data set could not be made: {error!r}", error=error)
            self._calls.post(lambda: self._act(self._load_failed(node, ref, failure)))

        def done(blob: Blob) -> None:
            self._calls.post(lambda: self._loaded(command, blob))

        self._loader.load(ref, self._pending.get(command.round), done, failed)

    def _loaded(self, command: Load, blob: Blob) -> None:
        if command.node not in self._dispatch.nodes:
            return
        self._nodes[command.node].blobs[command.ref] = blob
        self._act(self._dispatch.on_loaded(command.node, command.ref, blob.size))

    def _load_failed(self, node: str, ref: str, failure: Failure) -> list[Command]:
        return self._dispatch.on_load_failed(node, ref, failure) if node in self._dispatch.nodes else []

    def _send_block(self, command: Block) -> None:
        if not self._is_there(command.node):
            return
        blob = self._nodes[command.node].blobs[command.ref]
        header = {"ref": command.ref, "offset": command.offset, "total": blob.size}
        self._send(Send(command.node, Kind.REFS, header, tuple(blob.range(command.offset, command.size))))
        counter = {"module": "code_sent", "code": "code_sent", "params": "params_sent"}.get(
            command.ref.partition(":")[0], "dataset_sent"
        )
        setattr(self.stats, counter, getattr(self.stats, counter) + command.size)

    def _unload(self, command: Unload) -> None:
        node = self._nodes.get(command.node)
        if node is not None:
            node.blobs.pop(command.ref, None)

    def _done(self, command: Done) -> None:
        self.stats.rounds += 1
        self._pending.pop(command.round).end(command.roots, None)

    def _failed(self, command: Fail) -> None:
        self.stats.failed_rounds += 1
        self._pending.pop(command.round).end(None, command.failure)


def _not_understood(error: Exception) -> str:
    return f"it sent what this version of qjam does not understand: {type(error).__name__}: {error}"[:MAX_REASON]


def _has_room() -> bool:
    """Whether this thread is far enough from python's limit of calls within calls to run the loop."""
    try:
        sys._getframe(max(0, sys.getrecursionlimit() - CALLS))  # noqa: SLF001  counts them in C
    except ValueError:  # there are fewer
        return True
    return False
