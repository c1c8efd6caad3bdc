"""Hostile input: what once did harm, and fresh lies for some seconds. tests/fuzzing has the long run."""

from __future__ import annotations

import math
import os
import secrets
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest

import pyzmq_garbage  # noqa: F401
from fuzzing import masters
from fuzzing.bench import Bench, Broken, Clock, opened, small
from fuzzing.campaign import GROWTH, SHARES, Campaign
from fuzzing.inplace import InPlace
from fuzzing.mutation import sealed
from fuzzing.peer import CREDIT
from qjam.code.user_code import Sources
from qjam.engine.engine import Engine
from qjam.engine.router import Router
from qjam.launch.json_lines import MAX_MESSAGE, JsonLines
from qjam_worker.values import codec, lone_arrays
from qjam_worker.wire import frames
from qjam_worker.wire.frames import Kind
from refs_as_text import ref

SECONDS = float(os.environ.get("QJAM_FUZZ_SECONDS", "20"))

HELLO = {"workers": 2, "credit": CREDIT}


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("target", SHARES)
def test_fresh_lies(target: str) -> None:
    parts = {"masters": 0.5, "nodes": 0.25, "parsers": 0.1, "sockets": 0.15}
    with Campaign(secrets.token_hex(4), (target,)) as campaign:
        campaign.run(math.inf, parts[target] * SECONDS)
        campaign.run(101, 50)  # where the machine is busy with other things
        assert not campaign.failures, "\n".join(campaign.report())
        assert campaign.told[target] > 100
        assert campaign.memory.growth < GROWTH


# ---- to the master ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Iterator[Clock]:
    with small() as clock:
        yield clock


@pytest.fixture
def bench(clock: Clock) -> Iterator[Bench]:
    """An engine with two nodes of two workers, "honest" and "liar", who have not said anything."""
    bench = Bench(clock, Random(1))
    bench.inboxes: dict[str, list[frames.Message]] = {}
    for name in ("honest", "liar"):
        bench.engine.add_node(name, name, 2, 2)
        bench.inboxes[name] = []
        bench.deliver[name] = bench.inboxes[name].append
    yield bench
    bench.close()


def say(bench: Bench, name: str, kind: Kind, header: dict[str, Any], buffers: Any = ()) -> str:
    return bench.say(name, [bytes(frame) for frame in frames.pack(kind, header, buffers)])


def join(bench: Bench, *names: str) -> None:
    for name in names:
        say(bench, name, Kind.HELLO, HELLO)
        say(bench, name, Kind.STATE, {"state": "ready", "workers": [7, 8]})


def submit(bench: Bench, nslices: int = 4) -> int:
    """A round over data."""
    while True:
        bench.submit()
        run = bench.runs[bench.made]
        if run.data is not None and run.nslices >= nslices and run.pending.deadline is None:
            return bench.made
        while bench.made in bench.runs:  # that is none
            bench.cancel()
            bench.check_ends()


def why(bench: Bench, name: str = "liar") -> str:
    return bench.lost.get(name, "")


def given(bench: Bench, name: str, number: int) -> list[int]:
    return sorted(bench.runs[number].given[name])


def result(number: int, *spans: tuple[int, int]) -> dict[str, Any]:
    return {"round": number, "roots": [[lo, hi, 1] for lo, hi in spans], "seconds": 0.1}


def value(bench: Bench, number: int, lo: int, hi: int) -> bytes:
    encoded = codec.encode(bench.runs[number].value(lo, hi))
    return encoded.header


LOST = {"state": "lost", "worker": 0, "how": "was killed", "pid": 7}
FIRST_LIES = [
    (Kind.STATE, {"state": "ready", "workers": [7, 8]}, "STATE came before HELLO"),
    (Kind.CREDIT, {"bytes": 1}, "CREDIT came before HELLO"),
    (Kind.HELLO, {**HELLO, "workers": 1}, "it has 1 workers; it was to have 2"),
]


@pytest.mark.parametrize(("kind", "header", "reason"), FIRST_LIES)
def test_a_node_that_begins_wrongly_is_lost(bench: Bench, kind: Kind, header: dict[str, Any], reason: str) -> None:
    say(bench, "liar", kind, header)
    assert reason in why(bench)


