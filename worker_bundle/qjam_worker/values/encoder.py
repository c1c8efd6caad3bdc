"""Values to a header and buffers."""

from __future__ import annotations

import functools
import pickle
import struct
import sys
import zlib
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from . import lone_arrays, numpy_payload, pickles
from .header import (
    ARRAY,
    BUFFER,
    BUFFER_ARRAY,
    BUFFER_FORTRAN,
    BYTE_TYPES,
    BYTES,
    COMPLEX,
    COMPLEX_PARTS,
    CRC,
    FORTRAN,
    INDEX,
    INT,
    NATIVE,
    OBJECT,
    PICKLED,
    PREFIX,
    SCALAR,
    STR,
    TAGGED,
    Buffer,
    CodecError,
    Encoded,
)

if TYPE_CHECKING:
    from collections.abc import Collection

_ext = functools.partial(tuple.__new__, msgpack.ExtType)  # ExtType() itself checks, for 0.4 us each time
_MARK_TUPLE, _MARK_SET, _MARK_FROZENSET, _MARK_DICT = (_ext((code, b"")) for code in range(4))
_MAX_BUFFERS = 1024
_MAX_DEPTH = 100  # deeper values are pickled: a level takes three of the 1,000 frames that python allows
_MAX_REPEATED = 1 << 20  # elements in lists met again, before pickle takes the value, which writes each once


class _UnfitError(Exception):
    """This value is for pickle: a cycle, too deep, or the same lists over and over."""


_packers: list[Any] = []  # idle ones; taken and given back whole, so that threads never share one


def _pack(tree: Any) -> bytes:
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer()
    try:
        data: bytes = packer.pack(tree)
    except UnicodeEncodeError:  # lone surrogates; allowing them from the start makes every str slower
        data = msgpack.packb(tree, unicode_errors="surrogatepass")
    except ValueError as error:  # one str or list has more than 2**32 bytes or items
        raise _UnfitError from error
    if len(data) < 1 << 16:
        _packers.append(packer)
    return data


def encode(value: Any, *, inline: int = 1024, lasting: bool = False, classes: Collection[type] = ()) -> Encoded:
    """`value` as a header and buffers; arrays and bytes of more than `inline` bytes become buffers.

    An array that is contiguous and longer than `inline` is not copied: do not change it before it is sent. `lasting`:
    the value has the same bytes again as long as it is the same, whatever becomes of the classes that it is made of.
    `classes`: those that the other end shall have as they are now, beside those that the value is made of.
    CodecError when the value holds something that cannot be pickled, or is nested too deeply even for pickle.
    """
    if classes:
        encoder = _Encoder(inline)
        encoder.objects += classes
        return encoder.run_pickled(value)
    if type(value) is np.ndarray and id(value.dtype) in lone_arrays.DTYPES and value.nbytes > inline:
        return _encode_lone(value)
    encoded = _encode(value, inline, lasting)
    # A message has only so many frames; beyond, one long header is faster anyway.
    return encoded if len(encoded.buffers) <= _MAX_BUFFERS else _encode(value, sys.maxsize, lasting)


def _encode(value: Any, inline: int, lasting: bool) -> Encoded:
    try:
        return _Encoder(inline, lasting=lasting).run(value)
    except OverflowError:  # an int of more than 64 bits somewhere: rare enough to start again
        pass
    except (_UnfitError, RecursionError):
        return _Encoder(inline, lasting=lasting).run_pickled(value)
    try:
        return _Encoder(inline, big_ints=True, lasting=lasting).run(value)
    except (_UnfitError, RecursionError):
        return _Encoder(inline, lasting=lasting).run_pickled(value)


def _encode_lone(value: np.ndarray[Any, Any]) -> Encoded:
    header = lone_arrays.headers.get((id(value.dtype), value.shape))
    if header is None or not value.flags.c_contiguous:
        encoded = _Encoder(1).run(value)
        if lone_arrays.is_lone(value):
            lone_arrays.remember(encoded.header, value, made_here=True)
        return encoded
    return Encoded(header, [value.data.cast("B")], True)


