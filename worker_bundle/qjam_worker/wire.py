"""Messages to frames and back: the only definition of what crosses the wire, without a socket in sight.

A message is a list of frames::

    [fixed part] [msgpack header] [buffer]*

The fixed part is ``magic, version, kind, number of buffers, crc32``. The crc covers the fixed part, the
header and the length of every buffer: a message with a frame lost, cut or added, or with its header altered,
is refused. It does not cover what is in a buffer (so two of one length may change places unseen): those are
megabytes that TCP or CURVE has checked already, and refs carry a content hash.
"""

from __future__ import annotations

import enum
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import msgpack

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = 1
MAX_HEADER = 64 << 20  # bytes; bulk data travels in buffers, so a longer header is a bug or an attack
MAX_BUFFERS = 65536

Buffer = Union[bytes, bytearray, memoryview]

_MAGIC = b"qjam"
_START = struct.Struct("!4sB")  # magic, version: these five bytes stay where they are in every future version
_FIXED = struct.Struct("!4sBBI")  # magic, version, kind, number of buffers
_CRC = struct.Struct("!I")
_FIXED_SIZE = _FIXED.size + _CRC.size


class WireError(ValueError):
    """Frames that are not a message of this protocol version, or a header that cannot be one."""


class Kind(enum.IntEnum):
    """What a message is; the number is what stands on the wire."""

    HELLO = 1
    WELCOME = 2
    JOB = 3
    TASK = 4
    STATE = 5
    REFS = 6
    CREDIT = 7
    RESULT = 8
    ERROR = 9
    CANCEL = 10
    LOG = 11
    PING = 12
    PONG = 13
    BYE = 14


class Message(NamedTuple):
    """One message: its kind, its header (str keys; tuples arrive as lists) and its buffers, untouched."""

    kind: Kind
    header: dict[str, Any]
    buffers: list[Buffer]


# The fields that a header must have, and their types. More fields may be there, and are kept.
REQUIRED: dict[Kind, dict[str, type | tuple[type, ...]]] = {
    Kind.HELLO: {
        "version": str, "python": str, "pid": int, "host": str, "cores": int, "memory": int,
        "workers": list, "held": list,
    },
    Kind.WELCOME: {"node": str},
    Kind.JOB: {"job": int, "entry": dict, "slices": list, "nslices": int},
    Kind.TASK: {"job": int, "round": int, "indices": list},
    Kind.STATE: {"state": str},
    Kind.REFS: {"ref": str, "offset": int, "total": int},
    Kind.CREDIT: {"bytes": int},
    Kind.RESULT: {"round": int, "roots": list},
    Kind.ERROR: {"round": int, "what": str, "text": str},
    Kind.CANCEL: {"round": int},
    Kind.LOG: {"worker": int, "stream": int},
    Kind.PING: {"t": (float, int)},
    Kind.PONG: {"t": (float, int)},
    Kind.BYE: {"reason": str},
}  # fmt: skip


def _types(allowed: type | tuple[type, ...]) -> frozenset[type]:
    """Exact types (True is not an int here); a sender may give a tuple where the receiver finds a list."""
    types = allowed if isinstance(allowed, tuple) else (allowed,)
    return frozenset(types + ((tuple,) if list in types else ()))


_FIELDS = {kind: [(name, _types(t)) for name, t in fields.items()] for kind, fields in REQUIRED.items()}
_KINDS = {int(kind): kind for kind in Kind}

# surrogatepass: file names and tracebacks may hold lone surrogates, and an error report must get through.
_packers: list[Any] = []  # idle ones; taken and given back whole, so that threads never share one


def _pack_header(header: dict[str, Any]) -> bytes:
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer(unicode_errors="surrogatepass")
    data: bytes = packer.pack(header)
    if len(data) < 1 << 16:
        _packers.append(packer)
    return data