@pytest.mark.parametrize(
    ("kind", "header", "buffers", "reason"),
    [
        (Kind.HELLO, HELLO, [], "it says HELLO and is ready already"),
        (Kind.STATE, {"state": "ready", "workers": [7, 8]}, [], "it says that its workers are ready, and it is ready"),
        (Kind.CREDIT, {"bytes": 1}, [], "it gives credit back for 1 bytes, and 0 are on their way to it"),
        (Kind.STATE, {"state": "replaced", "worker": 2, "pid": 9}, [], "it has no worker 2"),
        (Kind.STATE, {**LOST, "worker": 2}, [], "it names worker 2 and has 2"),
        (Kind.LOG, {"worker": 1 << 40, "stream": 1}, [b"x"], "it has no worker"),
        (Kind.GET, {"round": None, "refs": [[ref("module:1:m"), 0, None]] * 2}, [], "a ref twice"),
        (Kind.GET, {"round": None, "refs": [[ref("module:1:m"), 3, 3]]}, [], "a part of a ref that has no bytes"),
        (Kind.TASK, {"job": 1, "data": 1, "round": 1, "indices": [0], "params": "have"}, [], "TASK is for nodes"),
        (Kind.WELCOME, {"node": "liar", "host": "liar", "speculation": True}, [], "WELCOME is for nodes"),
    ],
)
def test_what_a_node_cannot_mean_is_its_end(
    bench: Bench, kind: Kind, header: dict[str, Any], buffers: list[bytes], reason: str
) -> None:
    join(bench, "honest", "liar")
    say(bench, "liar", kind, header, buffers)
    assert reason in why(bench)
    assert bench.is_present("honest")


def test_a_node_with_another_number_of_workers_ready_is_lost(bench: Bench) -> None:
    say(bench, "liar", Kind.HELLO, HELLO)
    say(bench, "liar", Kind.STATE, {"state": "ready", "workers": [7]})
    assert "1 of its 2 workers are ready" in why(bench)


def test_a_node_brings_no_result_of_slices_that_another_one_was_given_in_this_round(bench: Bench) -> None:
    join(bench, "liar")
    first = submit(bench)
    indices = given(bench, "liar", first)
    say(bench, "liar", Kind.RESULT, result(first, (0, len(indices))), [value(bench, first, 0, len(indices))])
    join(bench, "honest")  # which takes some of them over: the liar has been told of all once
    key, second = bench.jobs[first], submit(bench)
    while bench.jobs[second] != key:
        second = submit(bench)
    others = given(bench, "honest", second)
    assert others
    say(bench, "liar", Kind.RESULT, result(second, (others[0], others[0] + 1)), [codec.encode(0.0).header])
    assert "it was not given all of the slices" in why(bench)
    assert bench.engine.dispatch.rounds[second].tree.covered == 0


def test_a_node_ends_no_round_in_which_it_has_no_part(bench: Bench) -> None:
    join(bench, "honest")
    number = submit(bench)
    join(bench, "liar")
    error = {"round": number, "what": "task", "text": "t", "worker": 0, "slice": 0, "summary": "s"}
    say(bench, "liar", Kind.ERROR, error)
    assert f"it names round {number}, in which it has no part" in why(bench)
    assert number in bench.runs


@pytest.mark.parametrize("what", ["load", "timeout", "cancelled", "closed", "unreachable", "crashed"])
def test_a_node_ends_no_round_in_the_name_of_the_master(bench: Bench, what: str) -> None:
    join(bench, "liar", "honest")
    number = submit(bench)
    header = {"round": number, "what": what, "text": "t", "worker": 0, "slice": 0, "summary": "s"}
    bench.say("liar", sealed(Kind.ERROR, msgpack.packb(header)))
    assert "task, room or node" in why(bench)
    assert number in bench.runs