class _Encoder:
    """Lowers one value, gathering what leaves the tree on the way: buffers, and objects for pickle."""

    __slots__ = ("big_ints", "buffers", "flags", "inline", "lasting", "objects", "plain", "repeated", "seen")

    def __init__(self, inline: int, big_ints: bool = False, lasting: bool = False) -> None:
        self.inline = inline
        self.big_ints = big_ints
        self.lasting = lasting
        self.buffers: list[memoryview] = []
        self.objects: list[Any] = []
        self.flags = 0
        self.plain = True
        self.seen: dict[int, Any] = {}  # id of a container -> None, of what became a buffer -> its ext type
        self.repeated = 0

    def run(self, value: Any) -> Encoded:
        return self.finish(self.lower(value, 0))

    def run_pickled(self, value: Any) -> Encoded:
        return self.finish(self.lower_object(value))

    def finish(self, tree: Any) -> Encoded:
        parts = [_pack(tree)]
        sizes = (0, 0)
        if self.objects:
            self.flags |= PICKLED
            self.plain = False
            data, raw = _pickled(self.objects, self.lasting)
            places = _pack([self._place(view) for view in raw])
            parts = [data, places, *parts]
            sizes = (len(data), len(places))
        prefix = PREFIX.pack(self.flags, len(self.buffers), *sizes)
        crc = zlib.crc32(prefix)
        for part in parts:
            crc = zlib.crc32(part, crc)
        return Encoded(b"".join((CRC.pack(crc), prefix, *parts)), self.buffers, self.plain)

    def _place(self, view: memoryview) -> Any:
        """What stands for an out-of-band buffer: [index, size] of one of ours, or its bytes if few."""
        if view.nbytes <= self.inline:
            return bytes(view)
        self.buffers.append(view)
        return [len(self.buffers) - 1, view.nbytes]

    def lower(self, value: Any, depth: int) -> Any:
        lowering = _LOWERINGS.get(type(value))
        if lowering is None:
            return value if type(value) in NATIVE else self.lower_object(value)
        return lowering(self, value, depth)

    def lower_object(self, value: Any) -> Any:
        self.objects.append(value)
        return _ext((OBJECT, INDEX.pack(len(self.objects) - 1)))

    def lower_int(self, value: int, _depth: int) -> Any:
        if -0x8000000000000000 <= value <= 0xFFFFFFFFFFFFFFFF:
            return value
        return _ext((INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)))

    def lower_complex(self, value: complex, _depth: int) -> Any:
        return _ext((COMPLEX, COMPLEX_PARTS.pack(value.real, value.imag)))

    def lower_bytes(self, value: Buffer, _depth: int) -> Any:
        kind = BYTE_TYPES.index(type(value))
        size = len(value)
        if size <= self.inline:
            return value if kind == 0 else _ext((BYTES, BUFFER.pack(kind, 0, size) + value))
        ext = self.seen.get(id(value))
        if ext is None:
            # A bytearray is copied: a view of it would keep the user from resizing it.
            self.buffers.append(memoryview(bytes(value)))
            ext = self.seen[id(value)] = _ext((BYTES, BUFFER.pack(kind, len(self.buffers), size)))
        return ext

    def _enter(self, value: Collection[Any], depth: int) -> None:
        """Turn to pickle for a cycle, and for a value that would be written far larger than it is."""
        if depth > _MAX_DEPTH:
            raise _UnfitError
        if id(value) in self.seen:
            self.repeated += len(value) + 1
            if self.repeated > _MAX_REPEATED:
                raise _UnfitError
        else:
            self.seen[id(value)] = None

    def _native(self, values: Any) -> bool:
        return NATIVE.issuperset(map(type, values)) and not (self.big_ints and int in map(type, values))

    def lower_list(self, value: list[Any], depth: int) -> Any:
        self._enter(value, depth)
        return value if self._native(value) else [self.lower(item, depth + 1) for item in value]

    def lower_tuple(self, value: tuple[Any, ...], depth: int) -> Any:
        self._enter(value, depth)
        self.flags |= TAGGED
        if self._native(value):
            return [_MARK_TUPLE, *value]
        return [_MARK_TUPLE, *[self.lower(item, depth + 1) for item in value]]

    def lower_dict(self, value: dict[Any, Any], depth: int) -> Any:
        self._enter(value, depth)
        if self._native(value):
            if self._native(value.values()):
                return value
            return {key: self.lower(item, depth + 1) for key, item in value.items()}
        self.flags |= TAGGED
        flat: list[Any] = [_MARK_DICT]
        for key, item in value.items():
            flat += self.lower(key, depth + 1), self.lower(item, depth + 1)
        return flat

    def lower_set(self, value: Any, depth: int) -> Any:
        self._enter(value, depth)
        self.flags |= TAGGED
        mark = _MARK_SET if type(value) is set else _MARK_FROZENSET
        if len(set(map(type, value))) < 2 and self._native(value):
            return [mark, *_in_order(value)]
        return [mark, *sorted(self._apart(item, depth + 1) for item in value)]

    def _apart(self, item: Any, depth: int) -> bytes:
        """The element of a set encoded on its own, to have bytes to sort by."""
        encoder = _Encoder(sys.maxsize, big_ints=True, lasting=self.lasting)
        encoder.seen, encoder.repeated = self.seen, self.repeated
        header, _, plain = encoder.finish(encoder.lower(item, depth))
        self.repeated = encoder.repeated
        self.plain &= plain
        return header

    def lower_scalar(self, value: np.generic, _depth: int) -> Any:
        payload = numpy_payload.pack(value)
        return self.lower_object(value) if payload is None else _ext((SCALAR, payload))

    def lower_numpy_str(self, value: np.str_, _depth: int) -> Any:
        return _ext((STR, value.encode("utf-8", "surrogatepass")))

    def lower_array(self, array: np.ndarray[Any, Any], _depth: int) -> Any:
        contiguous = array.flags.c_contiguous
        fortran = not contiguous and array.flags.f_contiguous
        in_order = array.T if fortran else array
        if array.nbytes <= self.inline:
            payload = numpy_payload.pack(in_order)
            return self.lower_object(array) if payload is None else _ext((FORTRAN if fortran else ARRAY, payload))
        ext = self.seen.get(id(array))
        if ext is None:
            if not contiguous and not fortran:
                in_order = np.ascontiguousarray(array)
            payload = numpy_payload.pack(in_order, len(self.buffers))
            if payload is None:
                return self.lower_object(array)
            self.buffers.append(in_order.reshape(-1).view(np.uint8).data)
            ext = self.seen[id(array)] = _ext((BUFFER_FORTRAN if fortran else BUFFER_ARRAY, payload))
        return ext


