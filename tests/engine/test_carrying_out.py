"""Where dispatch's commands meet the world: the engine that carries them out, the node that they reach."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from qjam.data.leases import Lease
from qjam.dispatch.commands import Block, Load, Note, Send
from qjam.dispatch.jobs import JobSpec
from qjam.dispatch.rounds import RoundSpec
from qjam.dispatch.states import NodeState
from qjam.engine.carrying_out import PARAMS_INLINE
from qjam.engine.engine import Engine
from qjam.engine.loader import Blob
from qjam.engine.pending import Pending
from qjam_worker.node.commands import Ended, Give
from qjam_worker.node.node import Node
from qjam_worker.node.options import NodeOptions
from qjam_worker.node.rounds import Work
from qjam_worker.values import codec
from qjam_worker.wire.frames import Kind, Message, pack, unpack
from qjam_worker.wire.refs import Part
from qjam_worker.wire.sockets import Lane
from refs_as_text import ref


class Network:
    """In place of the ROUTER's link: remembers what was sent; nodes in `gone` cannot be reached."""

    def __init__(self, link: Any) -> None:
        self.link = link
        self.gone: set[str] = set()
        self.sent: list[tuple[str, Message]] = []

    def send(self, name: str, frames: list[Any]) -> bool:
        if name not in self.gone:
            self.sent.append((name, unpack([memoryview(frame) for frame in frames])))
        return name not in self.gone

    def to(self, name: str, kind: Kind) -> list[Message]:
        return [message for receiver, message in self.sent if receiver == name and message.kind is kind]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine whose loop does not run yet, with nodes "a" and "b" ready."""
    engine = Engine(lambda name: b"")
    for name in "ab":
        engine.add_node(name, f"host-{name}", 1)
        engine.dispatch.on_hello(name, {"workers": 1, "credit": 16 * 1024 * 1024})
        engine.dispatch.on_ready(name, [1])
    yield engine
    if engine._loop._thread.ident is None:
        start(engine)
    engine.stop()


def start(engine: Engine) -> None:
    engine.start(lambda *printed: None)


@pytest.fixture
def network(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network(engine._router)
    monkeypatch.setattr(engine._router, "send", network.send)
    return network


def pending(nslices: int = 2, params: Any = "params") -> Pending:
    entry = {"reduce": False, "code": None, "epoch": 1}
    lease = Lease(tuple(f"ref{index}" for index in range(nslices)), 0)
    round_ = Pending(RoundSpec(JobSpec("job", entry), nslices, lease), None, codec.encode(params), None, None)
    round_.number = 1
    return round_


def test_a_node_that_is_gone_in_the_middle_of_its_chunks_is_lost_and_nothing_else_happens(
    engine: Engine, network: Network
) -> None:
    engine._carrier.submit(pending())
    blob = Blob([bytes(20 * 1024 * 1024)])
    load, *_ = engine.dispatch.refs.on_get("a", 1, [Part(ref("ref0"))])
    assert isinstance(load, Load)
    network.gone.add("a")
    # Several blocks, the first of which cannot be sent; some credit is lacking for the rest.
    engine._carrier.loaded(load.node, load.ref, blob)
    assert engine.dispatch.nodes["a"].state is NodeState.LOST
    assert not network.to("a", Kind.REFS)


def test_what_follows_from_a_node_that_is_gone_comes_after_what_was_to_be_done(
    engine: Engine, network: Network
) -> None:
    network.gone.add("a")
    engine._carrier.submit(pending())  # JOB and TASK for a, then for b; a's slice is b's when a is found to be gone
    tasks = network.to("b", Kind.TASK)
    assert [task.header["indices"] for task in tasks] == [[1], [0]]
    assert [bool(task.buffers) for task in tasks] == [True, False]  # the first one brings the params


def test_a_chunk_is_the_bytes_of_its_place(engine: Engine, network: Network) -> None:
    engine._peers["a"].blobs[ref("ref0")] = Blob([b"abc", b"", b"defgh"])
    engine._carrier.act([Block("a", ref("ref0"), 2, 4, 1)])
    (refs,) = network.to("a", Kind.REFS)
    assert b"".join(refs.buffers) == b"cdef"
    assert (refs.header["offset"], refs.header["total"]) == (2, 8)


@pytest.mark.parametrize(("size", "params"), [(100, "inline"), (PARAMS_INLINE + 1, "ref")])
def test_small_params_ride_in_the_task_and_large_ones_are_a_ref(
    engine: Engine, network: Network, size: int, params: str
) -> None:
    engine._carrier.submit(pending(params=bytes(size)))
    for task in (*network.to("a", Kind.TASK), *network.to("b", Kind.TASK)):
        assert (task.header["params"], bool(task.buffers)) == (params, params == "inline")


# ---- nodes that are lost, removed, replaced ---------------------------------------------------------------------


class NodeObserver:
    """Who looks after the nodes: remembers what it is told, and knows the successors of some."""

    def __init__(self, engine: Engine, **successors: str) -> None:
        self.engine = engine
        self.successors = successors
        self.told: list[tuple[str, ...]] = []

    def on_ready(self, name: str) -> None:
        self.told.append(("ready", name))

    def on_lost(self, name: str, why: str) -> None:
        self.told.append(("lost", name, why))
        if name in self.successors:
            self.engine.add_successor(name, self.successors[name])

    def on_note(self, text: str, level: int = logging.WARNING) -> None:
        self.told.append((logging.getLevelName(level), text))


def looked_after(engine: Engine, **successors: str) -> NodeObserver:
    engine._carrier.observer = hosts = NodeObserver(engine, **successors)
    return hosts


def say(engine: Engine, name: str, kind: Kind, header: dict[str, Any], *buffers: bytes) -> None:
    """A node says something."""
    engine._inbox.on_frames(name, [memoryview(frame) for frame in pack(kind, header, buffers)])


def test_a_node_that_dispatch_gives_up_is_lost_as_any_other(engine: Engine, network: Network) -> None:
    hosts = looked_after(engine)
    engine._carrier.submit(pending())
    engine._carrier.act(engine.dispatch.on_node_lost("a", "nothing was heard of it for 600 s"))
    assert hosts.told == [("lost", "a", "nothing was heard of it for 600 s")]
    assert engine.dispatch.nodes["a"].state is NodeState.LOST
    assert engine.stats.resent_slices == 1


def test_what_dispatch_notes_is_told(engine: Engine) -> None:
    hosts = looked_after(engine)
    engine._carrier.act([Note("host-a is silent")])
    assert hosts.told == [("WARNING", "host-a is silent")]


def test_notes_without_anybody_to_tell_are_dropped(engine: Engine) -> None:
    engine._carrier.act([Note("host-a is silent")])


def test_the_place_of_a_lost_node_is_its_successors(engine: Engine, network: Network) -> None:
    hosts = looked_after(engine, a="a2")
    engine._carrier.submit(pending())
    engine._carrier.act(engine.dispatch.on_node_lost("a", "killed"))
    assert list(engine.dispatch.nodes) == ["b", "a2"]
    assert [task.header["indices"] for task in network.to("b", Kind.TASK)] == [[1], [0]]
    say(engine, "a", Kind.STATE, {"state": "ready", "workers": [1]})  # nobody knows it any more
    say(engine, "a2", Kind.HELLO, HELLO)
    say(engine, "a2", Kind.STATE, {"state": "ready", "workers": [7]})
    assert hosts.told == [("lost", "a", "killed"), ("ready", "a2")]
    assert engine.wait_for_node("a2", 0.0)[0] is NodeState.READY


HELLO = {"workers": 1, "credit": 1}


def test_a_node_that_is_lost_twice_is_told_once(engine: Engine, network: Network) -> None:
    hosts = looked_after(engine)
    for _ in range(2):
        engine._carrier.act(engine.dispatch.on_node_lost("a", "killed"))
    assert len(hosts.told) == 1


def test_when_all_leave_nobody_is_replaced(engine: Engine, network: Network) -> None:
    hosts = looked_after(engine, a="a2")
    engine._carrier.leaving = True
    engine._carrier.act(engine.dispatch.on_node_lost("a", "killed"))
    assert hosts.told == []
    assert list(engine.dispatch.nodes) == ["a", "b"]


def test_a_removed_node_is_told_to_leave_and_heard_no_more_but_for_its_bye(engine: Engine, network: Network) -> None:
    hosts = looked_after(engine)
    engine._carrier.submit(pending())
    engine.remove_node("a", "nobody wants it")
    (bye,) = network.to("a", Kind.BYE)
    assert bye.header == {"reason": "nobody wants it"}
    assert [task.header["indices"] for task in network.to("b", Kind.TASK)] == [[1], [0]]
    say(engine, "a", Kind.RESULT, {"round": 1, "roots": [[0, 1, 1]], "seconds": 0.0}, b"late")
    assert engine.dispatch.rounds[1].tree.covered == 0
    assert not engine.wait_for_bye("a", 0.0)
    say(engine, "a", Kind.BYE, {"reason": "as it was told"})
    assert engine.wait_for_bye("a", 0.0)
    engine.forget("a")
    say(engine, "a", Kind.BYE, {"reason": "again"})
    assert hosts.told == []


def test_a_removed_node_that_sends_nonsense_is_nobodys_loss(engine: Engine, network: Network) -> None:
    hosts = looked_after(engine)
    engine.remove_node("a", "nobody wants it")
    engine._inbox.on_frames("a", [memoryview(b"nonsense"), memoryview(b"more")])
    assert hosts.told == []


def test_nobody_waits_for_the_bye_of_a_node_that_never_was_there(engine: Engine, network: Network) -> None:
    engine.add_node("c", "host-c", 1)
    engine.remove_node("c", "nobody wants it")
    assert engine.wait_for_bye("c", 0.0)


def test_what_is_loaded_for_a_node_that_was_removed_meanwhile_is_dropped(engine: Engine, network: Network) -> None:
    engine._carrier.submit(pending())
    load, *_ = engine.dispatch.refs.on_get("a", 1, [Part(ref("ref0"))])
    assert isinstance(load, Load)
    engine.remove_node("a", "nobody wants it")
    engine._carrier.loaded(load.node, load.ref, Blob([b"slice"]))
    assert not network.to("a", Kind.REFS)


def test_a_ping_does_not_end_the_start_of_a_node(engine: Engine) -> None:
    hosts = looked_after(engine, c="c2")
    engine.add_node("c", "host-c", 1)
    start(engine)  # nobody is connected, so nothing can be sent to anybody
    engine._carrier.observer = hosts
    with pytest.raises(TimeoutError):
        engine.ping("c", 0.2)
    assert hosts.told == []
    assert engine.dispatch.nodes["c"].state is NodeState.STARTING


def test_workers_that_end_and_are_replaced_are_told(engine: Engine, network: Network) -> None:
    hosts = looked_after(engine)
    engine._carrier.submit(pending())
    lost = {"state": "lost", "worker": 0, "how": "was killed", "pid": 7}
    say(engine, "a", Kind.STATE, {**lost, "round": 1, "slice": 0, "slices": [0]})
    say(engine, "a", Kind.STATE, {"state": "replaced", "worker": 0, "pid": 8})
    say(engine, "a", Kind.STATE, lost)  # while it was idle
    levels = [level for level, *_ in hosts.told]
    assert levels == ["WARNING", "INFO", "INFO"]
    texts = [text for _, text in hosts.told]
    assert texts[0] == "worker 0 on host-a was killed; its slices are given out again"
    assert texts[1].startswith("worker 0 on host-a is replaced after 0.")
    assert texts[2] == "worker 0 on host-a was killed"
    assert engine.dispatch.nodes["a"].pids == [8]


# ---- the loop ---------------------------------------------------------------------------------------------------


def test_calls_are_made_when_they_are_due_and_in_that_order(engine: Engine) -> None:
    made: list[str] = []
    for delay, text in ((20.0, "last"), (10.0, "first"), (10.0, "second")):
        engine.call_later(delay, lambda text=text: made.append(text))
    first, *_ = sorted(at for at, *_ in engine._calls.timers)
    engine._loop._on_time(first - 1.0)
    assert made == []
    engine._loop._on_time(first + 1.0)
    assert made == ["first", "second"]
    engine._loop._on_time(first + 20.0)
    assert made == ["first", "second", "last"]


def test_a_call_may_ask_for_another_one(engine: Engine) -> None:
    called = threading.Event()
    start(engine)
    engine.ask(lambda: engine.call_later(0.0, lambda: engine.call_later(0.0, called.set)))
    assert called.wait(5.0)


def test_who_asks_gets_what_the_call_gives_or_raises(engine: Engine) -> None:
    start(engine)
    assert engine.ask(lambda: threading.current_thread().name) == "qjam-engine"
    with pytest.raises(KeyError):
        engine.ask(lambda: {}["nothing"])


def test_who_asks_a_loop_that_has_ended_is_told() -> None:
    engine = Engine(lambda name: b"")
    start(engine)
    engine.stop()
    with pytest.raises(OSError, match="closed"):
        engine.ask(lambda: None)


def test_a_message_for_a_node_that_is_not_there_is_not_sent(engine: Engine, network: Network) -> None:
    engine._carrier.act(engine.dispatch.on_node_lost("a", "killed"))
    for name in ("a", "nobody"):
        engine._carrier.act([Send(name, Kind.PING, {"t": 1.0})])
    assert network.sent == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the assertion says more
def test_a_stranger_whose_name_is_no_text_does_not_disturb(engine: Engine) -> None:
    start(engine)
    endpoint, keys = engine.bind("127.0.0.1"), engine.admit("a")
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.ROUTING_ID, b"\xff\xfe")
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.curve_serverkey, stranger.curve_publickey = keys.server.encode(), keys.public.encode()
        stranger.curve_secretkey = keys.secret.encode()
        stranger.connect(endpoint)
        stranger.send(b"anything")
        engine._loop._thread.join(0.2)  # it must go on: time for it to be wrong
    assert not engine._calls.failed


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node without workers' processes, whose messages go nowhere."""
    node = Node(Lane(), NodeOptions(1), bases=[str(tmp_path)])
    yield node
    node.close()


