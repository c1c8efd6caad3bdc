"""Plain pyzmq: a ROUTER in the caller's thread, one DEALER process per worker; over ipc, or over TCP if qjam uses ssh.

No framing, no serialisation; results are added in order of arrival. Sending and receiving can copy or not at each of
the four ends. With 31 KB on 2 cores, all sixteen combinations lay within 10 % of each other for 8 and 16 workers and
within 20 % for 2; to copy on receipt and in the worker was never clearly slower. A trial decides how the caller sends:
a zero-copy frame that all workers share, or a copy for each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import zmq

from qjam_bench import ends
from qjam_bench.ends.loops import Round
from qjam_bench.harness.party import ManyWays, Party, parts

LARGE = 1 << 20  # bytes from which a copy on receipt takes longer than what pyzmq does to avoid it
ANSWER_MS = 30_000  # a worker that does not answer within this time is taken for dead


class RawZmq(ManyWays):
    """A ROUTER and the workers that are connected to it."""

    def __init__(self, router: zmq.Socket[bytes], names: list[bytes]) -> None:
        """`names`: the identities of the workers."""
        super().__init__()
        self._router = router
        self._names = names

    @property
    def ways(self) -> list[Round]:
        return [partial(self._play, share=True), partial(self._play, share=False)]

    def _load(self, data: Any) -> None:
        for name, part in zip(self._names, parts(data, len(self._names)), strict=True):
            self._router.send_multipart([name, b"", b"%d" % len(part), part], copy=False)
        for _ in self._names:
            self._router.recv_multipart()

    def _play(self, params: Any, share: bool) -> Any:
        router = self._router
        frame: Any = zmq.Frame(params) if share else params
        for name in self._names:
            router.send(name, zmq.SNDMORE)
            router.send(frame, copy=not share)
        copy = params.nbytes < LARGE
        total: Any = None
        for _ in self._names:
            router.recv()
            result = np.frombuffer(router.recv() if copy else router.recv(copy=False).buffer)
            if total is None:
                total = np.zeros(len(result))
            total += result
        return total


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run the ROUTER and its worker processes."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qjam-bench-"))
        context = stack.enter_context(zmq.Context())
        router = stack.enter_context(context.socket(zmq.ROUTER))
        router.linger = 0
        router.rcvtimeo = ANSWER_MS
        router.bind(f"ipc://{folder}/raw" if route == "local" else "tcp://127.0.0.1:*")
        address = router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        dealer = ends.program("dealer", address, str(os.getpid()), function, str(LARGE))
        for _ in range(workers):
            stack.enter_context(ends.child(dealer))
        names = [router.recv_multipart()[0] for _ in range(workers)]
        yield RawZmq(router, names)
        for name in names:
            router.send_multipart([name, b""])
