"""Whole messages through a ZeroMQ socket that lives in an event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import zmq

from .wire import Buffer

# Plain ints: each | and & on pyzmq's enums costs as much as sending a frame.
MORE, READABLE, EVENTS, NOWAIT = int(zmq.SNDMORE), int(zmq.POLLIN), int(zmq.EVENTS), int(zmq.NOBLOCK)
# Smaller frames are copied: that is cheaper than keeping track of the sender's memory (pyzmq's own threshold).
COPY_BELOW = 64 * 1024
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
            size = len(frame) if type(frame) is bytes else memoryview(frame).nbytes
            send(frame, MORE if position < last else 0, size < COPY_BELOW, False)

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