@pytest.mark.parametrize(
    ("refs", "reason"),
    [
        ([[ref("d99-0"), 0, None]], "it asks for slice:d99-0"),
        ([[ref("params:99"), 0, None]], "it asks for params:99"),
        ([[ref("code:of-somebody-else"), 0, None]], "it asks for code:of-somebody-else"),
        ([[ref(f"module:1:m{number}"), 0, None] for number in range(1001)], "more than 1000 modules"),
    ],
)
def test_a_node_is_given_nothing_that_it_was_not_told_of(bench: Bench, refs: list[list[Any]], reason: str) -> None:
    join(bench, "liar", "honest")
    number = submit(bench)
    say(bench, "liar", Kind.GET, {"round": number, "refs": refs})
    assert reason in why(bench)


@pytest.mark.parametrize(("offset", "end"), [(1 << 40, None), (0, 1 << 40)])
def test_a_node_that_asks_for_what_comes_after_the_end_is_lost(bench: Bench, offset: int, end: int | None) -> None:
    join(bench, "liar", "honest")
    number = submit(bench)
    its = ref(bench.runs[number].data.refs[given(bench, "liar", number)[0]])
    say(bench, "liar", Kind.GET, {"round": number, "refs": [[its, offset, end]]})
    bench.do_load()
    assert "it asks for what comes after the first" in why(bench)


def test_text_that_nobody_reads_is_bounded(bench: Bench) -> None:
    join(bench, "liar")
    for _ in range(1000):
        if not bench.is_present("liar"):
            break
        say(bench, "liar", Kind.LOG, {"worker": 0, "stream": 1}, [b""])
    assert "it sends more text than it may" in why(bench)


def test_the_last_words_of_a_node_are_cut(bench: Bench) -> None:
    join(bench, "liar")
    say(bench, "liar", Kind.BYE, {"reason": "x" * 1_000_000})
    assert len(why(bench)) < 10_000


def test_many_late_questions_take_no_time(bench: Bench) -> None:
    join(bench, "liar")
    missing = [[ref(f"d7-{number}"), 0, None] for number in range(20_000)]
    start = time.thread_time()
    say(bench, "liar", Kind.GET, {"round": 999, "refs": missing})
    assert time.thread_time() - start < 5
    assert len(bench.inboxes["liar"]) > 20_000


def test_the_bench_sees_a_forgery(bench: Bench) -> None:
    join(bench, "liar", "honest")
    number = submit(bench)
    run = bench.runs[number]
    run.pending.end([((0, run.nslices), codec.encode(0.0))], None)
    with pytest.raises(Broken, match="who were not given it"):
        bench.check_ends()
    assert opened([b"x"]) is None


def test_an_episode_without_lies_ends_well(clock: Clock) -> None:
    episode = masters.Episode(clock, Random(5), Counter())
    episode.lie = lambda: None  # type: ignore[method-assign]
    try:
        for _ in range(3000):
            episode.step()
        episode.finish()
        assert episode.liars == 1  # who was sent away at the end
    finally:
        episode.bench.close()


# ---- to a node ----------------------------------------------------------------------------------------------------


@pytest.fixture
def node(clock: Clock, tmp_path: Path) -> Iterator[InPlace]:
    """With two workers, a job of four slices and a round of it that waits for two of them."""
    node = InPlace("node", 2, Random(1), tmp_path)
    node.receive()
    hear(node, Kind.WELCOME, {"node": "node", "host": "host", "speculation": True})
    hear(node, Kind.JOB, JOB)
    hear(node, Kind.DATA, DATA)
    hear(node, Kind.TASK, TASK, [codec.encode(None).header])
    yield node
    node.close()


ENTRY = {"epoch": 1, "reduce": False, "code": None}
JOB = {"job": 1, "entry": ENTRY, "forget": []}
DATA = {"data": 1, "slices": [[i, f"d0-{i}"] for i in range(4)], "nslices": 4, "forget": []}
TASK = {"job": 1, "data": 1, "round": 1, "indices": [0, 1], "params": "inline"}
ONCE = {"job": 1, "data": None, "round": 2, "indices": [0, 1], "params": "inline"}


def hear(node: InPlace, kind: Kind, header: dict[str, Any], buffers: Any = ()) -> bool:
    node.hear([bytes(frame) for frame in frames.pack(kind, header, buffers)])
    return node.receive()


