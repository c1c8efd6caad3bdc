"""Python and numpy values to a header and bare buffers, and exactly back.

What comes back has the same type and value, to the last bit: a tuple stays a tuple, np.float32 stays
np.float32, an array keeps dtype, byte order, shape and memory order. Two things are not kept: that one list
or array stood in two places of a value (two equal ones arrive, so that equal values have equal bytes), and
np.memmap, which arrives as an array. Sets are written in an order that does not depend on the process.

The value is first lowered to what msgpack carries unchanged: None, bool, 64-bit int, float, str, short bytes,
list, and dict with such keys. Everything else becomes an ext type, or, where it holds other values, a list
that begins with a mark. Marks are ext types too, and a user's own ExtType is pickled: no value can pass for
a mark. What has no ext type is pickled, all such objects of a value together. The header is

    crc32 of the rest, flags, number of buffers, two sizes | pickle, where its buffers are | tree
"""

from __future__ import annotations

import enum
import functools
import math
import pickle
import struct
import sys
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import msgpack
import numpy as np

from . import dtypes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

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


_PREFIX = struct.Struct("<BIQQ")  # flags, number of buffers, sizes of the pickle and of its places
_CRC = struct.Struct("<I")
_BODY = _CRC.size + _PREFIX.size
_TAGGED, _PICKLED = 1, 2  # flags: the tree has marks; there is a pickle part

# Codes of the ext types. The first four are marks.
_TUPLE, _SET, _FROZENSET, _DICT, _INT, _COMPLEX, _BYTES, _STR, _SCALAR, _ARRAY, _OBJECT = range(11)

_ext = functools.partial(tuple.__new__, msgpack.ExtType)  # ExtType() itself checks, for 0.4 us each time
_MARK_TUPLE, _MARK_SET, _MARK_FROZENSET, _MARK_DICT = (_ext((code, b"")) for code in range(4))

_NATIVE = frozenset([type(None), bool, int, float, str])  # msgpack carries these as they are
_INDEX = struct.Struct("<I")
_BUFFER = struct.Struct("<BIQ")  # which of _BYTE_TYPES; 1 + index of the buffer, or 0: the bytes follow; size
_BYTE_TYPES = [bytes, bytearray, np.bytes_]
_COMPLEX_PARTS = struct.Struct("<dd")
# Of an array, by ndim: ndim, is it Fortran's order, size of the dtype's token, place as in _BUFFER, shape
_LAYOUTS = [struct.Struct(f"<BBII{ndim}Q") for ndim in range(65)]

_MAX_BUFFERS = 1024
_MAX_DEPTH = 100  # deeper values are pickled: a level takes three of the 1,000 frames that python allows
_MAX_REPEATED = 1 << 20  # elements in lists met again, before pickle takes the value, which writes each once


class _UnfitError(Exception):
    """This value is for pickle: a cycle, too deep, or the same lists over and over."""


# ---- encoding ---------------------------------------------------------------------------------------------

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


def encode(value: Any, *, inline: int = 1024) -> Encoded:
    """`value` as a header and buffers; arrays and bytes of more than `inline` bytes become buffers.

    An array that is contiguous and longer than `inline` is not copied: do not change it before it is sent.
    CodecError when the value holds something that cannot be pickled, or is nested too deeply even for pickle.
    """
    if type(value) is np.ndarray and id(value.dtype) in _LONE and value.nbytes > inline:
        return _encode_lone(value)
    encoded = _encode(value, inline)
    # A message has only so many frames; beyond, one long header is faster anyway.
    return encoded if len(encoded.buffers) <= _MAX_BUFFERS else _encode(value, sys.maxsize)


def _encode(value: Any, inline: int) -> Encoded:
    try:
        return _Encoder(inline).run(value)
    except OverflowError:  # an int of more than 64 bits somewhere: rare enough to start again
        pass
    except (_UnfitError, RecursionError):
        return _Encoder(inline).run_pickled(value)
    try:
        return _Encoder(inline, big_ints=True).run(value)
    except (_UnfitError, RecursionError):
        return _Encoder(inline).run_pickled(value)


