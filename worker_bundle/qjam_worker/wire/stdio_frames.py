"""Two streams over one pair of pipes: frames of a byte (which stream), a length of four bytes, and that many bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator

FRAME = struct.Struct("!BI")

HEARTBEAT, UPLINK = 0, 1


class Frames:
    """Takes bytes as they come and gives (stream, piece of its bytes): a frame may come in several pieces."""

    def __init__(self) -> None:
        self._head = b""
        self._stream = HEARTBEAT
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        rest = memoryview(data)
        while rest:
            if not self._left:
                lacks = FRAME.size - len(self._head)
                self._head += rest[:lacks]
                rest = rest[lacks:]
                if len(self._head) < FRAME.size:
                    return
                self._stream, self._left = FRAME.unpack(self._head)
                self._head = b""
            piece, rest = rest[: self._left], rest[self._left :]
            self._left -= len(piece)
            if piece:
                yield self._stream, piece


def frame(stream: int, data: bytes) -> bytes:
    """One whole frame."""
    return FRAME.pack(stream, len(data)) + data
