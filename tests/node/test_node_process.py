"""Nodes in processes of their own, over ipc, as a remote host will run them: two at once, and when one dies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

import gates
import nodecode
import usercode
from processes import all_end, descendants
from qjam import DataSet
from qjam.code.user_code import Sources
from qjam.data.leases import Lease
from qjam.dispatch import stealing
from qjam.dispatch.jobs import JobSpec
from qjam.dispatch.rounds import RoundSpec
from qjam.dispatch.states import NodeState
from qjam.engine.engine import Engine
from qjam.engine.pending import Pending
from qjam_worker.values import codec, flat

START_S = 30.0


class Cluster:
    """An engine and its node processes."""

    def __init__(self) -> None:
        self.sources = Sources()
        self.engine = Engine(self.sources.lookup)
        self.engine.start(lambda *_: None)
        self.endpoint = self.engine.bind("127.0.0.1")
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, name: str, workers: int) -> None:
        self.engine.add_node(name, name, workers)
        node = subprocess.Popen([sys.executable, "-m", "qjam_worker"], stdin=subprocess.PIPE)
        self.nodes[name] = node
        assert node.stdin is not None
        keys = self.engine.admit(name)._asdict()
        welcome = {"endpoint": self.endpoint, "node": name, "workers": workers, "keys": keys}
        node.stdin.write(json.dumps(welcome).encode() + b"\n")
        node.stdin.flush()
        assert self.engine.wait_for_node(name, START_S)[0] is NodeState.READY

    def kill(self, name: str) -> None:
        """Kill a node as a power cut would; its workers go with it."""
        started = descendants(self.nodes[name].pid)
        self.nodes[name].kill()
        assert all_end(started)
        self.engine.lose_node(name, "killed by the test")

    def submit(self, module: object, params: object, data: DataSet | None) -> Pending:
        entry = self.sources.user_code(module)
        refs = None if data is None else data.hash_list()
        slices = max(1, self.engine.dispatch.capacity) if refs is None else len(refs)
        lease = None if refs is None else Lease(tuple(refs), 0)
        spec = RoundSpec(JobSpec(entry.key, entry.header), slices, lease)
        pending = Pending(spec, entry.code, codec.encode(params), data, None)
        self.engine.submit(pending)
        return pending

    def result(self, pending: Pending, reduce: object) -> object:
        pending.wait()
        assert pending.roots is not None, pending.failure
        return pending.reduced(reduce)  # type: ignore[arg-type]

    def close(self) -> None:
        self.engine.say_goodbye()
        for name, node in self.nodes.items():
            assert node.stdin is not None
            self.engine.wait_for_bye(name, 5.0)
            node.stdin.close()
            node.wait()
        self.engine.stop()


@contextmanager
def cluster(**workers: int) -> Iterator[Cluster]:
    made = Cluster()
    try:
        for name, count in workers.items():
            made.add(name, count)
        yield made
    finally:
        made.close()


DATA = DataSet(list(range(24)), slice_size=2)


@pytest.fixture(autouse=True)
def _nobody_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a node that is done while the other is held up would try its slices as well."""
    monkeypatch.setattr(stealing, "MIN_SEARCH_DELAY", 1e6)


def test_two_nodes_give_what_one_gives_to_the_last_bit() -> None:
    data = DataSet(np.random.default_rng(3).standard_normal((999, 7)) * 10.0 ** np.arange(7), slice_size=37)
    sums = []
    for nodes in ({"a": 1}, {"a": 2, "b": 3}):
        with cluster(**nodes) as made:
            sums.append(made.result(made.submit(usercode.add_up, 0.1, data), lambda a, b: a + b))
    assert np.asarray(sums[0]).tobytes() == np.asarray(sums[1]).tobytes()


def test_neighbouring_slices_go_to_one_node_and_only_roots_come_back() -> None:
    with cluster(a=1, b=1) as made:
        pending = made.submit(usercode.add_up, 1, DATA)
        pending.wait()
        assert pending.roots is not None
        assert [span for span, _ in pending.roots] == [(0, 4), (4, 6), (6, 8), (8, 12)]


def test_each_node_gets_its_own_slices_once() -> None:
    with cluster(a=1, b=1) as made:
        for _ in range(3):
            made.result(made.submit(usercode.add_up, 1, DATA), lambda a, b: a + b)
        sent = made.engine.stats.dataset_sent
    assert sent == sum(flat.size(DATA.slice_data(i)) for i in range(len(DATA)))


def test_without_data_every_worker_of_every_node_runs_once() -> None:
    with cluster(a=1, b=2) as made:
        assert made.result(made.submit(usercode.forty_two, None, None), lambda a, b: a + b) == 3 * 42


def test_slices_of_a_node_that_dies_go_to_the_other(tmp_path: Path) -> None:
    arrivals, way = gates.Gate(tmp_path / "arrivals"), gates.Gate(tmp_path / "way")
    with cluster(a=1, b=1) as made, closing(arrivals), closing(way):
        pending = made.submit(nodecode.pass_gates, (arrivals.path, way.path), DATA)
        for _ in range(2):
            arrivals.heard()
        made.kill("b")
        way.open(2 * len(DATA))
        assert made.result(pending, lambda a, b: a + b) == 24
        assert made.engine.dispatch.resent > 0


def test_a_round_with_no_node_left_fails_and_says_why() -> None:
    with cluster(a=1) as made:
        made.kill("a")
        pending = made.submit(usercode.forty_two, None, None)
        pending.wait()
        assert pending.failure is not None
        assert pending.failure.what == "unreachable"
        assert "a: killed by the test" in pending.failure.text


def test_the_end_of_stdin_ends_the_node_also_while_user_code_runs(tmp_path: Path) -> None:
    gate = gates.Gate(tmp_path / "gate")
    with cluster(a=2) as made, closing(gate):
        made.submit(usercode.deaf, gate.path, None)
        for _ in range(2):
            gate.heard()
        node = made.nodes["a"]
        started = descendants(node.pid)
        assert len(started) == 3  # the fork server and two workers
        assert node.stdin is not None
        node.stdin.close()
        assert all_end(started)
        assert node.wait(5.0) == 0


def test_bye_ends_the_node_and_is_answered() -> None:
    with cluster(a=1) as made:
        made.engine.say_goodbye()
        assert made.engine.wait_for_bye("a", 5.0)
        assert made.nodes["a"].wait(5.0) == 0


def test_what_is_not_our_protocol_loses_the_node_and_not_the_engine() -> None:
    with cluster(a=1) as made, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        keys = made.engine.admit("stranger")
        stranger.setsockopt(zmq.ROUTING_ID, b"stranger")
        stranger.curve_serverkey, stranger.curve_publickey = keys.server.encode(), keys.public.encode()
        stranger.curve_secretkey = keys.secret.encode()
        stranger.connect(made.endpoint)
        stranger.send_multipart([b"nonsense", b"more"])
        assert made.result(made.submit(usercode.forty_two, None, None), lambda a, b: a + b) == 42