def test_a_node_that_gave_a_round_up_survives_more_slices_of_it(node: Node) -> None:
    # The master gives it the slices of a lost node before it hears of the error.
    encoded = codec.encode("params")
    entry = {"module": "m", "function": None, "shipped": False, "reduce": False, "code": None, "epoch": 1}
    task = {"job": 1, "data": None, "nslices": 2, "round": 1, "params": "inline"}
    node.on_job({"job": 1, "entry": entry, "forget": []}, [])
    node.on_task({**task, "indices": [0]}, [encoded.header, *encoded.buffers])
    node.act(node.scheduler.on_no_room(1, "no room", 0.0))
    node.on_task({**task, "indices": [1], "params": "have"}, [])  # for all the master knows it has them
    assert not node.scheduler.rounds


def sent(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Kind, dict[str, Any]]]:
    """What the node tells the master from now on."""
    told: list[tuple[Kind, dict[str, Any]]] = []
    monkeypatch.setattr(node.uplink, "send", lambda kind, header, buffers: told.append((kind, header)))
    return told


def begin_round(node: Node, *indices: int) -> None:
    entry = {"module": "m", "function": None, "shipped": False, "reduce": False, "code": None, "epoch": 1}
    slices = [[index, f"ref{index}"] for index in indices]
    encoded = codec.encode("params")
    node.on_job({"job": 1, "entry": entry, "forget": []}, [])
    node.on_data({"data": 1, "slices": slices, "nslices": len(indices), "forget": []}, [])
    task = {"job": 1, "data": 1, "round": 1, "indices": list(indices), "params": "inline"}
    node.on_task(task, [encoded.header, *encoded.buffers])


