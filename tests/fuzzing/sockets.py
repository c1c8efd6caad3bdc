"""Lies through real sockets, to a master that works meanwhile: by strangers, under other names, as bare bytes."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import zmq

from qjam import Master
from qjam.engine.router import Keys
from qjam_worker.values import codec
from qjam_worker.wire.frames import Kind, pack

from .bench import Broken
from .mutation import Frames, Lore, Mutator

LINGER = 200  # ms
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"


def honest_messages() -> list[Frames]:
    """What a node may say, to be altered."""
    hello = {"workers": 1, "credit": 1 << 20}
    encoded = codec.encode(0.0)
    messages: list[tuple[Kind, dict[str, Any], list[bytes]]] = [
        (Kind.HELLO, hello, []),
        (Kind.STATE, {"state": "ready", "workers": [77]}, []),
        (Kind.RESULT, {"round": 1, "roots": [[0, 1, 1]], "seconds": 0.0}, [encoded.header]),
        (Kind.GET, {"round": None, "refs": [[["module", "1:os"], 0, None]]}, []),
        (Kind.LOG, {"worker": 0, "stream": 1}, [b"liar\n"]),
        (Kind.BYE, {"reason": "done"}, []),
    ]
    return [[bytes(frame) for frame in pack(*message)] for message in messages]


class Sockets:
    """One master on this machine, and whoever comes."""

    def __init__(self, tally: Counter[str]) -> None:
        self.tally = tally
        self.master = Master(1, echo=False)
        self.engine = self.master._engine
        self.local = next(iter(self.engine.dispatch.nodes))
        self.endpoint = self.engine.bind("127.0.0.1")
        self.port = int(self.endpoint.rpartition(":")[2])
        self.context: zmq.Context[Any] = zmq.Context()
        self.messages = honest_messages()
        self.liars = 0
        self.told = 0
        self.last: tuple[str, Any] = ("", None)
        self.ways: list[Callable[[Random, Mutator], None]] = [
            self.stranger, self.stranger, self.other_key, self.other_name, self.liar, self.liar, self.bare, self.bare,
        ]  # fmt: skip

    def close(self) -> None:
        self.context.destroy(0)
        self.master.close()

    def run(self, rng: Random) -> None:
        way = rng.choice(self.ways)
        before = self.told
        way(rng, Mutator(rng))
        self.tally[f"sockets {way.__name__}"] += self.told - before
        self.tally["sockets"] += self.told - before
        if rng.random() < 0.2:
            self.check()

    def check(self) -> None:
        """The master goes on, and nobody has come in."""
        if self.engine._calls.failed or not self.engine._loop._thread.is_alive():
            raise Broken(f"the engine: {self.engine._calls.failed}")
        if self.master.run(lambda params, part: params + 1, 41) != 42:
            raise Broken("a wrong result")
        record = self.engine.dispatch.nodes.get(self.local)
        if record is None or record.state.value != "ready":
            raise Broken(f"the node of this machine is {record}")

    def message(self, rng: Random, mutator: Mutator) -> Frames:
        lore = Lore([1, 2, self.liars], [self.local, f"liar/{self.liars}"])
        frames = rng.choice(self.messages)
        return frames if rng.random() < 0.3 else mutator.message(frames, lore)

    def say(self, rng: Random, mutator: Mutator, identity: bytes, keys: Keys | None) -> None:
        """A connection, and some messages through it."""
        with self.context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, LINGER)
            dealer.setsockopt(zmq.ROUTING_ID, identity)
            if keys is not None:
                dealer.curve_serverkey, dealer.curve_publickey = keys.server.encode(), keys.public.encode()
                dealer.curve_secretkey = keys.secret.encode()
            dealer.connect(self.endpoint)
            for _ in range(rng.choice((1, 5, 20))):
                frames = self.message(rng, mutator) or [b""]
                self.last = str(identity), frames
                try:
                    dealer.send_multipart(frames, zmq.DONTWAIT)
                except zmq.Again:  # it was turned away meanwhile
                    return
                self.told += 1

    def identity(self, rng: Random) -> bytes:
        known = self.local.encode(), f"liar/{self.liars}".encode()
        return rng.choice((*known, b"x", b"\xff\xfe", rng.randbytes(8))).lstrip(b"\0") or b"y"

    def stranger(self, rng: Random, mutator: Mutator) -> None:
        """Without a key."""
        self.say(rng, mutator, self.identity(rng), None)

    def other_key(self, rng: Random, mutator: Mutator) -> None:
        """With a key that nobody gave it."""
        public, secret = (key.decode() for key in zmq.curve_keypair())
        keys = Keys(self.engine._router._public, public, secret)
        self.say(rng, mutator, self.identity(rng), keys)

    def other_name(self, rng: Random, mutator: Mutator) -> None:
        """With the key of a node that there is not, under the name of one that there is."""
        name = f"other/{uuid.uuid4().hex}"
        keys = self.engine.admit(name)
        self.say(rng, mutator, rng.choice((self.local.encode(), f"liar/{self.liars}".encode())), keys)
        self.engine.forget(name)

    def liar(self, rng: Random, mutator: Mutator) -> None:
        """A node that belongs here."""
        self.liars += 1
        name = f"liar/{self.liars}"
        keys = self.engine.admit(name)
        self.engine.add_node(name, "liar", 1)
        try:
            self.say(rng, mutator, name.encode(), keys)
            state, why = self.engine.wait_for_node(name, 0.2)
            self.tally[f"sockets: the liar is {state.value}{' with a reason' if why else ''}"] += 1
        finally:
            self.engine.ask(lambda: self.engine.remove_node(name, "it is time"))
            self.engine.forget(name)

    def bare(self, rng: Random, mutator: Mutator) -> None:
        """Bytes into the port, as somebody who scans it."""
        data = rng.choice((b"", GREETING, GREETING + b"CURVE" + bytes(47), b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n"))
        data += mutator.bytes(rng.choice((b"", b"\x04\x26\x05READY", rng.randbytes(100))))
        self.last = "bare", data
        with socket.create_connection(("127.0.0.1", self.port), 5.0) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
            if rng.random() < 0.3:
                connection.settimeout(0.05)
                connection.recv(100)
        self.told += 1
