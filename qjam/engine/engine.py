"""The engine: owns the ROUTER and all state of a master, and gives other threads their way to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from qjam.data.leases import Lease
from qjam.dispatch.call import Argument, Call, Function
from qjam.dispatch.commands import Ended, Failure, Send
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.states import PRESENT, NodeState
from qjam.stats import Stats
from qjam_worker.wire.frames import Kind

from .carrying_out import CALLS_CLOSED, CLOSED, Carrier, NodeObserver
from .exchange import Exchange
from .inbox import Inbox, OnPrint
from .loader import Loader
from .local_nodes import LocalNodes, Make
from .loop import Loop, Waiting
from .peers import Peer, Peers
from .pending import Pending
from .router import Keys, Router

T = TypeVar("T")


class Engine:
    """Messages and calls in, dispatch decides, messages and results out: all in one loop.

    Any thread may call the methods, where they do not say that they are for the loop.
    """

    def __init__(self, find_module: Callable[[str], bytes], *, speculation: bool = True) -> None:
        self.stats = Stats()
        self._dispatch = Dispatch(speculation=speculation)
        self._peers = Peers()
        self._router = Router()
        self._loader = Loader(find_module)
        self._loop = Loop()
        self._calls = self._loop.calls
        self._local_nodes = LocalNodes(self._loop.selector, self._on_local_failed, self._peers.set_gone)
        self._carrier = Carrier(
            self._dispatch, self._peers, self._router, self._local_nodes, self._loader, self._calls, self.stats
        )
        self._inbox = Inbox(self._dispatch, self._peers, self._carrier, self.stats)
        self._loop.work = Exchange(self._dispatch, self._router, self._local_nodes, self._carrier, self._inbox)

    def start(self, on_print: OnPrint, observer: NodeObserver | None = None) -> None:
        """Start the loop; in it `on_print` is called with what user code prints, `observer` with the fate of nodes."""
        self._inbox.on_print = on_print
        if observer is not None:
            self._carrier.observer = observer
        self._loop.register(self._router.link, self._router.link.stir)
        self._loop.register(self._router.zap, self._router.answer_zap)
        self._loop.start()
        self._loader.start()

    def stop(self) -> None:
        """End the loop; returns when its thread, sockets and files are gone."""
        self._loop.stop()
        self._loader.stop()
        self._router.close()
        self._loop.close()

    # Calls

    def ask(self, call: Callable[[], T]) -> T:
        """What a call in the loop returns or raises. OSError when the loop has ended."""
        return self._calls.ask(call)

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        """Have the loop make a call after `delay` seconds. In the loop."""
        self._calls.later(delay, call)

    def tidy_later(self, delay: float, call: Callable[[], None]) -> None:
        """Have the loop make a call after `delay` seconds. From any thread."""
        self._calls.post(lambda: self._calls.later(delay, call))

    # Nodes

    def admit(self, name: str) -> Keys:
        """The keys with which a node may connect as `name`."""
        return self._router.admit(name)

    def bind(self, address: str) -> str:
        """The endpoint of the ROUTER on an address of this machine, as in `Router.bind`. Raises OSError."""
        return self.ask(lambda: self._router.bind(address))

    def add_node(self, name: str, host: str, workers: int, asked: int | None = None) -> None:
        """Expect a node; before its launcher starts it. `asked`: how many workers it must come with."""
        self._peers[name] = Peer()
        self._dispatch.add_node(name, host, workers, asked)

    def add_local(self, name: str, make: Make) -> None:
        """Make a node that lives in this loop. No thread has to wake another one for it, which would take longer than
        a small round does.
        """

        def add() -> None:
            try:
                self._local_nodes.add(name, make)
            except Exception as error:  # noqa: BLE001  no room for its files, say: the caller is told
                self._peers.set_gone(name)
                self._carrier.lose(name, f"{type(error).__name__}: {error}")

        self._calls.post(add)

    def _on_local_failed(self, name: str, why: str) -> None:
        self._carrier.lose(name, why)

    def lose_node(self, name: str, why: str) -> None:
        """Its launcher says that a node has ended or will not come."""
        self._peers.set_gone(name)
        self._calls.post(lambda: self._carrier.lose(name, why))

    def add_successor(self, lost: str, name: str) -> None:
        """Expect another node of the host of a lost one, before its launcher starts it. In the loop."""
        self.forget(lost)
        self._peers[name] = Peer()
        self._dispatch.add_successor(lost, name)

    def remove_node(self, name: str, why: str) -> None:
        """Nobody wants this node any more: what it owes goes to others, and it is told to leave. In the loop."""
        record = self._dispatch.nodes.get(name)
        if record is None or record.state in (NodeState.STARTING, NodeState.LOST):
            self._peers.set_gone(name)  # it cannot say BYE
        if record is not None:
            self._carrier.leaving_nodes.add(name)
            self._carrier.act(self._dispatch.on_remove(name, why))
            self._peers[name].changed.set()

    def forget(self, name: str) -> None:
        """The node has gone, and nobody will ask for it again."""
        self._router.dismiss(name)
        self._carrier.leaving_nodes.discard(name)
        self._peers.pop(name, None)

    def wait_for_node(self, name: str, timeout: float) -> tuple[NodeState, str]:
        """Block until the node is ready or lost, `timeout` seconds at most; its state, and why it is lost."""
        peer = self._peers.get(name)
        if peer is not None:
            peer.changed.wait(timeout)
        record = self._dispatch.nodes.get(name)
        return (NodeState.CLOSED, "it was removed") if record is None else (record.state, record.why)

    def ready_at(self, name: str) -> float:
        """When (time.monotonic()) the node was ready; 0 where it has been removed meanwhile."""
        peer = self._peers.get(name)
        return 0.0 if peer is None else peer.ready_at

    def wait_for_bye(self, name: str, timeout: float) -> bool:
        """Block until the node has left, `timeout` seconds at most; whether it has."""
        peer = self._peers.get(name)
        return peer is None or peer.gone.wait(timeout)

    def ping(self, name: str, timeout: float) -> float:
        """Seconds for a small message to a node and back. Raises TimeoutError."""
        start, pong = time.perf_counter(), threading.Event()
        peer = self._peers.get(name)
        if peer is not None:
            peer.pings[start] = pong
            self._calls.post(lambda: self._ping(name, start))
        try:
            if peer is None or not pong.wait(timeout):
                raise TimeoutError(f"{name.rpartition('/')[0]} did not answer within {timeout} s")
            return time.perf_counter() - start
        finally:
            if peer is not None:
                peer.pings.pop(start, None)

    def _ping(self, name: str, start: float) -> None:
        record = self._dispatch.nodes.get(name)
        if record is not None and record.state in PRESENT:  # one that starts has no connection that could be gone
            self._carrier.act([Send(name, Kind.PING, {"t": start})])

    def acknowledge(self, name: str, size: int) -> None:
        """This many bytes of what user code printed have been shown."""

        def acknowledge() -> None:
            self._inbox.acknowledge(name, size)
            self._carrier.act([Send(name, Kind.CREDIT, {"bytes": size})])

        self._calls.post(acknowledge)

    @property
    def dispatch(self) -> Dispatch:
        """To look at: only the loop changes it."""
        return self._dispatch

    @property
    def leaving(self) -> bool:
        """Whether all nodes have been told to leave."""
        return self._carrier.leaving

    # Calls of functions

    def on_ended(self, receive: Callable[[Ended], None]) -> None:
        """Have `receive` called, in the loop, with calls that have ended or begun."""
        self._carrier.on_ended = receive

    def submit_calls(self, take: Callable[[], list[Call]], *, awaited: bool = False) -> None:
        """Have the loop take new calls. `awaited`: this thread is going to run the loop at once."""

        def submit() -> None:
            calls = take()
            if self._carrier.leaving:
                self._carrier.end_calls(calls, CALLS_CLOSED)
            elif calls:
                self._loader.arguments.update((part.key, part.data) for call in calls for part in call.large)
                self._carrier.act(self._dispatch.on_calls(calls, time.monotonic()))

        post = self._calls.post_for_next if awaited else self._calls.post
        if not post(submit):
            self._carrier.end_calls(take(), CALLS_CLOSED)
        if self._calls.failed:  # there is no loop to run the call, or it ended in this very moment
            self._carrier.end_calls(take(), Failure("crashed", self._calls.failed))

    def cancel_calls(self, calls: list[Call]) -> None:
        """Nobody wants these any more."""
        self._calls.post(lambda: self._carrier.act(self._dispatch.calls.cancel(calls)))

    def forget_functions(self, functions: list[Function]) -> None:
        """No more calls of these will come."""

        def forget() -> None:
            for function in functions:
                self._carrier.act(self._dispatch.calls.forget(function))

        self._calls.post(forget)

    def forget_arguments(self, arguments: list[Argument]) -> None:
        """These need not be kept for further calls. In the loop."""
        for argument in arguments:
            self._loader.arguments.pop(argument.key, None)
        self._carrier.act(self._dispatch.calls.forget_arguments(arguments))

    def drive(self, waiting: Waiting, begin: Callable[[], None]) -> None:
        """Run the loop in this thread, if no other one does, until what waits is over; `begin` is called in it."""
        self._loop.run(waiting, begin)

    # Rounds

    def submit(self, pending: Pending) -> None:
        """Start a round."""
        if not self._calls.post(lambda: self._carrier.submit(pending)):
            pending.end(None, CLOSED)
        if self._calls.failed:  # there is no loop to run the call, or it ended in this very moment
            pending.end(None, Failure("crashed", self._calls.failed))

    def run(self, pending: Pending) -> None:
        """Start a round and block until it is over, running the loop meanwhile if no other caller does. What a signal
        handler raises (Ctrl-C) comes through.
        """
        if not self._loop.run(pending, lambda: self._carrier.submit(pending)):
            self.submit(pending)
        pending.wait()

    def cancel(self, pending: Pending) -> None:
        """End a round that nobody waits for; nothing happens when it is over already."""
        failure = Failure("cancelled", "cancelled")
        self._calls.post(lambda: self._carrier.act(self._dispatch.on_cancel(pending.number, failure)))

    def let_go(self, lease: Lease, at_once: bool) -> None:
        """The program holds this data no longer. Also for the garbage collector."""
        self._calls.slip(lambda: self._carrier.act(self._dispatch.on_let_go(lease, at_once, time.monotonic())))

    def say_goodbye(self) -> None:
        """Tell all nodes to leave and end all rounds."""

        def goodbye() -> None:
            self._carrier.leaving = True
            for number in reversed(list(self._carrier.pending)):  # those that have not begun first
                self._carrier.act(self._dispatch.on_cancel(number, CLOSED))
            for record in self._dispatch.nodes.values():
                if record.state in (NodeState.STARTING, NodeState.LOST):
                    self._peers.set_gone(record.name)  # it cannot say BYE
            self._carrier.act(self._dispatch.calls.fail_all(CALLS_CLOSED))
            self._carrier.act(self._dispatch.on_close())

        self._calls.post(goodbye)
