"""The flat form of an encoded value: header and buffers in one piece of memory, as they lie in mapped files."""

from __future__ import annotations

import struct

from .codec import Buffer, CodecError, Encoded, bytes_view

_ALIGN = 64  # a cache line, and what numpy's fastest loops ask for
_FLAT = struct.Struct("<4sIQ")  # magic, number of buffers, size of the header; then the size of each buffer
_FLAT_MAGIC = b"qjv1"


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
    end = _FLAT.size + 8 * len(enc.buffers) + len(enc.header)
    for buffer in enc.buffers:
        end += -end % _ALIGN + buffer.nbytes
    return end


def write(enc: Encoded, out: memoryview) -> int:
    """Write the flat form to the beginning of `out`, best aligned to 64 bytes; gives the bytes written."""
    out = out.cast("B")
    needed = size(enc)
    if len(out) < needed:
        raise CodecError(f"the flat form takes {needed} bytes, and there is room for {len(out)}")
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