def test_a_node_answers_who_asks_for_a_share(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_round(node, 0, 1, 2)
    told = sent(node, monkeypatch)
    node.handlers[Kind.SHARE]({"round": 1, "count": 2, "seconds": 0.0, "for": "idle"}, [])
    assert told == [(Kind.STATE, {"state": "shared", "round": 1, "for": "idle", "indices": [0, 1]})]


def test_a_node_does_not_do_what_the_master_has_from_elsewhere(node: Node) -> None:
    begin_round(node, 0, 1, 2)
    node.handlers[Kind.CANCEL]({"round": 1, "indices": [0, 2]}, [])
    assert node.scheduler.rounds[1].owed == {1}
    node.handlers[Kind.CANCEL]({"round": 1}, [])
    assert node.scheduler.rounds == {}


def test_a_node_gives_away_what_it_shares_where_nothing_may_be_tried_twice(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.handlers[Kind.WELCOME]({"node": "node", "host": "host", "speculation": False}, [])
    begin_round(node, 0, 1, 2)
    told = sent(node, monkeypatch)
    node.handlers[Kind.SHARE]({"round": 1, "count": 2, "seconds": 0.0, "for": "idle"}, [])
    assert told[0][1]["indices"] == [0, 1]
    assert node.scheduler.rounds[1].owed == {2}


def test_what_follows_from_a_decision_comes_after_the_rest_of_it(node: Node) -> None:
    begin_round(node, 0)
    done: list[int] = []
    ended = Ended(7)

    def perform(command: Ended) -> None:
        if command is ended:
            node.act([Ended(9)])
        done.append(command.round)

    node.perform[Ended] = perform
    node.act([ended, Ended(8)])
    assert done == [7, 8, 9]


def test_work_of_a_round_that_has_been_given_up_since_is_not_begun(node: Node) -> None:
    begin_round(node, 0)
    round_ = node.scheduler.rounds[1]
    seat = node.scheduler.seats[0]
    seat.ready = seat.busy = True
    seat.round = 1
    work = round_.works[0] = Work(0.0, [0])
    node.act([*node.scheduler.on_no_room(1, "no room", 0.0), Give(0, round_, work)])
    assert not seat.busy
