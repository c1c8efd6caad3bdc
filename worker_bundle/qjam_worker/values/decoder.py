"""A header and buffers back to the value."""

from __future__ import annotations

import enum
import zlib
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from . import lone_arrays, numpy_payload, pickles
from .header import (
    ARRAY,
    BODY,
    BUFFER,
    BUFFER_ARRAY,
    BUFFER_FORTRAN,
    BYTE_TYPES,
    BYTES,
    COMPLEX,
    COMPLEX_PARTS,
    CRC,
    DICT,
    FORTRAN,
    FROZENSET,
    INDEX,
    INT,
    NATIVE,
    OBJECT,
    PICKLED,
    PREFIX,
    SCALAR,
    SET,
    STR,
    TAGGED,
    TUPLE,
    Buffer,
    CodecError,
    bytes_view,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Mark(enum.Enum):
    TUPLE = TUPLE
    SET = SET
    FROZENSET = FROZENSET
    DICT = DICT


_MARKS = list(_Mark)  # in the order of their codes; _Mark(code) takes longer than making the tuple
_NESTING = frozenset([list, dict, _Mark])  # what `lift` has to look into


def decode(header: Buffer, buffers: Sequence[Buffer], *, copy: bool = False, allow_pickle: bool = True) -> Any:
    """The value that `encode` was given.

    With copy=False arrays are read-only, and long ones are views of `buffers`, which they keep alive; with
    copy=True they are private and can be written to. With allow_pickle=False a value with a pickle inside is
    refused. CodecError, and nothing else, when `header` and `buffers` are not what `encode` gave, or when the
    pickle inside cannot be opened here; its __cause__ is then what opening it has raised.
    """
    try:
        return _decode_any(header, buffers, copy, allow_pickle)
    except CodecError:
        raise
    except Exception as error:  # msgpack, numpy and pickle raise almost anything on what was never a value
        raise CodecError(f"this is not an encoded value: {type(error).__name__}: {error}") from error


def _decode_any(header: Buffer, buffers: Sequence[Buffer], copy: bool, allow_pickle: bool) -> Any:
    lone = len(buffers) == 1
    if lone and (array := _decode_lone(header, buffers[0], copy)) is not None:
        return array
    value = _decode(memoryview(header), [bytes_view(buffer) for buffer in buffers], copy, allow_pickle)
    if lone and lone_arrays.is_lone(value):
        lone_arrays.remember(bytes(header), value)
    return value


def _decode_lone(header: Buffer, buffer: Buffer, copy: bool) -> Any:
    """The array, or None when this is not the known header of one."""
    known = lone_arrays.by_header.get(bytes(header))
    if known is None:
        return None
    view = bytes_view(buffer)
    if len(view) != known.nbytes:
        return None
    array: np.ndarray[Any, Any] = np.ndarray(known.shape, known.dtype, view)
    return array.copy() if copy else array


def _decode(header: memoryview, buffers: list[memoryview], copy: bool, allow_pickle: bool) -> Any:
    if len(header) < BODY:
        raise CodecError(f"an encoded value of {len(header)} bytes is cut short")
    if zlib.crc32(header[CRC.size :]) != CRC.unpack_from(header)[0]:
        raise CodecError("an encoded value has a wrong checksum: it was altered or cut on the way")
    flags, count, pickle_size, places_size = PREFIX.unpack_from(header, CRC.size)
    if count != len(buffers):
        raise CodecError(f"an encoded value has {count} buffers; {len(buffers)} are given")
    places = BODY + pickle_size
    start = places + places_size
    decoder = _Decoder(buffers, copy, allow_pickle, bool(flags & TAGGED))
    if flags & PICKLED:
        if not allow_pickle:
            raise CodecError("the value has a pickle inside, which is not opened here")
        decoder.unpickle(header[BODY:places], header[places:start])
    tree = msgpack.unpackb(
        header[start:], strict_map_key=False, unicode_errors="surrogatepass", ext_hook=decoder.from_ext
    )
    return decoder.lift(tree) if flags & TAGGED else tree


def _copied(scalar: Any) -> Any:
    """A private one; numpy's own copy would leave out what lies between fields."""
    return np.frombuffer(bytearray(scalar.tobytes()), scalar.dtype)[0]


class _Decoder:
    """Turns ext types into values, and marked lists into the containers that they stand for."""

    __slots__ = ("allow_pickle", "buffers", "copy", "objects", "tagged")

    def __init__(self, buffers: list[memoryview], copy: bool, allow_pickle: bool, tagged: bool) -> None:
        self.tagged = tagged
        self.buffers = buffers
        self.copy = copy
        self.allow_pickle = allow_pickle
        self.objects: list[Any] = []

    def unpickle(self, data: memoryview, places: memoryview) -> None:
        buffers: list[Any] = [
            place if type(place) is bytes else self._taken(*place) for place in msgpack.unpackb(places)
        ]
        if self.copy:
            buffers = [bytearray(buffer) for buffer in buffers]
        self.objects = pickles.loads(data, buffers, own=self.copy)
        if not self.copy:
            for item in self.objects:
                if isinstance(item, np.ndarray):  # of objects, or of a subclass: these came inside the pickle
                    item.flags.writeable = False

    def _taken(self, index: int, size: int) -> memoryview:
        view = self.buffers[index]
        if len(view) != size:
            raise CodecError(f"buffer {index} has {len(view)} bytes; the header says {size}")
        return view

    def from_ext(self, code: int, data: bytes) -> Any:
        if code == SCALAR:
            value = numpy_payload.unpack(data)
            return _copied(value) if self.copy else value[()]
        if ARRAY <= code <= BUFFER_FORTRAN:
            return self._array(code, data)
        if code == OBJECT:
            return self.objects[INDEX.unpack(data)[0]]
        if code <= DICT and self.tagged:
            return _MARKS[code]
        if code == BYTES:
            return self._bytes(data)
        if code == INT:
            return int.from_bytes(data, "little", signed=True)
        if code == COMPLEX:
            return complex(*COMPLEX_PARTS.unpack(data))
        if code == STR:
            return np.str_(data.decode("utf-8", "surrogatepass"))
        raise CodecError(f"there is no ext type {code}")

    def _bytes(self, data: bytes) -> Any:
        kind, place, size = BUFFER.unpack_from(data)
        content = self._taken(place - 1, size) if place else data[BUFFER.size :]
        return BYTE_TYPES[kind](content)

    def _array(self, code: int, data: bytes) -> Any:
        array = numpy_payload.unpack(data, self.buffers if code >= BUFFER_ARRAY else None)
        if self.copy:
            array = array.copy()
        return array.T if code in (FORTRAN, BUFFER_FORTRAN) else array

    def lift(self, tree: Any) -> Any:
        """`tree` with its marked lists made into what they stand for."""
        if type(tree) is dict:
            if _Mark in map(type, tree):
                raise CodecError("a mark stands where a key should be")
            return {key: self._item(value) for key, value in tree.items()}
        if type(tree) is not list:
            raise CodecError("a mark stands where a value should be")
        if _NESTING.isdisjoint(map(type, tree)):
            return tree
        if type(tree[0]) is not _Mark:
            return [self._item(item) for item in tree]
        mark = tree[0]
        if mark is _Mark.TUPLE:
            return tuple([self._item(item) for item in tree[1:]])
        if mark is not _Mark.DICT:
            elements = [self._element(item) for item in tree[1:]]
            return set(elements) if mark is _Mark.SET else frozenset(elements)
        items = [self._item(item) for item in tree[1:]]
        if len(items) % 2:
            raise CodecError("a dict has a key without a value")
        return dict(zip(items[::2], items[1::2]))

    def _item(self, item: Any) -> Any:
        return self.lift(item) if type(item) in _NESTING else item

    def _element(self, item: Any) -> Any:
        """One element of a set: encoded apart, unless it is native."""
        if type(item) is bytes:
            return _decode(memoryview(item), [], self.copy, self.allow_pickle)
        if type(item) not in NATIVE:
            raise CodecError(f"a set has a {type(item).__name__} where bytes should be")
        return item