# A value that is one long array of numbers is what most rounds send and return. Its header depends on dtype and shape
# alone, so it is remembered, and read by looking it up: that takes a third of the time.
_LONE = {id(np.dtype(char)) for char in "?bBhHiIlLqQefd"}  # whose memory a memoryview can show as bytes
_lone_headers: dict[tuple[int, tuple[int, ...]], bytes] = {}
_lone_arrays: dict[bytes, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
_MAX_LONE = 1024
_LONGEST_LONE = 1024  # bytes of a header that is remembered


def _encode_lone(value: np.ndarray[Any, Any]) -> Encoded:
    key = (id(value.dtype), value.shape)
    header = _lone_headers.get(key)
    if header is None or not value.flags.c_contiguous:
        encoded = _Encoder(1).run(value)
        if value.flags.c_contiguous and len(_lone_headers) < _MAX_LONE:
            _lone_headers[key] = encoded.header
            _lone_arrays[encoded.header] = value.dtype, value.shape, value.nbytes
        return encoded
    return Encoded(header, [value.data.cast("B")], True)


def _decode_lone(header: Buffer, buffers: Sequence[Buffer], copy: bool) -> Any:
    """The array, or None when this is not the known header of one."""
    known = _lone_arrays.get(bytes(header))
    if known is None:
        return None
    dtype, shape, size = known
    view = bytes_view(buffers[0])
    if len(view) != size:
        return None
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, view)
    return array.copy() if copy else array


class _Encoder:
    """Lowers one value, gathering what leaves the tree on the way: buffers, and objects for pickle."""

    __slots__ = ("big_ints", "buffers", "flags", "inline", "objects", "plain", "repeated", "seen")

    def __init__(self, inline: int, big_ints: bool = False) -> None:
        self.inline = inline
        self.big_ints = big_ints
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
            self.flags |= _PICKLED
            self.plain = False
            data, raw = _pickled(self.objects)
            places = _pack([self._place(view) for view in raw])
            parts = [data, places, *parts]
            sizes = (len(data), len(places))
        prefix = _PREFIX.pack(self.flags, len(self.buffers), *sizes)
        crc = zlib.crc32(prefix)
        for part in parts:
            crc = zlib.crc32(part, crc)
        return Encoded(b"".join((_CRC.pack(crc), prefix, *parts)), self.buffers, self.plain)

    def _place(self, view: memoryview) -> Any:
        """What stands for an out-of-band buffer: [index, size] of one of ours, or its bytes if few."""
        if view.nbytes <= self.inline:
            return bytes(view)
        self.buffers.append(view)
        return [len(self.buffers) - 1, view.nbytes]

    def lower(self, value: Any, depth: int) -> Any:
        lowering = _LOWERINGS.get(type(value))
        if lowering is None:
            return value if type(value) in _NATIVE else self.lower_object(value)
        return lowering(self, value, depth)

    def lower_object(self, value: Any) -> Any:
        self.objects.append(value)
        return _ext((_OBJECT, _INDEX.pack(len(self.objects) - 1)))

    def lower_int(self, value: int, _depth: int) -> Any:
        if -0x8000000000000000 <= value <= 0xFFFFFFFFFFFFFFFF:
            return value
        return _ext((_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)))

    def lower_complex(self, value: complex, _depth: int) -> Any:
        return _ext((_COMPLEX, _COMPLEX_PARTS.pack(value.real, value.imag)))

    def lower_bytes(self, value: Buffer, _depth: int) -> Any:
        kind = _BYTE_TYPES.index(type(value))
        size = len(value)
        if size <= self.inline:
            return value if kind == 0 else _ext((_BYTES, _BUFFER.pack(kind, 0, size) + value))
        ext = self.seen.get(id(value))
        if ext is None:
            # A bytearray is copied: a view of it would keep the user from resizing it.
            self.buffers.append(memoryview(bytes(value)))
            ext = self.seen[id(value)] = _ext((_BYTES, _BUFFER.pack(kind, len(self.buffers), size)))
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
        return _NATIVE.issuperset(map(type, values)) and not (self.big_ints and int in map(type, values))

    def lower_list(self, value: list[Any], depth: int) -> Any:
        self._enter(value, depth)
        return value if self._native(value) else [self.lower(item, depth + 1) for item in value]

    def lower_tuple(self, value: tuple[Any, ...], depth: int) -> Any:
        self._enter(value, depth)
        self.flags |= _TAGGED
        if self._native(value):
            return [_MARK_TUPLE, *value]
        return [_MARK_TUPLE, *[self.lower(item, depth + 1) for item in value]]

    def lower_dict(self, value: dict[Any, Any], depth: int) -> Any:
        self._enter(value, depth)
        if self._native(value):
            if self._native(value.values()):
                return value
            return {key: self.lower(item, depth + 1) for key, item in value.items()}
        self.flags |= _TAGGED
        flat: list[Any] = [_MARK_DICT]
        for key, item in value.items():
            flat += self.lower(key, depth + 1), self.lower(item, depth + 1)
        return flat

    def lower_set(self, value: Any, depth: int) -> Any:
        self._enter(value, depth)
        self.flags |= _TAGGED
        mark = _MARK_SET if type(value) is set else _MARK_FROZENSET
        if len(set(map(type, value))) < 2 and self._native(value):
            return [mark, *_in_order(value)]
        return [mark, *sorted(self._apart(item, depth + 1) for item in value)]

    def _apart(self, item: Any, depth: int) -> bytes:
        """The element of a set encoded on its own, to have bytes to sort by."""
        encoder = _Encoder(sys.maxsize, big_ints=True)
        encoder.seen, encoder.repeated = self.seen, self.repeated
        header, _, plain = encoder.finish(encoder.lower(item, depth))
        self.repeated = encoder.repeated
        self.plain &= plain
        return header

    def lower_scalar(self, value: np.generic, _depth: int) -> Any:
        dtype = value.dtype
        token = dtypes.TOKENS.get(id(dtype)) or dtypes.token(dtype)
        if token is None:
            return self.lower_object(value)
        return _ext((_SCALAR, _INDEX.pack(len(token)) + token + value.tobytes()))

    def lower_numpy_str(self, value: np.str_, _depth: int) -> Any:
        return _ext((_STR, value.encode("utf-8", "surrogatepass")))

    def lower_array(self, array: np.ndarray[Any, Any], _depth: int) -> Any:
        dtype = array.dtype
        token = dtypes.TOKENS.get(id(dtype)) or dtypes.token(dtype)
        if token is None:
            return self.lower_object(array)
        flags = array.flags
        contiguous = flags.c_contiguous
        fortran = flags.f_contiguous and not contiguous
        layout = _LAYOUTS[array.ndim]
        if array.nbytes <= self.inline:
            fixed = layout.pack(array.ndim, fortran, len(token), 0, *array.shape)
            return _ext((_ARRAY, fixed + token + array.tobytes("F" if fortran else "C")))
        ext = self.seen.get(id(array))
        if ext is None:
            flat = array if contiguous else array.T if fortran else np.ascontiguousarray(array)
            self.buffers.append(flat.reshape(-1).view(np.uint8).data)
            fixed = layout.pack(array.ndim, fortran, len(token), len(self.buffers), *array.shape)
            ext = self.seen[id(array)] = _ext((_ARRAY, fixed + token))
        return ext


