"""Where dispatch's commands meet the world: the engine that carries them out, the node that they reach."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from qjam.commands import Chunk, Load
from qjam.dispatch import JobSpec
from qjam.engine import Engine
from qjam.loading import Blob
from qjam.pending import Pending
from qjam.states import NodeState
from qjam_worker import codec, wire
from qjam_worker.node import Node
from qjam_worker.wire import Kind


class Network:
    """In place of the ROUTER's link: remembers what was sent; nodes in `gone` cannot be reached."""

    def __init__(self, link: Any) -> None:
        self.link = link
        self.gone: set[str] = set()
        self.sent: list[tuple[str, wire.Message]] = []

    def send(self, name: str, frames: list[Any]) -> bool:
        if name not in self.gone:
            self.sent.append((name, wire.unpack([memoryview(frame) for frame in frames])))
        return name not in self.gone

    def to(self, name: str, kind: Kind) -> list[wire.Message]:
        return [message for receiver, message in self.sent if receiver == name and message.kind is kind]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine whose loop does not run yet, with nodes "a" and "b" ready."""
    engine = Engine(f"inproc://{uuid.uuid4().hex}", lambda name: b"")
    for name in "ab":
        engine.add_node(name, f"host-{name}", 1)
        engine.dispatch.on_hello(name, {"credit": 16 * 1024 * 1024})
        engine.dispatch.on_ready(name, [1])
    yield engine
    if engine._thread.ident is None:
        start(engine)
    engine.stop()


def start(engine: Engine) -> None:
    engine.start(lambda *printed: None)


@pytest.fixture
def network(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network(engine._router)
    monkeypatch.setattr(engine._router, "send", network.send)
    return network


def pending(nslices: int = 2) -> Pending:
    entry = {"reduce": False, "code": None, "epoch": 1}
    refs = [f"ref{index}" for index in range(nslices)]
    round_ = Pending(JobSpec("job", entry, refs, nslices), None, codec.encode("params"), None, None)
    round_.number = 1
    return round_


def test_a_node_that_is_gone_in_the_middle_of_its_chunks_is_lost_and_nothing_else_happens(
    engine: Engine, network: Network
) -> None:
    engine._submit(pending())
    blob = Blob([bytes(20 * 1024 * 1024)])
    load, *_ = engine.dispatch.on_missing("a", 1, [("ref0", 0)])
    assert isinstance(load, Load)
    network.gone.add("a")
    engine._loaded(load, blob)  # several chunks, the first of which cannot be sent; some credit is lacking for the rest
    assert engine.dispatch.nodes["a"].state is NodeState.LOST
    assert not network.to("a", Kind.REFS)


def test_what_follows_from_a_node_that_is_gone_comes_after_what_was_to_be_done(
    engine: Engine, network: Network
) -> None:
    network.gone.add("a")
    engine._submit(pending())  # JOB and TASK for a, then for b; a's slice is b's as soon as a is found to be gone
    tasks = network.to("b", Kind.TASK)
    assert [task.header["indices"] for task in tasks] == [[1], [0]]
    assert [bool(task.buffers) for task in tasks] == [True, False]  # the first one brings the params


def test_a_chunk_is_the_bytes_of_its_place(engine: Engine, network: Network) -> None:
    engine._nodes["a"].blobs["ref0"] = Blob([b"abc", b"", b"defgh"])
    engine._act([Chunk("a", "ref0", 2, 4)])
    (refs,) = network.to("a", Kind.REFS)
    assert b"".join(refs.buffers) == b"cdef"
    assert (refs.header["offset"], refs.header["total"]) == (2, 8)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the assertion says more
def test_a_stranger_whose_name_is_no_text_does_not_disturb(engine: Engine) -> None:
    start(engine)
    with engine.context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.ROUTING_ID, b"\xff\xfe")
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(engine.endpoint)
        stranger.send(b"anything")
        engine._thread.join(0.2)  # it must go on: time for it to be wrong
    assert not engine._crashed


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node without workers' processes, whose messages go nowhere."""
    context: zmq.Context[Any] = zmq.Context()
    master = context.socket(zmq.ROUTER)
    endpoint = f"inproc://{uuid.uuid4().hex}"
    master.bind(endpoint)
    node = Node.connect(context, endpoint, "node", 1, bases=[str(tmp_path)])
    yield node
    node.close()
    master.close(0)
    context.term()


def test_a_node_that_gave_a_round_up_survives_more_slices_of_it(node: Node) -> None:
    # The master gives it the slices of a lost node before it hears of the error.
    encoded = codec.encode("params")
    entry = {"module": "m", "function": None, "shipped": False, "reduce": False, "code": None, "epoch": 1}
    job = {"job": 1, "entry": entry, "slices": [[0, None], [1, None]], "nslices": 2, "reduce": False, "forget": []}
    task = {"job": 1, "round": 1, "params": None}
    node.on_job(job, [])
    node.on_task({**task, "indices": [0]}, [encoded.header, *encoded.buffers])
    node._fail(node.rounds[1], "room", "no room")
    node.on_task({**task, "indices": [1]}, [])  # without params: the master knows that they are here
    assert not node.rounds
