"""The flat form of an encoded value: header and buffers in one piece of memory, as they lie in mapped files."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from . import codec
from .codec import Buffer, CodecError, Encoded, bytes_view

_ALIGN = 64  # a cache line, and what numpy's fastest loops ask for
_FLAT = struct.Struct("<4sIQ")  # magic, number of buffers, size of the header; then the size of each buffer
_FLAT_MAGIC = b"qjv1"
_FIXED_ONE = _FLAT.size + 8  # what comes before the header of a value with one buffer


def _head(enc: Encoded) -> bytes:
    sizes = [buffer.nbytes for buffer in enc.buffers]
    fixed = _FLAT.pack(_FLAT_MAGIC, len(sizes), len(enc.header))
    return fixed + struct.pack(f"<{len(sizes)}Q", *sizes) + enc.header


def segments(enc: Encoded) -> list[bytes | memoryview]:
    """The flat form in pieces: joined they are what `read` takes. The buffers are there uncopied."""
    head = _head(enc)
    pieces: list[bytes | memoryview] = [head]
    end = len(head)
    for buffer in enc.buffers:
        padding = -end % _ALIGN
        if padding:
            pieces.append(bytes(padding))
        pieces.append(buffer)
        end += padding + buffer.nbytes
    return pieces


def size(enc: Encoded) -> int:
    """The bytes that the flat form of `enc` takes."""
    if len(enc.buffers) == 1:
        size = enc.buffers[0].nbytes
        return len(_heads.get((enc.header, size)) or _padded(enc)) + size
    end = _FLAT.size + 8 * len(enc.buffers) + len(enc.header)
    for buffer in enc.buffers:
        end += -end % _ALIGN + buffer.nbytes
    return end


def put(enc: Encoded, out: memoryview) -> int | None:
    """Write the flat form to the beginning of `out`, best aligned to 64 bytes, if there is room; gives the bytes that
    it takes, None where there is too little room.
    """
    if len(enc.buffers) == 1:
        (buffer,) = enc.buffers
        head = _heads.get((enc.header, buffer.nbytes)) or _padded(enc)
        start = len(head)
        end = start + buffer.nbytes
        if len(out) < end:
            return None
        out[:start] = head
        out[start:end] = buffer
        return end
    return None if len(out) < size(enc) else _write(enc, out)


def write(enc: Encoded, out: memoryview) -> int:
    """The same; CodecError where there is too little room."""
    written = put(enc, out.cast("B"))
    if written is None:
        raise CodecError(f"the flat form takes {size(enc)} bytes, and there is room for {len(out)}")
    return written


def _write(enc: Encoded, out: memoryview) -> int:
    head = _head(enc)
    end = len(head)
    out[:end] = head
    for buffer in enc.buffers:
        start = end + -end % _ALIGN
        if start > end:
            out[end:start] = bytes(start - end)
        end = start + buffer.nbytes
        out[start:end] = buffer
    return end


# What comes before the buffer of a value that has one, as most params and results do, by its header and the buffer's
# size. And the other way round: of one array of numbers what comes before it tells dtype, shape and place.
_heads: dict[tuple[bytes, int], bytes] = {}
_arrays: dict[bytes, tuple[np.dtype[Any], tuple[int, ...], int, int]] = {}
_MOST_HEADS, _LONGEST_HEAD = 1024, 1024


def _padded(enc: Encoded) -> bytes:
    head = _head(enc)
    head += bytes(-len(head) % _ALIGN)
    if len(_heads) < _MOST_HEADS and len(head) <= _LONGEST_HEAD:
        _heads[enc.header, enc.buffers[0].nbytes] = head
    return head


class Layout(NamedTuple):
    """Where the numbers of an array lie in its flat form."""

    dtype: np.dtype[Any]
    start: int  # bytes
    length: int


def head(view: memoryview) -> bytes:
    """What comes before the buffers of a flat form with one of them: of an array of numbers it tells all but these."""
    return view[: _FIXED_ONE + int.from_bytes(view[8:16], "little")].tobytes()


def layout(view: memoryview) -> Layout | None:
    """The layout of the flat form of an array of numbers as they lie in memory; None for any other value."""
    known = _arrays.get(head(view))
    if known is None:
        value = load(view, allow_pickle=False)
        if not codec.is_lone(value) or len(read(view)[1]) != 1:
            return None
        start = len(head(view)) + -len(head(view)) % _ALIGN
        return Layout(value.dtype, start, value.size)
    dtype, _, start, end = known
    return Layout(dtype, start, (end - start) // dtype.itemsize)


def load(view: memoryview, *, copy: bool = False, allow_pickle: bool = True) -> Any:
    """The value whose flat form begins at `view`, as `codec.decode` gives it."""
    first = head(view) if len(view) >= _FIXED_ONE else b""
    if first:
        known = _arrays.get(first)
        if known is not None and known[3] <= len(view):
            array: np.ndarray[Any, Any] = np.ndarray(known[1], known[0], view, known[2])
            if copy:
                return array.copy()
            array.flags.writeable = False
            return array
    header, buffers = read(view)
    value = codec.decode(header, buffers, copy=copy, allow_pickle=allow_pickle)
    if len(buffers) == 1 and codec.is_lone(value) and len(_arrays) < _MOST_HEADS and len(first) <= _LONGEST_HEAD:
        start = len(first) + -len(first) % _ALIGN
        _arrays[first] = value.dtype, value.shape, start, start + value.nbytes
    return value


def read(view: Buffer) -> tuple[memoryview, list[memoryview]]:
    """The header and the buffers for `decode`, as read-only views of `view`; bytes after the end are ignored.

    CodecError when this is not a flat form, or not the whole of one.
    """
    view = bytes_view(view)
    try:
        magic, count, header_size = _FLAT.unpack_from(view)
        if magic != _FLAT_MAGIC:
            raise CodecError(f"this is not a flat encoded value: it begins with {magic!r}")
        if count > len(view) // 8:
            raise CodecError(f"a flat encoded value of {len(view)} bytes cannot have {count} buffers")
        sizes = struct.unpack_from(f"<{count}Q", view, _FLAT.size)
    except struct.error:
        raise CodecError(f"a flat encoded value is cut short: only {len(view)} bytes are here") from None
    start = _FLAT.size + 8 * count
    end = start + header_size
    header, buffers = view[start:end], []
    for length in sizes:
        start = end + -end % _ALIGN
        end = start + length
        buffers.append(view[start:end])
    if end > len(view):
        raise CodecError(f"a flat encoded value is cut short: {len(view)} bytes of {end} are here")
    return header, buffers
