"""Whole messages through a ZeroMQ socket, with less Python on the way than pyzmq's own multipart calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq

from .wire import Buffer

# Plain ints: each | and & on pyzmq's enums costs as much as sending a frame.
MORE, READABLE, EVENTS, NOWAIT = int(zmq.SNDMORE), int(zmq.POLLIN), int(zmq.EVENTS), int(zmq.NOBLOCK)
# Smaller frames are copied: that is cheaper than keeping track of the sender's memory (pyzmq's own threshold).
COPY_BELOW = 64 * 1024


def send(socket: zmq.Socket[Any], frames: Sequence[Buffer]) -> None:
    """Send all frames as one message; large ones are not copied and must not be changed until they are gone."""
    last = len(frames) - 1
    for position, frame in enumerate(frames):
        small = memoryview(frame).nbytes < COPY_BELOW
        socket.send(frame, MORE if position < last else 0, copy=small, track=False)


def receive(socket: zmq.Socket[Any]) -> list[memoryview]:
    """The frames of one message that has arrived, in the memory where ZeroMQ has put them."""
    frame = socket.recv(NOWAIT, copy=False)
    frames = [frame.buffer]
    while frame.more:
        frame = socket.recv(NOWAIT, copy=False)
        frames.append(frame.buffer)
    return frames


def readable(socket: zmq.Socket[Any]) -> bool:
    """Whether a message has arrived."""
    return bool(socket.getsockopt(EVENTS) & READABLE)
