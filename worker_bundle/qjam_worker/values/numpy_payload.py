"""Numpy arrays and scalars as msgpack-numpy encodes them: the payload of our ext types for them, and nothing else.

Only an ext type leads to `unpack`, so a user's own dict with msgpack-numpy's keys stays a dict. msgpack-numpy pickles
arrays of objects: `pack` leaves those to the codec's own pickle, and `unpack` never tells msgpack-numpy of a kind, so
it never opens one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np

from .header import CodecError

BUILTIN = [np.dtype(char) for char in "?bBhHiIlLqQefdgFDG"]
_IDS = frozenset(map(id, BUILTIN))  # numpy has one object for each of these

# All of a payload but the bytes of the values, remembered: msgpack-numpy takes 3 us to make it and 4 us to read it.
_heads: dict[Any, bytes] = {}
_known: dict[bytes, tuple[np.dtype[Any], tuple[int, ...], int, int]] = {}  # the last: bytes, and index of a buffer
_MAX_HEADS, _MAX_HEAD = 1024, 1024  # how many, and bytes of one

_DATA: bytes = msgpack.packb(b"data")  # the last key of msgpack-numpy's dict; the bytes of the values follow
_DATA_SIZE = len(_DATA)
_MAX_BIN8 = 2 + 255  # msgpack writes so many bytes at most for those of the values where their number takes one byte


def pack(value: np.ndarray[Any, Any] | np.generic, index: int | None = None) -> bytes | None:
    """The payload for a scalar or an array in C's order; with the index of a buffer, that stands for the bytes.

    None for what only pickle can carry: a dtype of objects, without a size, with metadata, of another package.
    """
    dtype = value.dtype
    name: Any = id(dtype)
    if name not in _IDS:
        # The names of fields can be changed in place, so a dtype with fields is described anew each time.
        name = (dtype.str, dtype.char, dtype.type) if dtype.fields is None and not dtype.metadata else None
    key = name, type(value), value.shape, index
    head = _heads.get(key)
    if head is not None:
        return head + value.tobytes() if index is None else head
    encoding = _encoding(value)
    if encoding is None:
        return None
    if index is not None:
        encoding[b"data"] = index
    payload: bytes = msgpack.packb(encoding, unicode_errors="surrogatepass")
    if name is not None:
        head = payload[: len(payload) - value.nbytes] if index is None else payload
        _remember(_heads, key, head)
    return payload


def unpack(payload: bytes, buffers: Sequence[memoryview] | None = None) -> Any:
    """The read-only array or scalar of a payload; with `buffers`, its bytes are one of them.

    CodecError, or what msgpack and numpy raise, when the payload is not one.
    """
    start = len(payload)
    if buffers is None:
        start = payload.find(_DATA) + _DATA_SIZE
        start += 2 if len(payload) - start <= _MAX_BIN8 else 3
    head = payload[:start]
    known = _known.get(head)
    if known is None:
        return _unpack(payload, head, buffers)
    dtype, shape, size, index = known
    content = payload[start:] if buffers is None else buffers[index]
    if len(content) != size:
        raise CodecError(f"{dtype} of shape {shape} has {len(content)} bytes")
    return np.ndarray(shape, dtype, content)


def _unpack(payload: bytes, head: bytes, buffers: Sequence[memoryview] | None) -> Any:
    encoding = msgpack.unpackb(payload, use_list=False, unicode_errors="surrogatepass")
    if encoding.get(b"kind", b"") != b"":
        raise CodecError(f"an array is of kind {encoding[b'kind']!r}, which is not opened here")
    dtype, shape, data = _dtype(encoding[b"type"]), encoding.get(b"shape", ()), encoding[b"data"]
    content, index = (data, 0) if buffers is None else (buffers[data], data)
    value = msgpack_numpy.decode({b"nd": encoding[b"nd"], b"type": dtype, b"shape": shape, b"data": content})
    if value.nbytes != len(content):
        raise CodecError(f"{dtype} of shape {shape} has {len(content)} bytes")
    if dtype.fields is None and (buffers is not None or payload[len(head) :] == content):
        _remember(_known, head, (dtype, value.shape, value.nbytes, index))
    return value


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _MAX_HEADS:
        cache.clear()
    if len(value if cache is _heads else key) <= _MAX_HEAD:
        cache[key] = value


def _encoding(value: Any) -> dict[bytes, Any] | None:
    """msgpack-numpy's encoding of it; of a dtype that msgpack-numpy does not keep, that of its bare bytes, with a
    dtype which np.dtype() does keep in place of theirs: fields (padding, titles, alignment), void, times, long long.
    """
    dtype = value.dtype
    description = _describe(dtype)
    if description is None:
        return None
    if dtype.kind in "biufcSU" and description == dtype.str:
        encoding: dict[bytes, Any] = msgpack_numpy.encode(value)
        return encoding
    if dtype.fields is not None:
        same = np.dtype(description)
        if same != dtype or _describe(same) != description:
            return None
    array = np.asarray(value)  # of a scalar too: it goes as an array without dimensions
    return {**msgpack_numpy.encode(array.reshape(-1).view(np.uint8)), b"type": description, b"shape": array.shape}


def _describe(dtype: np.dtype[Any]) -> Any:
    """What np.dtype() makes the same dtype of: a name, (base, shape) or a dict of fields; or None."""
    if dtype.hasobject or not dtype.itemsize or dtype.metadata:
        return None
    if dtype.subdtype is not None:
        base = _describe(dtype.subdtype[0])
        return base and (base, dtype.subdtype[1])
    if dtype.fields is None:
        # The second form is for 'q', which equals 'l' on Linux and has the same str, but scalars of another type.
        return next((name for name in (dtype.str, dtype.byteorder + dtype.char) if _is_named(dtype, name)), None)
    names = dtype.names or ()
    fields = [dtype.fields[name] for name in names]
    formats = tuple([_describe(field[0]) for field in fields])
    titles = tuple([field[2] if len(field) > 2 else None for field in fields])
    if dtype.type is not np.void or None in formats or not all(type(t) in (str, type(None)) for t in titles):
        return None
    return {
        "names": names,
        "formats": formats,
        "offsets": tuple([field[1] for field in fields]),
        "titles": titles,
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    }


def _is_named(dtype: np.dtype[Any], name: str) -> bool:
    try:
        same = np.dtype(name)
    except TypeError:  # a dtype that some other package registered
        return False
    return same == dtype and same.char == dtype.char and same.type is dtype.type


def _dtype(description: Any) -> np.dtype[Any]:
    if type(description) not in (str, dict) or "," in description:  # of a text, numpy would parse a list of fields
        raise CodecError(f"{description!r} is not the description of a dtype")
    dtype: np.dtype[Any] = np.dtype(description)
    if dtype.hasobject or not dtype.itemsize:
        raise CodecError(f"dtype {dtype} cannot be read from bytes")
    return dtype
