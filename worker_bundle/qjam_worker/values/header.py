"""What encoder and decoder agree on: the parts of a header and the codes of its ext types.

The header of an encoded value is

    crc32 of the rest, flags, number of buffers, two sizes | pickle, where its buffers are | tree
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Union

import numpy as np

Buffer = Union[bytes, bytearray, memoryview]


class CodecError(ValueError):
    """A value that cannot be encoded, or bytes that were never a whole encoded value."""


class Encoded(NamedTuple):
    """An encoded value: its header, and what is too long for the header as one-dimensional views of bytes.

    The views are of the user's own memory where an array is contiguous. `plain`: decoding runs no pickle.
    """

    header: bytes
    buffers: list[memoryview]
    plain: bool


PREFIX = struct.Struct("<BIQQ")  # flags, number of buffers, sizes of the pickle and of its places
CRC = struct.Struct("<I")
BODY = CRC.size + PREFIX.size  # where the pickle begins, or the tree
TAGGED, PICKLED = 1, 2  # flags: the tree has marks; there is a pickle part

# Codes of the ext types. The first four are marks; the last five have a payload of numpy_payload: arrays in C's order
# and transposed ones in Fortran's, each with its bytes inside or in a buffer.
TUPLE, SET, FROZENSET, DICT, INT, COMPLEX, BYTES, STR, OBJECT = range(9)
SCALAR, ARRAY, FORTRAN, BUFFER_ARRAY, BUFFER_FORTRAN = range(9, 14)

NATIVE = frozenset([type(None), bool, int, float, str])  # msgpack carries these as they are
INDEX = struct.Struct("<I")
BUFFER = struct.Struct("<BIQ")  # which of BYTE_TYPES; 1 + index of the buffer, or 0: the bytes follow; size
BYTE_TYPES = [bytes, bytearray, np.bytes_]
COMPLEX_PARTS = struct.Struct("<dd")


def bytes_view(buffer: Buffer) -> memoryview:
    """A read-only view of the bytes of a buffer."""
    view = memoryview(buffer)
    if view.ndim != 1 or view.format != "B":
        view = view.cast("B")
    return view.toreadonly()