def _in_order(values: Collection[Any]) -> list[Any]:
    """The members of a set, all of one native type; floats go by their bytes, since NaN has no order."""
    if float in map(type, values):
        return sorted(values, key=struct.Struct("<d").pack)
    return sorted(values) if len(values) > 1 else list(values)


def _pickled(objects: list[Any], lasting: bool) -> tuple[bytes, list[memoryview]]:
    """The objects in one pickle, and its out-of-band buffers; by value if need be and cloudpickle is there."""
    result, failure = None, None
    try:
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(objects, protocol=5, buffer_callback=buffers.append)
        result = pickles.with_versions(data), [buffer.raw() for buffer in buffers]
        if not pickles.names_main(data):
            return result
    except RecursionError as error:
        raise CodecError(f"{_types(objects)} is nested too deeply to be sent") from error
    except Exception as error:  # noqa: BLE001 - a user's __reduce__ may raise anything
        failure = error
    try:
        from . import by_value

        return by_value.dumps(objects, lasting=lasting)[:2]
    except ImportError:
        if result is not None:
            return result
    except Exception as error:  # noqa: BLE001 - as above
        failure = error
    raise CodecError(f"{_types(objects)} cannot be pickled: {failure}") from failure


def _types(objects: list[Any]) -> str:
    return "a value of type " + ", ".join(sorted({type(item).__name__ for item in objects})[:5])


_LOWERINGS: dict[type, Any] = {
    int: _Encoder.lower_int,
    complex: _Encoder.lower_complex,
    bytes: _Encoder.lower_bytes,
    bytearray: _Encoder.lower_bytes,
    list: _Encoder.lower_list,
    tuple: _Encoder.lower_tuple,
    dict: _Encoder.lower_dict,
    set: _Encoder.lower_set,
    frozenset: _Encoder.lower_set,
    np.ndarray: _Encoder.lower_array,
    np.memmap: _Encoder.lower_array,
    np.str_: _Encoder.lower_numpy_str,
    np.bytes_: _Encoder.lower_bytes,
    **dict.fromkeys([dtype.type for dtype in numpy_payload.BUILTIN], _Encoder.lower_scalar),
    **dict.fromkeys([np.datetime64, np.timedelta64, np.void], _Encoder.lower_scalar),
}
