"""What user code computes in a simulated cluster, how long it takes, and what it does instead of answering."""

from __future__ import annotations

import operator
from decimal import Decimal
from typing import Any

import numpy as np

from qjam_worker.values import codec, flat
from qjam_worker.values.reduction import default_reduce

KINDS = ("float", "array", "nest", "decimal", "large", "text", "list")
# Results above this many bytes are large: kept in files, folded by workers. (In reality 256 KiB.)
SMALL = 256
LARGE = 2048  # bytes: more than what lies in the header of an encoded value

MASK = (1 << 32) - 1


def noise(*key: int) -> float:
    """A number in [0, 1) that depends on the key alone: what one part of a world draws does not disturb another."""
    return (hash(key) & MASK) / 4294967296.0


def mapped(kind: str, number: int, index: int) -> Any:
    """What mapfunc gives for a slice in a round: of widely different magnitudes, so that no two orders of adding them
    up, and no double counting, give the same bits.
    """
    if kind == "text":
        return f"{number}:{index}"
    if kind == "list":  # of a job that collects
        return [(number, index)]
    value = (noise(number, index, 1) - 0.5) * 10.0 ** int(noise(number, index, 2) * 24 - 12)
    if kind == "float":
        return value
    if kind == "array":
        return np.array([value, value / 3.0, -value * 7.0])
    if kind == "nest":
        return (value, [value / 7.0, np.float64(-value)])
    if kind == "decimal":  # travels as a pickle, which a node never opens
        return Decimal(value) / 3
    return np.linspace(value, value / 3.0, LARGE // 8)


def joined(left: str, right: str) -> str:
    """A `reduce` of the user's that is neither commutative nor associative."""
    return f"({left} {right})"


def reduce_of(kind: str) -> Any:
    return {"text": joined, "list": operator.concat}.get(kind, default_reduce)


def serial(kind: str, number: int, nslices: int) -> Any:
    """The result by the book, level by level: pairs, then pairs of pairs, an odd one moves up."""
    level = [mapped(kind, number, index) for index in range(nslices)]
    reduce = reduce_of(kind)
    while len(level) > 1:
        pairs = [reduce(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0]


def packed(value: Any) -> tuple[bytes, bool]:
    """The flat bytes of a value, and whether they are without pickles."""
    encoded = codec.encode(value)
    return b"".join(flat.pieces(encoded)), encoded.plain


def unpacked(data: Any) -> Any:
    """The value in flat bytes."""
    return codec.decode(*flat.read(data), copy=True)
