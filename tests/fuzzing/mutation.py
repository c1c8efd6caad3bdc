"""Messages that are almost right: bytes altered, values replaced, whatever a seed brings about."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgpack

from qjam_worker.wire.frames import SMALL, VERSION, Kind

Frames = list[bytes]

NUMBERS = [
    *(0, 1, 2, 3, 7, -1, -2, 255, 256, 1 << 16, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 32, (1 << 53) - 1, 1 << 53),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 31), -(1 << 63)),
    *(0.0, -0.0, 0.5, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf),
]
TEXTS = [
    *("", "x", "\ud800", "\0", "a\nb", "x" * 300, "x" * 5000, "ready", "replaced", "lost", "shared"),
    *("task", "room", "node", "load", "timeout", "closed", "cancelled", "crashed"),
    *("params:1", "code:1", "module:1:os", "module:1:../../etc/passwd", "module:", "module:1:", ":", "..", "/etc"),
]
OTHERS: list[Any] = [None, True, False, b"", b"\x80" * 40, [], {}, [[]], [None], [0], ["x"], {"a": 1}, [[0, 1, 1]]]


FIXED = struct.Struct("!4sBBIII")  # of a message, with its checksum


@dataclass
class Lore:
    """What a liar may know: names and numbers that mean something here."""

    numbers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def sealed(kind: int, header: bytes, buffers: Sequence[bytes] = (), count: int | None = None) -> Frames:
    """Frames with a right checksum, whatever is in them."""
    number = len(buffers) if count is None else count
    fixed = struct.pack("!4sBBII", b"qjam", VERSION, kind, number, len(header))
    rest = b"".join(struct.pack("!Q", len(buffer)) for buffer in buffers) + header
    small = [buffer for buffer in buffers if len(buffer) <= SMALL]
    large = [buffer for buffer in buffers if len(buffer) > SMALL]
    return [b"".join([fixed, struct.pack("!I", zlib.crc32(fixed + rest)), rest, *small]), *large]


def opened(frames: Frames) -> tuple[int, bytes, list[bytes]]:
    """Kind, header as it was packed, and buffers of a message whose frames are right, whatever is in them."""
    _, _, kind, count, length, _ = FIXED.unpack_from(frames[0])
    sizes = struct.unpack_from(f"!{count}Q", frames[0], FIXED.size)
    rest, large = frames[0][FIXED.size + 8 * count :], iter(frames[1:])
    header, rest = rest[:length], rest[length:]
    buffers = []
    for size in sizes:
        buffers.append(next(large) if size > SMALL else rest[:size])
        rest = rest if size > SMALL else rest[size:]
    return kind, header, buffers


def packed(header: Any) -> bytes:
    """As a sender packs it that keeps to no rules."""
    try:
        data: bytes = msgpack.packb(header, unicode_errors="surrogatepass")
    except (ValueError, TypeError, OverflowError):
        data = b"\xc1"
    return data


class Mutator:
    """Draws from `rng` alone."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    # Bytes

    def bytes(self, data: bytes) -> bytes:
        """Some of them altered, lost, doubled or new."""
        rng, altered = self.rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            at = rng.randrange(len(altered) + 1)
            size = rng.choice((1, 1, 2, 4, 8, 64))
            what = rng.randrange(7)
            if what == 0 and altered:
                altered[min(at, len(altered) - 1)] ^= 1 << rng.randrange(8)
            elif what == 1:
                altered[at : at + size] = rng.randbytes(size)
            elif what == 2:
                del altered[at : at + size]
            elif what == 3:
                altered[at:at] = rng.randbytes(size)
            elif what == 4:
                altered[at:at] = altered[at : at + size]
            elif what == 5:
                del altered[at:]
            else:
                filling = rng.choice((b"\xff", b"\x00", b"\x80", b"\xdd\xff\xff\xff\xff", b"\xdf"))
                altered[at : at + size] = filling * size
        return bytes(altered[: 1 << 20])

    def frames(self, frames: Frames) -> Frames:
        """Frames altered, lost, doubled, in another order, without a new checksum."""
        rng, altered = self.rng, list(frames)
        at, other = (rng.randrange(len(altered)) for _ in range(2)) if altered else (0, 0)
        what = rng.randrange(6)
        if what == 0 or not altered:
            altered.insert(at, rng.randbytes(rng.choice((0, 1, 8, 300))))
        elif what == 1:
            del altered[at]
        elif what == 2:
            altered.insert(at, altered[other])
        elif what == 3:
            altered[at], altered[other] = altered[other], altered[at]
        else:
            altered[at] = self.bytes(altered[at])
        return altered

    # Values

    def value(self, lore: Lore, depth: int = 0) -> Any:
        """Anything that a header can hold."""
        rng, what = self.rng, self.rng.randrange(20)
        if what < 6:
            return rng.choice(lore.numbers or NUMBERS)
        if what < 9:
            return rng.choice(lore.names or TEXTS)
        if what < 12:
            return rng.choice(NUMBERS)
        if what < 14:
            return rng.choice(TEXTS)
        if what < 16:
            return rng.choice(OTHERS)
        if what == 16:
            return list(range(rng.choice((2, 10, 500))))
        if what == 17:
            nest: Any = 0
            for _ in range(rng.choice((5, 100, 400))):
                nest = [nest]
            return nest
        if depth > 2:
            return []
        return [self.value(lore, depth + 1) for _ in range(rng.randrange(4))]

    def header(self, header: Any, lore: Lore) -> Any:
        """A header with some of its values replaced, its fields lost, renamed or added."""
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            header = self._altered(header, lore)
        return header

    def _altered(self, value: Any, lore: Lore) -> Any:
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.95:
            copy, key = dict(value), rng.choice(list(value))
            what = rng.randrange(12)
            if what == 0:
                del copy[key]
            elif what == 1:
                copy[rng.choice(("more", "round", "indices", "slice", "gone", 5, b"key", ""))] = self.value(lore)
            else:
                copy[key] = self._altered(copy[key], lore)
            return copy
        if isinstance(value, list) and value and rng.random() < 0.7:
            items, at, what = list(value), rng.randrange(len(value)), rng.randrange(8)
            if what == 0:
                del items[at]
            elif what == 1:
                items.insert(at, items[rng.randrange(len(items))])
            elif what == 2:
                items.append(self.value(lore))
            elif what == 3:
                items.reverse()
            else:
                items[at] = self._altered(items[at], lore)
            return items
        if type(value) is int and rng.random() < 0.4:
            return value + rng.choice((-2, -1, 1, 2, 1 << 10))
        if type(value) is str and value and rng.random() < 0.2:
            return value[: rng.randrange(len(value))] + rng.choice(("", "x", ":", "/", "\0"))
        return self.value(lore)

    # Messages

    def message(self, frames: Frames, lore: Lore) -> Frames:
        """A message that has been tampered with, mostly by somebody who can make checksums."""
        rng, what = self.rng, self.rng.randrange(20)
        if what < 3:
            return self.frames(frames)
        kind, head, buffers = opened(frames)
        header = msgpack.unpackb(head, strict_map_key=False, unicode_errors="surrogatepass")
        if what < 14:
            return sealed(kind, packed(self.header(header, lore)), buffers)
        if what < 16:
            return sealed(kind, self.bytes(head), buffers)
        if what == 16:
            return sealed(rng.choice([*Kind, 0, 99]), head, buffers)
        if what == 17:
            count = len(buffers) + rng.choice((-1, 1, 1 << 16, 0))
            return sealed(kind, head, buffers, max(0, count))
        altered = [*buffers]
        for _ in range(rng.choice((1, 2))):
            if altered and rng.random() < 0.7:
                at = rng.randrange(len(altered))
                altered[at : at + 1] = rng.choice(([], [self.bytes(altered[at])], [altered[at]] * 2, [b""]))
            else:
                altered.append(rng.randbytes(rng.choice((0, 1, 40))))
        return sealed(kind, head, altered)
