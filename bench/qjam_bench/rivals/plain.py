"""qjam over TCP without encryption, which no Master gives: its engine and a node process, beside plain pyzmq."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import qjam
from qjam.code.user_code import Sources
from qjam.dispatch.rounds import JobSpec
from qjam.dispatch.states import NodeState
from qjam.engine.engine import Engine
from qjam.engine.pending import Pending
from qjam_bench.harness.figures import BenchError
from qjam_bench.harness.party import Party
from qjam_worker.values import codec

NODE = "host/1"
START_S, STOP_S = 60.0, 5.0


class Plain(Party):
    """What Master.run does with what the engine gives."""

    def __init__(self, engine: Engine, sources: Sources, function: Callable[..., Any]) -> None:
        """Take what has been started."""
        self._engine = engine
        self._entry = sources.entry(function)
        self._data: Any = None

    def _load(self, data: Any) -> None:
        self._data = qjam.DataSet(data).bind(self._engine.dispatch.capacity)

    def round(self, params: Any) -> Any:
        entry, refs = self._entry, self._data.hash_list()
        spec = JobSpec((entry.key, tuple(refs)), entry.header, refs, len(refs))
        pending = Pending(spec, entry.code, codec.encode(params), self._data, None)
        self._engine.run(pending)
        if pending.roots is None:
            raise BenchError(f"qjam over plain TCP: {pending.failure}")
        return pending.reduced()


@contextmanager
def party(function: Callable[..., Any], workers: int) -> Iterator[Party]:
    """Holds an engine on a port of loopback, and a node with so many workers that connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    sources = Sources()
    with ExitStack() as stack:
        engine = Engine(endpoint, sources.lookup)
        stack.callback(engine.stop)
        engine.start(lambda *_: None)
        engine.add_node(NODE, NODE, workers)
        node = stack.enter_context(subprocess.Popen([sys.executable, "-m", "qjam_worker"], stdin=subprocess.PIPE))
        stack.callback(_end, engine, node)
        assert node.stdin is not None
        node.stdin.write(json.dumps({"endpoint": endpoint, "node": NODE, "workers": workers}).encode() + b"\n")
        node.stdin.flush()
        state, why = engine.wait_for_node(NODE, START_S)
        if state is not NodeState.READY:
            raise BenchError(f"qjam's node over plain TCP is {state.value}: {why}")
        yield Plain(engine, sources, function)


def _end(engine: Engine, node: subprocess.Popen[bytes]) -> None:
    engine.say_goodbye()
    engine.wait_for_bye(NODE, STOP_S)
    assert node.stdin is not None
    node.stdin.close()  # the node's end, if it has not gone yet