def _in_order(values: Collection[Any]) -> list[Any]:
    """The members of a set, all of one native type; floats go by their bytes, since NaN has no order."""
    if float in map(type, values):
        return sorted(values, key=struct.Struct("<d").pack)
    return sorted(values) if len(values) > 1 else list(values)


def _pickled(objects: list[Any]) -> tuple[bytes, list[memoryview]]:
    """The objects in one pickle, and its out-of-band buffers; by cloudpickle if need be and it is there."""
    result, failure = None, None
    try:
        result = _dump(pickle, objects)
        if b"__main__" not in result[0]:  # pickle would send the name, and __main__ is another module there
            return result
    except RecursionError as error:
        raise CodecError(f"{_types(objects)} is nested too deeply to be sent") from error
    except Exception as error:  # noqa: BLE001 - a user's __reduce__ may raise anything
        failure = error
    try:
        import cloudpickle

        return _dump(cloudpickle, objects)
    except ImportError:
        if result is not None:
            return result
    except Exception as error:  # noqa: BLE001 - as above
        failure = error
    raise CodecError(f"{_types(objects)} cannot be pickled: {failure}") from failure


def _types(objects: list[Any]) -> str:
    return "a value of type " + ", ".join(sorted({type(item).__name__ for item in objects})[:5])


def _dump(module: Any, objects: list[Any]) -> tuple[bytes, list[memoryview]]:
    buffers: list[pickle.PickleBuffer] = []
    data = module.dumps(objects, protocol=5, buffer_callback=buffers.append)
    return data, [buffer.raw() for buffer in buffers]


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
    **dict.fromkeys([dtype.type for dtype in dtypes.BUILTIN], _Encoder.lower_scalar),
    **dict.fromkeys([np.datetime64, np.timedelta64, np.void], _Encoder.lower_scalar),
}


# ---- decoding ---------------------------------------------------------------------------------------------


class _Mark(enum.Enum):
    TUPLE = _TUPLE
    SET = _SET
    FROZENSET = _FROZENSET
    DICT = _DICT


_MARKS = list(_Mark)  # in the order of their codes; _Mark(code) takes longer than making the tuple
_NESTING = frozenset([list, dict, _Mark])  # what `lift` has to look into


def decode(header: Buffer, buffers: Sequence[Buffer], *, copy: bool = False, allow_pickle: bool = True) -> Any:
    """The value that `encode` was given.

    With copy=False arrays are read-only, and long ones are views of `buffers`, which they keep alive; with
    copy=True they are private and can be written to. With allow_pickle=False a value with a pickle inside is
    refused. CodecError, and nothing else, when `header` and `buffers` are not what `encode` gave, or when the
    pickle inside cannot be opened here.
    """
    try:
        return _decode_any(header, buffers, copy, allow_pickle)
    except CodecError:
        raise
    except Exception as error:  # msgpack, numpy and pickle raise almost anything on what was never a value
        raise CodecError(f"this is not an encoded value: {type(error).__name__}: {error}") from error