@pytest.mark.parametrize(
    ("kind", "header", "buffers", "reason"),
    [
        (Kind.STATE, {"state": "ready", "workers": [1]}, [], "STATE is for the master"),
        (Kind.JOB, {**JOB, "entry": {**ENTRY, "reduce": True}}, [], "job 1 was another one before"),
        (Kind.DATA, {**DATA, "nslices": 5}, [], "data 1 had other slices before"),
        (Kind.DATA, {**DATA, "data": 2, "slices": [[4, "d1-4"]]}, [], "data 2 has 4 slices"),
        # A worker was given work for what was not here, and a KeyError was the end of the node.
        (Kind.DATA, {**DATA, "slices": [[0, "d0-1"]]}, [], "data 1 had other slices before"),
        (Kind.DATA, {**DATA, "forget": [1]}, [], "job 1 is to be forgotten and is in use"),
        (Kind.RELEASE, {"data": [1], "forget": []}, [], "the data {1} is to be removed and is in use"),
        (Kind.JOB, {**JOB, "job": 2, "forget": [1]}, [], "job 1 is to be forgotten and is in use"),
        (Kind.TASK, {**TASK, "job": 9, "round": 2}, [b"x"], "of job 9, which the master has not described"),
        (Kind.TASK, {**TASK, "data": 9, "round": 2}, [b"x"], "of data 9, which the master has not described"),
        (Kind.TASK, {**TASK, "data": None}, [], "round 1 is of job 1 over data 1"),
        (Kind.TASK, ONCE, [b"x"], "a task without data has 0 slices"),
        (Kind.TASK, {**ONCE, "nslices": 1}, [b"x"], "a task without data has 1 slices"),
        (Kind.TASK, {**TASK, "indices": [7]}, [], "one that the master has not named"),
        (Kind.TASK, {**TASK, "indices": [2, 2]}, [], "has a slice twice"),
        (Kind.REFS, {"ref": ref("d0-0"), "offset": 5, "total": 10}, [b"x"], "a block begins at 5"),
        (Kind.REFS, {"ref": ref("d0-0"), "offset": 0, "total": 1}, [b"xy"], "its length is 1"),
        (Kind.REFS, {"ref": ref("d0-0"), "offset": 0, "total": 1}, [b""], "is empty"),
        (Kind.REFS, {"ref": ref("d9-0"), "offset": 0, "total": 1}, [b"x"], "slice:d9-0 was never asked for"),
        (Kind.CREDIT, {"bytes": 1}, [], "it may print 1 bytes more than it has printed"),
    ],
)
def test_a_node_leaves_when_its_master_cannot_mean_what_it_says(
    node: InPlace, kind: Kind, header: dict[str, Any], buffers: list[bytes], reason: str
) -> None:
    assert not hear(node, kind, header, buffers)
    assert reason in (node.node.leaving or "")
    node.close()
    last = frames.unpack(node.out[-1])
    assert (last.kind, last.header["reason"]) == (Kind.BYE, node.node.leaving)


def test_a_node_leaves_when_the_length_of_a_ref_changes(node: InPlace) -> None:
    assert hear(node, Kind.REFS, {"ref": ref("d0-0"), "offset": 0, "total": 10}, [b"xyz"])
    assert not hear(node, Kind.REFS, {"ref": ref("d0-0"), "offset": 3, "total": 12}, [b"xyz"])


def test_a_chunk_that_begins_with_what_is_here_is_taken(node: InPlace) -> None:
    # Two answers to two questions, cut in other places: all that followed was dropped, and the round hung.
    hear(node, Kind.REFS, {"ref": ref("d0-0"), "offset": 0, "total": 10}, [b"abc"])
    hear(node, Kind.REFS, {"ref": ref("d0-0"), "offset": 0, "total": 10}, [b"abcdef"])
    hear(node, Kind.REFS, {"ref": ref("d0-0"), "offset": 6, "total": 10}, [b"ghij"])
    assert node.node.store.read(ref("d0-0")) == b"abcdefghij"


