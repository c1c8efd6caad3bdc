"""A value that is one long array of numbers, as most rounds send and return: its header is remembered.

The header depends on dtype and shape alone, and so does what stands before the array in the flat form. To look them up
takes a third of the time that it takes to make or to read them.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

ALIGN = 64  # a cache line, and what numpy's fastest loops ask for
FLAT_MAGIC = b"qjv1"
_ONE_BUFFER = struct.Struct("<4sIQQ")  # magic, number of buffers, sizes of the header and of the buffer

DTYPES = {id(np.dtype(char)) for char in "?bBhHiIlLqQefd"}  # whose memory a memoryview can show as bytes
_MAX_ARRAYS, _MAX_HEADER = 1024, 1024  # how many, and bytes of a header


class LoneArray(NamedTuple):
    """What all arrays of one dtype and shape have in common."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int
    head: bytes  # what stands before the array in the flat form, with the padding
    start: int  # bytes of the flat form: where the array begins, and where it ends
    end: int


by_header: dict[bytes, LoneArray] = {}
by_head: dict[bytes, LoneArray] = {}  # without the padding
headers: dict[tuple[int, tuple[int, ...]], bytes] = {}  # by id(dtype) and shape


def is_lone(value: Any) -> bool:
    """Whether it is an array of numbers as they lie in memory, of which dtype and shape tell all."""
    return type(value) is np.ndarray and id(value.dtype) in DTYPES and bool(value.flags.c_contiguous)


def remember(header: bytes, array: np.ndarray[Any, Any], *, made_here: bool = False) -> None:
    """Read this header as that of such an array; if it was made here, also write it for all of them."""
    if len(header) > _MAX_HEADER:
        return
    if len(by_header) >= _MAX_ARRAYS:
        for known in (by_header, by_head, headers):
            known.clear()
    head = flat_head(header, array.nbytes)
    filled = padded(head)
    start, end = len(filled), len(filled) + array.nbytes
    lone = LoneArray(array.dtype, array.shape, array.nbytes, filled, start, end)
    by_header[header] = by_head[head] = lone
    if made_here:
        headers[id(array.dtype), array.shape] = header


def flat_head(header: bytes, nbytes: int) -> bytes:
    """What stands before the buffer in the flat form of a value that has one, but for the padding."""
    return _ONE_BUFFER.pack(FLAT_MAGIC, 1, len(header), nbytes) + header


def padded(head: bytes) -> bytes:
    """What stands before the buffer, with the padding."""
    return head + bytes(-len(head) % ALIGN)
