"""Whole messages through a ZeroMQ socket that lives in an event loop, or from one end to the other of one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional, Protocol

import zmq

from .frames import SMALL, Buffer, Kind, Message, nbytes, pack, unpack

# Plain ints: each | and & on pyzmq's enums costs as much as sending a frame.
MORE, READABLE, EVENTS, NOWAIT = int(zmq.SNDMORE), int(zmq.POLLIN), int(zmq.EVENTS), int(zmq.NOBLOCK)
# A link over which nothing is acknowledged for 15 s is broken: the kernels ask and answer, also while python is busy. A
# cable that is out for some seconds does not break it. ZeroMQ's own heartbeats count whole messages, of which one may
# take minutes on a slow link.
LIVENESS = (
    (int(zmq.TCP_KEEPALIVE), 1),
    (int(zmq.TCP_KEEPALIVE_IDLE), 5),  # s
    (int(zmq.TCP_KEEPALIVE_INTVL), 3),  # s
    (int(zmq.TCP_KEEPALIVE_CNT), 3),
    (int(zmq.TCP_MAXRT), 15_000),  # ms; TCP_USER_TIMEOUT
)


class Link:
    """A socket's messages, without waiting.

    The descriptor of a ZeroMQ socket signals edges, and any call on the socket may use one up. So after each send the
    socket has to be asked again before the loop may sleep; `receive` does that, and does not ask in vain.
    """

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self.socket = socket
        self.first: Optional[zmq.Frame] = None  # of the message that was received last
        self._ask = True

    def fileno(self) -> int:
        """The descriptor to wait for; when it is readable call `stir`, then `receive` until that gives None."""
        return int(self.socket.getsockopt(zmq.FD))

    def stir(self) -> None:
        """A message may have come."""
        self._ask = True

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send all frames as one message; large ones are not copied and must not be changed until they are gone."""
        self._ask = True
        send, last = self.socket.send, len(frames) - 1
        for position, frame in enumerate(frames):
            send(frame, MORE if position < last else 0, nbytes(frame) <= SMALL, False)

    def receive(self) -> Optional[list[memoryview]]:
        """The frames of the next message, in the memory where ZeroMQ has put them; None when there is none."""
        if not self._ask:
            return None
        socket = self.socket
        if not int(socket.getsockopt(EVENTS)) & READABLE:
            self._ask = False
            return None
        self.first = frame = socket.recv(NOWAIT, False)
        frames = [frame.buffer]
        while frame.more:
            frame = socket.recv(NOWAIT, False)
            frames.append(frame.buffer)
        return frames


class Uplink(Protocol):
    """A node's way to its master and back. `on_broken` is called when it turns out that there is none any more."""

    on_broken: Callable[[], None]

    def send(self, kind: Kind, header: dict[str, Any], buffers: Sequence[Buffer]) -> None: ...
    def receive(self) -> Optional[Message]: ...
    def files(self) -> Iterator[tuple[Any, Callable[[], None]]]: ...
    def close(self) -> None: ...


# What ZeroMQ tells of a link that was up and is no more, or that the master refuses.
BROKEN = int(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)


class Dealer:
    """Over a ZeroMQ socket, whose `monitor` tells when the link has broken."""

    @classmethod
    def connect(cls, context: zmq.Context[Any], endpoint: str, name: str, keys: dict[str, str]) -> Dealer:
        """An uplink to the master's ROUTER at `endpoint`, which will know the node as `name`.

        `keys`: Z85 texts of the master's public CURVE key and of the node's own pair: server, public, secret.
        """
        socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.ROUTING_ID, name.encode()),
            (zmq.LINGER, 1000),  # ms
            (zmq.SNDHWM, 0),  # what may be on its way is bounded by credit, in bytes
            (zmq.RCVHWM, 0),
            (zmq.IPV6, 1),
            (zmq.CURVE_SERVERKEY, keys["server"].encode()),
            (zmq.CURVE_PUBLICKEY, keys["public"].encode()),
            (zmq.CURVE_SECRETKEY, keys["secret"].encode()),
            *LIVENESS,
        ):
            socket.setsockopt(option, value)
        dealer = cls(socket, socket.get_monitor_socket(BROKEN))
        socket.connect(endpoint)
        return dealer

    def __init__(self, socket: zmq.Socket[bytes], monitor: Optional[zmq.Socket[Any]] = None) -> None:
        self.link = Link(socket)
        self.on_broken: Callable[[], None] = lambda: None
        self._monitor = None if monitor is None else Link(monitor)

    def send(self, kind: Kind, header: dict[str, Any], buffers: Sequence[Buffer]) -> None:
        self.link.send(pack(kind, header, buffers))

    def receive(self) -> Optional[Message]:
        """The next message; None when there is none. WireError for what is no message."""
        frames = self.link.receive()
        return None if frames is None else unpack(frames)

    def files(self) -> Iterator[tuple[Any, Callable[[], None]]]:
        """What to wait for, and what to call when it is readable."""
        yield self.link, self.link.stir
        if self._monitor is not None:
            yield self._monitor, self._on_event
            self._on_event()  # the descriptor tells of nothing before the socket was found empty once

    def _on_event(self) -> None:
        assert self._monitor is not None
        self._monitor.stir()
        if self._monitor.receive() is not None:
            self.on_broken()

    def close(self) -> None:
        if self._monitor is not None:
            self.link.socket.disable_monitor()
            self._monitor.socket.close()
        self.link.socket.close()


class Lane:
    """Between a master and a node that live in one thread: messages are handed over as they are.

    Through ZeroMQ's inproc, which this was before, they were packed, checked and unpacked for nobody's sake: of a round
    of 2 workers (31 KB each way) that took 0.07 of 0.30 ms.
    """

    def __init__(self) -> None:
        self.on_broken: Callable[[], None] = lambda: None  # it never breaks
        self.down: deque[Message] = deque()
        self.up: deque[Message] = deque()

    def send(self, kind: Kind, header: dict[str, Any], buffers: Sequence[Buffer]) -> None:
        self.up.append(Message(kind, header, list(buffers)))

    def receive(self) -> Optional[Message]:
        return self.down.popleft() if self.down else None

    def files(self) -> Iterator[tuple[Any, Callable[[], None]]]:
        return iter(())

    def close(self) -> None:
        self.down.clear()