def test_params_that_come_after_the_end_of_their_round_are_not_kept(node: InPlace) -> None:
    assert hear(node, Kind.REFS, {"ref": ref("params:5"), "offset": 0, "total": 1 << 40}, [b"x"])
    assert node.node.store.bytes == 0
    assert frames.unpack(node.out[-1]).header == {"bytes": 1}


def test_a_module_that_is_none_is_the_end(node: InPlace) -> None:
    node.node.on_worker_message(node.workers.workers[0], {"op": "import", "name": "m", "epoch": 1})
    content = msgpack.packb({"source": "no bytes"})
    assert not hear(node, Kind.REFS, {"ref": ref("module:1:m"), "offset": 0, "total": len(content)}, [content])
    assert "module:1:m is no module" in (node.node.leaving or "")


def test_a_name_that_no_module_can_have_is_not_asked_for(node: InPlace) -> None:
    node.out.clear()
    node.node.on_worker_message(node.workers.workers[0], {"op": "import", "name": "x" * 5000, "epoch": 1})
    assert not node.out
    assert node.workers.workers[0].modules.heard[-1]["module"] is None


def test_a_ping_is_answered_with_nothing_but_its_time(node: InPlace) -> None:
    hear(node, Kind.PING, {"t": 0.5, "more": [1] * 1000})
    assert frames.unpack(node.out[-1]) == (Kind.PONG, {"t": 0.5}, [])


# ---- to what reads bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"", b"x", bytes(31), bytes(33), bytes(32)])
def test_a_key_of_another_length_is_an_unknown_one(key: bytes) -> None:
    router = Router()
    try:
        router.admit("a")
        assert router.admission.verdict([b"1.0", b"7", b"qjam", b"", b"", b"CURVE", key])[2] == b"400"
    finally:
        router.close()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "a\\b", ".", "..a", "a..b", "", "a\0b"])
def test_a_node_reads_no_file_that_is_no_module_of_the_users(name: str) -> None:
    assert msgpack.unpackb(Sources().lookup(name)) is None


def test_a_long_header_of_an_array_is_not_remembered() -> None:
    encoded = codec.encode(np.arange(777.0))
    body = encoded.header[4:]
    flags, count, _, places = struct.unpack_from("<BIQQ", body)
    filling = bytes(1 << 20)  # where a pickle would be, if the flags told of one
    header = struct.pack("<BIQQ", flags, count, len(filling), places) + filling + body[21:]
    before = len(lone_arrays.by_header)
    value = codec.decode(struct.pack("<I", zlib.crc32(header)) + header, encoded.buffers, allow_pickle=False)
    assert value.tolist() == np.arange(777.0).tolist()
    assert len(lone_arrays.by_header) == before


@pytest.mark.parametrize("data", [b"{\n", b"5\n", b"\xff\n", b"[" * 100_000 + b"\n", b"x" * (MAX_MESSAGE + 1)])
def test_lines_that_are_no_messages_are_the_end(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = JsonLines(ours)
        left = memoryview(data)
        theirs.setblocking(False)
        for _ in range(10_000):
            if left:
                left = left[theirs.send(left) :]
            try:
                reader.receive()
            except EOFError:
                return
    pytest.fail("it has no end")


def test_a_guest_that_is_lost_is_dismissed() -> None:
    """A node in the master's own loop has nobody else who would end it."""
    closed = []

    class LocalNode:
        leaving = None

        def __init__(self, lane: Any, selector: Any) -> None: ...
        def start(self) -> None: ...
        def on_timer(self, now: float) -> None: ...

        def receive(self) -> bool:
            return True

        def next_deadline(self) -> None:
            return None

        def close(self) -> None:
            closed.append(self)

    engine = Engine(lambda name: b"")
    engine.add_node("a", "a", 1)
    engine.start(lambda *printed: None)
    try:
        engine.add_local("a", LocalNode)
        engine.ask(lambda: engine._inbox.on_frames("a", [memoryview(b"nonsense")]))
        deadline = time.monotonic() + 5
        while not closed and time.monotonic() < deadline:
            engine.ask(lambda: None)
        assert closed
        assert engine.wait_for_bye("a", 1)
    finally:
        engine.stop()
