"""The master's end of all links: one ROUTER, its addresses, and the keys of the nodes that may connect.

A node leaves when its link breaks, so no peer needs to take over the name of a connection that still exists; ZeroMQ's
handover would let one node's key take another's place.

Every endpoint speaks CURVE, and its ZAP handler knows only the keys that were made here, one pair for each node (RFC 26
and 27 of ZeroMQ). This machine's own node lives in the engine's loop and needs no link.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

import zmq
import zmq.utils.z85

from qjam_worker.wire.admission import ZAP_DOMAIN, Admission
from qjam_worker.wire.frames import Buffer
from qjam_worker.wire.sockets import LIVENESS, Link

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class Keys(NamedTuple):
    """What a node needs to connect, as Z85 text: the master's public key and its own pair."""

    server: str
    public: str
    secret: str


class Router:
    """For one thread, except `admit`."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._public, self._secret = (key.decode() for key in zmq.curve_keypair())
        self.admission = Admission()
        self._bound: dict[str, str] = {}
        # The ZAP handler is there before anything is bound: without one libzmq lets all in.
        zap = self._context.socket(zmq.REP)
        zap.setsockopt(zmq.LINGER, 0)
        zap.bind(_ZAP_ENDPOINT)
        self.zap = Link(zap)
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.SNDHWM, 0),  # what may be on its way is bounded by credit, in bytes
            (zmq.RCVHWM, 0),
            (zmq.LINGER, 0),
            (zmq.CURVE_SERVER, 1),
            (zmq.CURVE_SECRETKEY, self._secret.encode()),
            (zmq.ZAP_DOMAIN, ZAP_DOMAIN),
            *LIVENESS,
        ):
            self._socket.setsockopt(option, value)
        self.link = Link(self._socket)

    def admit(self, name: str) -> Keys:
        """A new pair of keys, with which a peer may connect as `name` and under no other name."""
        public, secret = zmq.curve_keypair()
        self.admission.admit(name, zmq.utils.z85.decode(public))
        return Keys(self._public, public.decode(), secret.decode())

    def dismiss(self, name: str) -> None:
        """Refuse `name` from now on, and drop what still comes under it."""
        self.admission.dismiss(name)

    def bind(self, address: str) -> str:
        """The endpoint on `address`, which is an IP address, or one with `:port`.

        It is bound when it is first asked for, to a free port if none is given. Raises OSError when the system refuses.
        """
        if address not in self._bound:
            endpoint = f"tcp://{_with_port(address)}"
            self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))  # else LAST_ENDPOINT tells ::ffff:1.2.3.4
            try:
                self._socket.bind(endpoint)
            except zmq.ZMQError as error:
                raise OSError(error.errno, f"{endpoint}: {error.strerror}") from error
            self._bound[address] = str(self._socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        return self._bound[address]

    def send(self, name: str, frames: Sequence[Buffer]) -> bool:
        """Send a message to a node; False when no such node is connected."""
        try:
            self.link.send([name.encode(), *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def receive(self) -> tuple[str, list[memoryview]] | None:
        """The next message and its sender; None when there is none. Drops what comes under another peer's name."""
        while (frames := self.link.receive()) is not None:
            name = bytes(frames[0]).decode(errors="replace")
            assert self.link.first is not None
            if self.link.first.get("User-Id") == name:  # the name that goes with its key
                return name, frames[1:]
        return None

    def answer_zap(self) -> None:
        """Let in the peers that have one of our keys. To be called when `zap` is readable."""
        self.zap.stir()
        while (frames := self.zap.receive()) is not None:
            self.zap.send(self.admission.verdict([bytes(frame) for frame in frames]))

    def close(self) -> None:
        """Close the sockets."""
        self.zap.socket.close()
        self._socket.close()
        self._context.term()


def _with_port(address: str) -> str:
    """`1.2.3.4` or `::1`, with or without a port, as ZeroMQ writes it; `*` stands for a free port."""
    host, port = address, "*"
    try:
        ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
