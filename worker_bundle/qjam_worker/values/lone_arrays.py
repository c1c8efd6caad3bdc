"""A value that is one long array of numbers, as most rounds send and return: its header is remembered.

The header depends on dtype and shape alone, and so does what stands before the array in the flat form. To look them up
takes a third of the time that it takes to make or to read them.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

ALIGN = 64  # a cache line, and what numpy's fastest loops ask for
FLAT = struct.Struct("<4sIQ")  # magic, number of buffers, size of the header; then the size of each buffer
FLAT_MAGIC = b"qjv1"

_DTYPES = {id(np.dtype(char)) for char in "?bBhHiIlLqQefd"}  # whose memory a memoryview can show as bytes
_MAX_ARRAYS, _MAX_HEADER = 1024, 1024  # how many, and bytes of a header


class LoneArray(NamedTuple):
    """What all arrays of one dtype and shape have in common."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int
    header: bytes  # with the array's memory as its only buffer
    head: bytes  # what stands before that buffer in the flat form, with the padding

    @property
    def end(self) -> int:
        """The bytes that the flat form takes."""
        return len(self.head) + self.nbytes


by_header: dict[bytes, LoneArray] = {}
by_head: dict[bytes, LoneArray] = {}  # without the padding
_by_array: dict[tuple[int, tuple[int, ...]], LoneArray] = {}


def is_lone(value: Any) -> bool:
    """Whether it is an array of numbers as they lie in memory, of which dtype and shape tell all."""
    return type(value) is np.ndarray and id(value.dtype) in _DTYPES and bool(value.flags.c_contiguous)


def find(array: np.ndarray[Any, Any]) -> LoneArray | None:
    """What is known of such arrays."""
    return _by_array.get((id(array.dtype), array.shape))


def remember(header: bytes, array: np.ndarray[Any, Any], *, made_here: bool = False) -> None:
    """Read this header as that of such an array; if it was made here, also write it for all of them."""
    if len(header) > _MAX_HEADER:
        return
    if len(by_header) >= _MAX_ARRAYS:
        for known in (by_header, by_head, _by_array):
            known.clear()
    head = flat_head(header, [array.nbytes])
    lone = LoneArray(array.dtype, array.shape, array.nbytes, header, head + bytes(-len(head) % ALIGN))
    by_header[header] = by_head[head] = lone
    if made_here:
        _by_array[id(array.dtype), array.shape] = lone


def flat_head(header: bytes, sizes: list[int]) -> bytes:
    """The beginning of the flat form of a value with this header and with buffers of these sizes."""
    return FLAT.pack(FLAT_MAGIC, len(sizes), len(header)) + struct.pack(f"<{len(sizes)}Q", *sizes) + header
