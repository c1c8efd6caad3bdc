"""The flat form of an encoded value: header and buffers in one piece of memory, as they lie in mapped files."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from . import decoder, lone_arrays
from .header import Buffer, CodecError, Encoded, bytes_view
from .lone_arrays import ALIGN, FLAT_MAGIC, flat_head, padded

_FLAT = struct.Struct("<4sIQ")  # magic, number of buffers, size of the header; then the size of each buffer
_FIXED_ONE = _FLAT.size + 8  # what comes before the header of a value with one buffer


def _head(enc: Encoded) -> bytes:
    sizes = [buffer.nbytes for buffer in enc.buffers]
    fixed = _FLAT.pack(FLAT_MAGIC, len(sizes), len(enc.header))
    return fixed + struct.pack(f"<{len(sizes)}Q", *sizes) + enc.header


def pieces(enc: Encoded) -> list[bytes | memoryview]:
    """The flat form in pieces: joined they are what `read` takes. The buffers are there uncopied."""
    head = _head(enc)
    found: list[bytes | memoryview] = [head]
    end = len(head)
    for buffer in enc.buffers:
        padding = -end % ALIGN
        if padding:
            found.append(bytes(padding))
        found.append(buffer)
        end += padding + buffer.nbytes
    return found


def size(enc: Encoded) -> int:
    """The bytes that the flat form of `enc` takes."""
    end = _FLAT.size + 8 * len(enc.buffers) + len(enc.header)
    for buffer in enc.buffers:
        end += -end % ALIGN + buffer.nbytes
    return end


def put(enc: Encoded, out: memoryview) -> int | None:
    """Write the flat form to the beginning of `out`, best aligned to 64 bytes, if there is room; gives the bytes that
    it takes, None where there is too little room.
    """
    if len(enc.buffers) == 1:
        (buffer,) = enc.buffers
        lone = lone_arrays.by_header.get(enc.header)
        if lone is not None and lone.nbytes == buffer.nbytes:
            head = lone.head
        else:
            head = padded(flat_head(enc.header, buffer.nbytes))
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
        start = end + -end % ALIGN
        if start > end:
            out[end:start] = bytes(start - end)
        end = start + buffer.nbytes
        out[start:end] = buffer
    return end


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
    before = head(view)
    known = lone_arrays.by_head.get(before)
    if known is None:
        value = load(view, allow_pickle=False)
        if not lone_arrays.is_lone(value) or len(read(view)[1]) != 1:
            return None
        return Layout(value.dtype, len(padded(before)), value.size)
    return Layout(known.dtype, known.start, known.nbytes // known.dtype.itemsize)


def load(view: memoryview, *, copy: bool = False, allow_pickle: bool = True) -> Any:
    """The value whose flat form begins at `view`, as `codec.decode` gives it."""
    known = lone_arrays.by_head.get(head(view)) if len(view) >= _FIXED_ONE else None
    if known is not None and known.end <= len(view):
        array: np.ndarray[Any, Any] = np.ndarray(known.shape, known.dtype, view, known.start)
        if copy:
            return array.copy()
        array.flags.writeable = False
        return array
    header, buffers = read(view)  # decode remembers the header of a lone array
    return decoder.decode(header, buffers, copy=copy, allow_pickle=allow_pickle)


def read(view: Buffer) -> tuple[memoryview, list[memoryview]]:
    """The header and the buffers for `decode`, as read-only views of `view`; bytes after the end are ignored.

    CodecError when this is not a flat form, or not the whole of one.
    """
    view = bytes_view(view)
    try:
        magic, count, header_size = _FLAT.unpack_from(view)
        if magic != FLAT_MAGIC:
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
        start = end + -end % ALIGN
        end = start + length
        buffers.append(view[start:end])
    if end > len(view):
        raise CodecError(f"a flat encoded value is cut short: {len(view)} bytes of {end} are here")
    return header, buffers