def _decode_any(header: Buffer, buffers: Sequence[Buffer], copy: bool, allow_pickle: bool) -> Any:
    lone = len(buffers) == 1
    if lone and (array := _decode_lone(header, buffers, copy)) is not None:
        return array
    value = _decode(memoryview(header), [bytes_view(buffer) for buffer in buffers], copy, allow_pickle)
    if lone and is_lone(value):
        _remember(bytes(header), value)
    return value


def is_lone(value: Any) -> bool:
    """Whether it is an array of numbers as they lie in memory, of which dtype and shape tell all."""
    return type(value) is np.ndarray and id(value.dtype) in _LONE and bool(value.flags.c_contiguous)


def _remember(header: bytes, value: np.ndarray[Any, Any]) -> None:
    if len(_lone_arrays) < _MAX_LONE and len(header) <= _LONGEST_LONE:
        _lone_arrays[header] = value.dtype, value.shape, value.nbytes


def bytes_view(buffer: Buffer) -> memoryview:
    """A read-only view of the bytes of a buffer."""
    view = memoryview(buffer)
    if view.ndim != 1 or view.format != "B":
        view = view.cast("B")
    return view.toreadonly()


def _decode(header: memoryview, buffers: list[memoryview], copy: bool, allow_pickle: bool) -> Any:
    if len(header) < _BODY:
        raise CodecError(f"an encoded value of {len(header)} bytes is cut short")
    if zlib.crc32(header[_CRC.size :]) != _CRC.unpack_from(header)[0]:
        raise CodecError("an encoded value has a wrong checksum: it was altered or cut on the way")
    flags, count, pickle_size, places_size = _PREFIX.unpack_from(header, _CRC.size)
    if count != len(buffers):
        raise CodecError(f"an encoded value has {count} buffers; {len(buffers)} are given")
    places = _BODY + pickle_size
    start = places + places_size
    decoder = _Decoder(buffers, copy, allow_pickle, bool(flags & _TAGGED))
    if flags & _PICKLED:
        if not allow_pickle:
            raise CodecError("the value has a pickle inside, which is not opened here")
        decoder.unpickle(header[_BODY:places], header[places:start])
    tree = msgpack.unpackb(
        header[start:], strict_map_key=False, unicode_errors="surrogatepass", ext_hook=decoder.from_ext
    )
    return decoder.lift(tree) if flags & _TAGGED else tree


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
        self.objects = pickle.loads(data, buffers=buffers)
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
        if code == _ARRAY:
            return self._array(data)
        if code == _SCALAR:
            return self._scalar(data)
        if code == _OBJECT:
            return self.objects[_INDEX.unpack(data)[0]]
        if code <= _DICT and self.tagged:
            return _MARKS[code]
        if code == _BYTES:
            return self._bytes(data)
        if code == _INT:
            return int.from_bytes(data, "little", signed=True)
        if code == _COMPLEX:
            return complex(*_COMPLEX_PARTS.unpack(data))
        if code == _STR:
            return np.str_(data.decode("utf-8", "surrogatepass"))
        raise CodecError(f"there is no ext type {code}")

    def _bytes(self, data: bytes) -> Any:
        kind, place, size = _BUFFER.unpack_from(data)
        content = self._taken(place - 1, size) if place else data[_BUFFER.size :]
        return _BYTE_TYPES[kind](content)

    def _scalar(self, data: bytes) -> Any:
        start = _INDEX.size + _INDEX.unpack_from(data)[0]
        token = data[_INDEX.size : start]
        content: Any = data[start:]
        dtype = dtypes.DTYPES.get(token) or dtypes.dtype(token)
        if len(content) != dtype.itemsize:
            raise CodecError(f"a scalar of {dtype} has {len(content)} bytes")
        return np.frombuffer(bytearray(content) if self.copy else content, dtype)[0]

    def _array(self, data: bytes) -> Any:
        layout = _LAYOUTS[data[0]]
        _, fortran, token_size, place, *shape = layout.unpack_from(data)
        start = layout.size + token_size
        token = data[layout.size : start]
        dtype = dtypes.DTYPES.get(token) or dtypes.dtype(token)
        size = math.prod(shape) * dtype.itemsize
        content = self._taken(place - 1, size) if place else data[start:]
        if len(content) != size:
            raise CodecError(f"an array of {dtype} with shape {tuple(shape)} has {len(content)} bytes")
        array: Any = np.ndarray(shape, dtype, content, 0, None, "F" if fortran else "C")
        return array.copy("K") if self.copy else array

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
        if type(item) not in _NATIVE:
            raise CodecError(f"a set has a {type(item).__name__} where bytes should be")
        return item