def _check(kind: Kind, header: Any) -> None:
    """WireError unless `header` is a dict with str keys that has the fields that `kind` requires."""
    if type(header) is not dict:
        raise WireError(f"the header of {kind.name} is a {type(header).__name__}, it must be a dict")
    for name, types in _FIELDS[kind]:
        try:
            value = header[name]
        except KeyError:
            raise WireError(f"the header of {kind.name} lacks {name!r}; it has {list(header)}") from None
        if type(value) not in types:
            wanted = " or ".join(sorted(t.__name__ for t in types))
            raise WireError(f"{name!r} of {kind.name} is a {type(value).__name__}, it must be {wanted}")
    for key in header:
        if type(key) is not str:
            raise WireError(f"the header of {kind.name} has the key {key!r}: keys must be str")


def _seal(fixed: Buffer, header: Buffer, sizes: list[int]) -> bytes:
    crc = zlib.crc32(header, zlib.crc32(fixed))
    if sizes:
        crc = zlib.crc32(struct.pack(f"!{len(sizes)}Q", *sizes), crc)
    return _CRC.pack(crc)


def _size(buffer: Buffer) -> int:
    return len(buffer) if type(buffer) is bytes else memoryview(buffer).nbytes


def pack(kind: Kind, header: dict[str, Any] | None = None, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """The frames of a message: two small ones, then `buffers` themselves, not copied.

    `header` holds what msgpack can carry (None, bool, 64-bit int, float, str, bytes, list, dict) and has the
    fields that REQUIRED names. WireError when it has not, or when a limit is passed: `unpack` takes what this
    gives.
    """
    header = {} if header is None else header
    _check(kind, header)
    try:
        packed = _pack_header(header)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"the header of {kind.name} cannot be packed: {error}") from error
    if len(packed) > MAX_HEADER:
        raise WireError(f"the header of {kind.name} has {len(packed)} bytes; the limit is {MAX_HEADER}")
    if len(buffers) > MAX_BUFFERS:
        raise WireError(f"{kind.name} has {len(buffers)} buffers; the limit is {MAX_BUFFERS}")
    fixed = _FIXED.pack(_MAGIC, VERSION, kind, len(buffers))
    seal = _seal(fixed, packed, [_size(buffer) for buffer in buffers])
    return [fixed + seal, packed, *buffers]


def unpack(frames: Sequence[Buffer]) -> Message:
    """The message in `frames`, its buffers as they came. WireError, and nothing else, when there is none."""
    if len(frames) < 2:
        raise WireError(f"{len(frames)} frames: a message has a fixed part and a header at least")
    try:
        first, packed = bytes(memoryview(frames[0])[: _FIXED_SIZE + 1]), frames[1]
        sizes = [_size(frame) for frame in frames[2:]]
        header_size = _size(packed)
    except TypeError as error:
        raise WireError(f"a frame is not bytes: {error}") from None
    kind = _open(first, len(sizes))
    if header_size > MAX_HEADER:
        raise WireError(f"the header of {kind.name} has {header_size} bytes; the limit is {MAX_HEADER}")
    if _seal(first[: _FIXED.size], packed, sizes) != first[_FIXED.size :]:
        raise WireError(f"{kind.name} has a wrong checksum: frames were altered, cut or swapped on the way")
    try:
        header = msgpack.unpackb(packed, strict_map_key=False, unicode_errors="surrogatepass")
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: an unhashable map key
        raise WireError(f"the header of {kind.name} cannot be read: {type(error).__name__} {error}") from None
    _check(kind, header)
    return Message(kind, header, list(frames[2:]))


def _open(first: bytes, count: int) -> Kind:
    """The kind that the fixed part tells, once its magic, version, size and number of buffers are right."""
    if len(first) < _START.size or first[:4] != _MAGIC:
        raise WireError(f"these frames are not a qjam message: they begin with {first[:8]!r}")
    if first[4] != VERSION:
        raise WireError(
            f"the other side speaks wire version {first[4]}, this side {VERSION}: "
            "install the same qjam version on both, or let the master copy its own over"
        )
    if len(first) != _FIXED_SIZE:
        raise WireError(f"the fixed part does not have {_FIXED_SIZE} bytes")
    _, _, number, promised = _FIXED.unpack_from(first)
    if number not in _KINDS:
        raise WireError(f"there is no message kind {number}")
    if promised > MAX_BUFFERS:
        raise WireError(f"{promised} buffers are promised; the limit is {MAX_BUFFERS}")
    if promised != count:
        raise WireError(f"{promised} buffers were sent and {count} arrived")
    return _KINDS[number]
