"""Values come back exactly; bytes that are no value raise CodecError and nothing else."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from qjam_worker.values import numpy_payload
from qjam_worker.values.codec import CodecError, decode, encode
from qjam_worker.values.flat import pieces as flat_pieces
from qjam_worker.values.flat import read as read_flat
from qjam_worker.values.flat import size as flat_size
from qjam_worker.values.flat import write as write_flat
from qjam_worker.values.header import (
    ARRAY,
    BODY,
    BUFFER_ARRAY,
    BYTES,
    COMPLEX,
    DICT,
    OBJECT,
    SCALAR,
    SET,
    TAGGED,
    TUPLE,
)
from qjam_worker.values.header import (
    PICKLED as HAS_PICKLE,
)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    pass


class Listing(list):  # type: ignore[type-arg]
    pass


Pair = collections.namedtuple("Pair", "cost grad")


@dataclasses.dataclass
class Record:
    name: str
    data: Any


class Stubborn:
    def __reduce__(self) -> Any:
        raise ZeroDivisionError("not today")


class Explosive:
    def __setstate__(self, state: Any) -> None:
        raise ZeroDivisionError("on arrival")

    def __getstate__(self) -> Any:
        return {"a": 1}


def exactly(a: Any, b: Any) -> bool:
    """Same type and same value, bit for bit, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return (
            same_dtype(a.dtype, b.dtype)
            and a.shape == b.shape
            and (exactly(a.tolist(), b.tolist()) if inside(a.dtype) else a.tobytes() == b.tobytes())
        )
    if isinstance(a, np.generic):
        return same_dtype(a.dtype, b.dtype) and a.tobytes() == b.tobytes() and str(a) == str(b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(exactly, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(exactly, a.items(), b.items()))
    if isinstance(a, (set, frozenset)):
        return a == b and collections.Counter(map(type, a)) == collections.Counter(map(type, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return exactly(a.real, b.real) and exactly(a.imag, b.imag)
    return bool(a == b)


def inside(dtype: np.dtype[Any]) -> bool:
    """Whether an array's bytes are not its values: they are pointers, or there is padding between them."""
    return dtype.hasobject or dtype.names is not None


def same_dtype(a: np.dtype[Any], b: np.dtype[Any]) -> bool:
    return a == b and (a.char, a.str, a.fields, a.itemsize) == (b.char, b.str, b.fields, b.itemsize)


def back(value: Any, inline: int = 1024, copy: bool = False, **options: Any) -> Any:
    header, buffers, _ = encode(value, inline=inline)
    return decode(header, [bytes(buffer) for buffer in buffers], copy=copy, **options)


def back_flat(value: Any, inline: int = 1024) -> Any:
    return decode(*read_flat(b"".join(flat_pieces(encode(value, inline=inline)))))


# ---- values that msgpack and ext types carry --------------------------------------------------------------

PLAIN = [
    None, True, False, 0, -1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 2**200, -(2**200),
    0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, struct.unpack("d", b"\1\0\0\0\0\0\xf8\x7f")[0],
    1j, complex(-0.0, math.nan), "", "text", "\0", "\U0001f600", "\ud800 alone", "x" * 5000,
    b"", b"bytes", b"\0" * 5000, bytearray(), bytearray(b"abc"), bytearray(5000),
    [], [1, 2.5, "x", None], [[], [[]]], (), (1,), (1, (2, (3, [4, (5,)]))), [(1, 2), [3, 4]], ((),),
    [2**200, 1], [1, [2, {3: 2**100}]], (2**64,), {2**70: 1, "a": {2**71}},
    {}, {"a": 1}, {2: "a", None: 2, 2.5: 3, True: 4},
    {(1, 2): (3, 4), "x": {(5, (6,)): []}}, {b"key": b"value"}, {frozenset([1]): 1, 1j: 2, 2**99: 3},
    {"z": 1, "a": 2, "m": (3,)}, {np.float32(1): 1, np.str_("k"): 2},
    set(), {1, 2, 3}, {"a", "b"}, {1.5, -0.0, math.inf}, {None}, {True, False}, {1, "a", None, (2, 3), b"x"},
    {2**100, 1}, frozenset(), frozenset({frozenset({1}), frozenset()}), {(1, "a"), (2, "b")}, {b"y" * 3000},
    {"\ud800", "b"}, {1j}, [{1}, {1}],
]  # fmt: skip


def named(value: object) -> str:
    """The name of a case. That of a set must not depend on the order in which it gives its members."""
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (set, frozenset)) else repr(value)[:30]


@pytest.mark.parametrize("value", PLAIN, ids=named)
@pytest.mark.parametrize("inline", [0, 1024])
def test_a_builtin_value_comes_back_and_needs_no_pickle(value: Any, inline: int) -> None:
    assert encode(value, inline=inline).plain
    for copy in (False, True):
        assert exactly(back(value, inline, copy, allow_pickle=False), value)
    assert exactly(back_flat(value, inline), value)


SCALARS = [
    *[np.dtype(char).type(1) for char in "?bBhHiIlLqQefdgFDG"],
    np.float64(math.nan), np.float64(-0.0), np.float32(0.1), np.int8(-128),
    np.uint64(2**64 - 1), np.bool_(False),
    np.datetime64("2020-01-02"), np.datetime64("2020-01-02T03:04:05.678", "ns"), np.datetime64("NaT", "s"),
    np.datetime64(5, "25s"), np.timedelta64(7, "D"), np.timedelta64("NaT", "us"),
    np.str_(""), np.str_("text\0"), np.str_("\ud800"), np.bytes_(b""),
    np.bytes_(b"ab\0"), np.bytes_(b"x" * 3000),
    np.void(b"abc"), np.zeros((), "i4,>f8")[()],
    np.zeros((), np.dtype([("a", "u1"), ("b", "f8", (2,))], align=True))[()],
]  # fmt: skip


@pytest.mark.parametrize("value", SCALARS, ids=lambda value: f"{type(value).__name__} {value!r:.20}")
@pytest.mark.parametrize("copy", [False, True])
def test_a_numpy_scalar_keeps_its_type(value: Any, copy: bool) -> None:
    assert encode(value).plain
    assert exactly(back(value, copy=copy), value)
    assert exactly(back([(value, value)], copy=copy), [(value, value)])


@pytest.mark.filterwarnings("ignore:The 'generic' unit:DeprecationWarning")
def test_a_time_without_a_unit_gets_none() -> None:
    for value in (np.datetime64("NaT"), np.timedelta64(7), np.zeros(2, "M8"), np.zeros(2, "m8")):
        assert exactly(back(value), value)


def test_longlong_and_long_stay_apart_though_they_are_equal() -> None:
    for char in "lqLQ":
        assert back(np.zeros(3, char)).dtype.char == char
        assert type(back(np.dtype(char).type(1))) is np.dtype(char).type
        assert back(np.zeros(3, [("a", char)])).dtype["a"].char == char


STRUCTURED = [
    np.dtype("i4,>f8,S3"),
    np.dtype([("a", "u1"), ("b", "<f8"), ("c", ">U2")], align=True),
    np.dtype([(("title of a", "a"), "i4"), ("b", "f4", (2, 3))]),
    np.dtype({"names": ["late", "early"], "formats": ["f8", "i2"], "offsets": [16, 0], "itemsize": 40}),
    np.dtype({"names": ["whole", "part"], "formats": ["u4", "u2"], "offsets": [0, 2]}),
    np.dtype([("outer", [("inner", "M8[us]", 2), ("flag", "?")]), ("e", "e")]),
    np.dtype([("\ud800", "i4")]),
]

ARRAYS = {
    "float64": np.linspace(0, 1, 500),
    "0-d": np.array(3.5),
    "empty": np.zeros((0, 3), "f4"),
    "empty in the middle": np.zeros((3, 0, 2)),
    "Fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "Fortran of 3": np.asfortranarray(np.arange(600).reshape(10, 3, 20)),
    "strided": np.arange(1000)[::3],
    "reversed": np.arange(100)[::-1],
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "broadcast": np.broadcast_to(np.arange(3.0), (4, 3)),
    "big endian": np.arange(300, dtype=">f8"),
    "big endian, long": np.arange(300, dtype=">i2"),
    "bool": np.array([True, False, True]),
    "complex": np.array([1j, complex(math.nan, -0.0)]),
    "half": np.arange(5, dtype="e"),
    "longdouble": np.arange(200, dtype="g"),
    "datetime64": np.array(["2020-01-02", "NaT"], "M8[D]"),
    "datetime64, long": np.arange(500).astype("M8[ns]"),
    "timedelta64": np.arange(3, dtype="m8[25s]"),
    "text": np.array(["a", "bcd", "\U0001f600"]),
    "bytes": np.array([b"a", b"bcd"]),
    "void": np.array([b"abc", b"def"], "V3"),
    "many dimensions": np.zeros((1,) * 32),
    **{f"structured {i}": np.ones(200, dtype) for i, dtype in enumerate(STRUCTURED)},
    **{f"structured {i}, short": np.zeros((1, 2), dtype) for i, dtype in enumerate(STRUCTURED)},
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("inline", [0, 1 << 20])
@pytest.mark.parametrize("copy", [False, True])
def test_an_array_comes_back(name: str, inline: int, copy: bool) -> None:
    array = ARRAYS[name]
    assert encode(array, inline=inline).plain
    for got in (
        back(array, inline, copy),
        *back((array, [array]), inline, copy)[1],
        back_flat(array, inline),
    ):
        assert exactly(got, array)
        assert got.dtype.isalignedstruct == array.dtype.isalignedstruct
        if array.flags.contiguous or array.flags.f_contiguous:
            assert got.flags.f_contiguous == array.flags.f_contiguous
        assert got.flags.c_contiguous == (array.flags.c_contiguous or not array.flags.f_contiguous)


@given(
    npst.arrays(
        npst.scalar_dtypes() | npst.byte_string_dtypes() | npst.unicode_string_dtypes() | npst.array_dtypes(),
        npst.array_shapes(min_dims=0, min_side=0, max_dims=4),
    ),
    st.sampled_from("CFA"),
    st.sampled_from([0, 64, 1 << 20]),
    st.booleans(),
)
def test_any_array_comes_back(array: Any, order: str, inline: int, copy: bool) -> None:
    array = array.T if order == "A" else array.copy(order)
    got = back(array, inline, copy)
    assert type(got) is np.ndarray
    assert same_dtype(got.dtype, array.dtype)
    assert got.shape == array.shape
    assert got.flags.f_contiguous == array.flags.f_contiguous
    assert str(got.tolist()) == str(array.tolist())  # NaN is as good as NaN, and padding is not looked at


@given(npst.arrays("i4", npst.array_shapes(max_dims=4)), st.data(), st.sampled_from([0, 1 << 20]))
def test_any_view_comes_back_equal_and_contiguous(array: Any, data: st.DataObject, inline: int) -> None:
    view = array[data.draw(npst.basic_indices(array.shape, allow_ellipsis=True))]
    got = back(view, inline)
    assert exactly(got, view)
    assert np.asarray(got).flags.forc


def hashable(inner: Any) -> Any:
    return st.tuples(inner, inner) | st.frozensets(inner, max_size=3)


atoms = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200)
    | st.floats() | st.complex_numbers()
    | st.text(st.characters()) | st.binary(max_size=40) | st.sampled_from(SCALARS[:12])
    | st.dates() | st.fractions() | st.sampled_from(Colour)
)  # fmt: skip
keys = st.recursive(atoms.filter(lambda atom: atom == atom), hashable, max_leaves=4)
values = st.recursive(
    atoms | st.binary(max_size=40).map(bytearray) | npst.arrays("<f4", npst.array_shapes(max_side=4)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(values, st.sampled_from([0, 16, 1024, 1 << 40]), st.booleans())
def test_any_value_comes_back(value: Any, inline: int, copy: bool) -> None:
    assert exactly(back(value, inline, copy), value)
    assert exactly(back_flat(value, inline), value)


# ---- what is only for pickle ------------------------------------------------------------------------------

PICKLED = [
    datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc),
    decimal.Decimal("1.50"), fractions.Fraction(1, 3),
    range(3), slice(1, None), Ellipsis, NotImplemented, int, len, math.sin, np.dtype("i4,f8"), Colour.RED,
    Number.ONE, Text("x"), Listing([1]), Pair(1, 2.5),
    collections.OrderedDict(b=1, a=2), Record("a", (1, [2])),
    collections.defaultdict(list, a=[1]), collections.Counter("abca"), collections.deque([1, 2]), np.float64,
    msgpack.Timestamp(1, 2), msgpack.ExtType(1, b"x"), {Colour.RED, Colour.BLUE}, {Colour.RED: (1,)},
]  # fmt: skip


@pytest.mark.parametrize("value", PICKLED, ids=named)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [1, v], lambda v: (v, {"k": v})], ids=["bare", "list", "deep"])
def test_anything_that_can_be_pickled_comes_back(value: Any, wrap: Callable[[Any], Any]) -> None:
    assert not encode(wrap(value)).plain
    for inline in (0, 1024):
        assert exactly(back(wrap(value), inline), wrap(value))


SUBCLASSES: dict[str, Callable[[], Any]] = {
    "matrix": lambda: np.matrix([[1, 2]]),
    "masked": lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
    "records": lambda: np.rec.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_subclass_of_array_comes_back_as_itself(kind: str) -> None:
    value = SUBCLASSES[kind]()
    got = back(value)
    assert type(got) is type(value)
    assert got.dtype == value.dtype
    assert np.array_equal(np.ma.getmaskarray(got), np.ma.getmaskarray(value))
    assert got.tolist() == value.tolist()


def test_an_array_of_objects_comes_back() -> None:
    value = np.array([1, "a", None, (1, 2), 2**100], dtype=object)
    assert exactly(back(value), value)
    assert exactly(back([value.reshape(5, 1)])[0], value.reshape(5, 1))
    records = np.array([(1, [2])], dtype=[("a", "i4"), ("b", "O")])
    assert back(records).tolist() == [(1, [2])]


def test_odd_dtypes_come_back_by_pickle() -> None:
    for value in (
        np.zeros(3, np.dtype([])),
        np.array([""]).astype("S0"),
        np.zeros(2, np.dtype("f8", metadata={"a": 1})),
    ):
        assert exactly(back(value), value)
    assert back(np.zeros(2, np.dtype((np.record, [("a", "i4")])))).dtype.type is np.record


def test_objects_of_one_value_share_one_pickle() -> None:
    record = Record("x", np.arange(1000.0))
    encoded = encode([record] * 100 + [Record(str(i), i) for i in range(100)])
    assert len(encoded.buffers) == 1
    assert len(encoded.header) < 8000
    got = decode(*encoded[:2])
    assert got[0] is got[99]
    assert got[150] == Record("50", 50)


def test_lambdas_closures_and_local_classes_go_by_cloudpickle() -> None:
    three = 3

    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

    function, thing = back((lambda x: x + three, Local(5)))
    assert function(4) == 7
    assert thing.x == 5


def test_without_cloudpickle_the_error_names_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(CodecError, match="a value of type function cannot be pickled"):
        encode([1, lambda x: x])
    assert back(Pair(1, 2)) == Pair(1, 2)


@pytest.mark.parametrize("value", [threading.Lock(), (i for i in ()), Stubborn(), [1, (Stubborn(), 2)]])
def test_what_cannot_be_pickled_is_a_codec_error_that_names_the_type(value: Any) -> None:
    with pytest.raises(CodecError, match=r"a value of type (lock|generator|Stubborn) cannot be pickled"):
        encode(value)


def test_a_pickle_that_fails_on_arrival_is_a_codec_error_with_the_reason() -> None:
    encoded = encode([Explosive()])
    with pytest.raises(CodecError, match="ZeroDivisionError: on arrival"):
        decode(*encoded[:2])


def test_a_class_of_a_script_is_understood_where_that_script_is_not_main() -> None:
    script = """
import sys
from qjam_worker.values.codec import encode
class Model:
    def __init__(self): self.x = 7
header, buffers, _ = encode({"model": Model(), "f": lambda: Model().x + 1})
sys.stdout.write(header.hex())
"""
    got = decode(bytes.fromhex(run_python(script)), [])
    assert got["model"].x == 7
    assert got["f"]() == 8


def run_python(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("value", [Pair(1, 2), [1, {"a": (Colour.RED,)}], {Colour.RED}, np.array([None])])
def test_a_pickle_is_refused_where_it_is_not_allowed(value: Any) -> None:
    encoded = encode(value)
    assert not encoded.plain
    with pytest.raises(CodecError, match="pickle inside"):
        decode(encoded.header, encoded.buffers, allow_pickle=False)


# ---- values that look like the codec's own ----------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {b"nd": True, b"type": "<f8", b"kind": b"", b"shape": [2], b"data": b"\0" * 16},
        {"nd": True, "type": "<f8", "data": b"", "__ndarray__": 1},
        {b"complex": True, b"data": "1j"},
        *[[msgpack.ExtType(code, b""), 1, 2] for code in range(4)],
        *[(msgpack.ExtType(code, b"\0\0\0\0"), [1]) for code in range(12)],
        [msgpack.Timestamp(0), (msgpack.ExtType(0, b""),)],
        encode((1, 2)),
        ["tuple", 1],
    ],
    ids=repr,
)
def test_a_value_that_looks_like_a_mark_comes_back(value: Any) -> None:
    assert exactly(back(value), value)
    assert exactly(back([value, (1,)]), [value, (1,)])


# ---- msgpack-numpy ----------------------------------------------------------------------------------------


def refuse(*_: Any) -> Any:
    raise AssertionError("msgpack-numpy is not to pickle")


@pytest.fixture
def no_pickle_in_msgpack_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack_numpy, "pickle", None)
    ndarray_to_bytes = msgpack_numpy.ndarray_to_bytes
    monkeypatch.setattr(
        msgpack_numpy, "ndarray_to_bytes", lambda array: (refuse if array.dtype.hasobject else ndarray_to_bytes)(array)
    )


@pytest.mark.parametrize("dtype", ["?", "<i4", "<f8", ">f8", "<c16", "S3", "<U2"])
def test_the_payload_of_an_array_is_what_msgpack_numpy_packs(dtype: str) -> None:
    array = np.ones((2, 3), dtype)
    for _ in range(2):  # the second time it is remembered
        assert numpy_payload.pack(array) == msgpack_numpy.packb(array)
        assert exactly(numpy_payload.unpack(msgpack_numpy.packb(array)), array)


def test_the_payload_of_a_scalar_is_what_msgpack_numpy_makes_of_it() -> None:
    for value in (np.float64(1.5), np.bool_(True), np.complex64(1j), np.uint8(3)):
        packed = msgpack.packb(msgpack_numpy.encode(value))  # its packb takes a float64 for a float
        for _ in range(2):
            assert numpy_payload.pack(value) == packed
            assert exactly(numpy_payload.unpack(packed)[()], value)


def test_a_dict_that_msgpack_numpy_would_take_for_an_array_stays_a_dict() -> None:
    for value in (msgpack_numpy.encode(np.arange(3.0)), msgpack_numpy.encode(np.float32(1)), {b"nd": [b"nd"]}):
        mine = {key: bytes(item) if isinstance(item, memoryview) else item for key, item in value.items()}
        for inline in (0, 1024):
            assert exactly(back(mine, inline), mine)
            assert exactly(back([mine, (mine,)], inline), [mine, (mine,)])
    key = {b"nd": 1, (b"nd",): b"nd"}
    assert exactly(back(key), key)


EXPLODED: list[int] = []


def explode() -> None:
    EXPLODED.append(1)


class Exploding:
    def __reduce__(self) -> Any:
        return explode, ()


@pytest.mark.parametrize("code", [ARRAY, SCALAR, BUFFER_ARRAY])
@pytest.mark.parametrize("dtype", ["|O", "<f8"])
def test_a_payload_of_the_kind_of_objects_is_refused_before_its_pickle_is_opened(code: int, dtype: str) -> None:
    pickled = pickle.dumps(Exploding())
    data = 0 if code == BUFFER_ARRAY else pickled
    tree = array_ext(dtype, 1, code=code, kind=b"O", data=data)
    buffers = [pickled] if code == BUFFER_ARRAY else []
    for allow_pickle in (True, False):
        with pytest.raises(CodecError, match="kind b'O'"):
            decode(sealed(0, len(buffers), tree), buffers, allow_pickle=allow_pickle)
    assert not EXPLODED
    pickle.loads(pickled)  # it would have told
    assert EXPLODED.pop() == 1


@pytest.mark.usefixtures("no_pickle_in_msgpack_numpy")
@pytest.mark.parametrize("inline", [0, 1024])
def test_arrays_of_objects_go_by_the_codecs_own_pickle(inline: int) -> None:
    for value in (
        np.array([None, "a"]),
        np.array(None),
        np.zeros((0, 2), object),
        np.array([(1, [2])], dtype=[("a", "i4"), ("b", "O")]),
        np.zeros((), [("b", "O")])[()],
    ):
        encoded = encode(value, inline=inline)
        assert not encoded.plain
        assert str(back(value, inline)) == str(value)


def test_a_dimension_that_looks_like_the_key_of_the_bytes_misleads_nobody() -> None:
    array: Any = np.ndarray((0xC4, 4, *b"data", 0), "f8", b"")
    for _ in range(3):
        assert exactly(back(array), array)
        assert exactly(back(np.zeros((2, 3))), np.zeros((2, 3)))


def test_more_shapes_than_are_remembered_come_back() -> None:
    for size in range(1, 3000):
        array = np.full((size % 50, size), 1, "u1") if size < 100 else np.empty((0, size))
        assert exactly(back(array), array)


# ---- memory: whose, and who may write ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "array", [np.arange(1000.0), np.asfortranarray(np.ones((30, 40))), np.ones(300, STRUCTURED[1])]
)
def test_a_contiguous_array_is_not_copied(array: Any) -> None:
    (buffer,) = encode(array).buffers
    assert (buffer.ndim, buffer.format, buffer.nbytes, buffer.c_contiguous) == (1, "B", array.nbytes, True)
    assert np.shares_memory(np.frombuffer(buffer, "u1"), array)
    got = decode(encode(array).header, [buffer])
    assert np.shares_memory(got, array)


def test_long_buffers_of_a_pickle_are_not_copied_either() -> None:
    data = np.arange(1000.0)
    header, buffers, _ = encode(Record("x", data))
    assert np.shares_memory(np.frombuffer(buffers[0], "u1"), data)
    assert np.shares_memory(decode(header, buffers).data, data)


def test_an_array_that_is_there_twice_is_sent_once() -> None:
    array, text = np.arange(1000.0), b"x" * 3000
    header, buffers, plain = encode([array, (array, text), text])
    assert len(buffers) == 2
    assert plain
    assert exactly(decode(header, buffers), [array, (array, text), text])


def test_a_bytearray_may_be_resized_while_its_encoded_form_is_held() -> None:
    value = bytearray(5000)
    encoded = encode(value)
    value.extend(b"more")
    assert decode(encoded.header, encoded.buffers) == bytearray(5000)


@pytest.mark.parametrize("inline", [0, 1 << 20])
def test_arrays_are_read_only_whatever_they_came_in(inline: int) -> None:
    value = {
        "a": np.arange(200.0),
        "b": [(np.arange(3),)],
        "c": Record("x", np.arange(200.0)),
        "d": np.array([None]),
    }
    header, buffers, _ = encode(value, inline=inline)
    got = decode(header, [memoryview(bytearray(buffer)) for buffer in buffers])
    for array in (got["a"], got["b"][0][0], got["c"].data, got["d"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1


@pytest.mark.parametrize("inline", [0, 1 << 20])
def test_a_copy_is_private_and_can_be_written_to(inline: int) -> None:
    value = {
        "a": np.arange(200.0),
        "b": [(np.arange(3),)],
        "c": Record("x", np.arange(200.0)),
        "d": np.array([None]),
    }
    header, buffers, _ = encode(value, inline=inline)
    held = [bytearray(buffer) for buffer in buffers]
    got = decode(header, held, copy=True)
    for array in (got["a"], got["b"][0][0], got["c"].data, got["d"]):
        array[...] = 7
    assert held == [bytearray(buffer) for buffer in buffers]
    assert exactly(decode(header, held)["a"], value["a"])
    record = back(np.zeros((), "i4,f8")[()], copy=True)
    record["f0"] = 3
    assert record["f0"] == 3


def test_short_arrays_are_aligned_in_memory() -> None:
    for got in back([np.arange(n, dtype="g") for n in range(1, 20)]):
        assert got.flags.aligned


def test_a_memmap_is_sent_as_an_array_from_its_pages(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "data", "f8", "w+", shape=(1000,))
    header, buffers, plain = encode(mapped[10:900])
    assert plain
    assert np.shares_memory(np.frombuffer(buffers[0], "u1"), mapped)
    assert type(decode(header, buffers)) is np.ndarray


def test_hundreds_of_megabytes_pass() -> None:
    size = 300 << 20  # msgpack stops at 100 MiB unless told
    assert len(back_flat(bytes(size))) == size
    assert back_flat(np.zeros(size, "u1")).nbytes == size
    assert len(decode(*encode(bytes(size), inline=1 << 40)[:2])) == size


def test_a_long_text_and_a_long_list_pass() -> None:
    assert len(back("x" * (110 << 20))) == 110 << 20
    assert len(back([0.5] * 2_000_000)) == 2_000_000


# ---- the same bytes for the same value --------------------------------------------------------------------

SETS = """
import enum, hashlib
from qjam_worker.values.codec import encode
Colour = enum.Enum("Colour", [(f"C{i}", i) for i in range(9)], module="colours")
import sys; sys.modules["colours"] = sys.modules["__main__"]
words = [f"word{i}" for i in range(50)]
value = [
    set(words), frozenset(words), {frozenset({w, w * 2}) for w in words},
    {(w, i) for i, w in enumerate(words)},
    {"a": {w.encode() for w in words}}, {*words, 1, None, 2.5, b"x"}, {float(i) / 7 for i in range(50)},
    {w.encode() * 500 for w in words}, {2**100 + i for i in range(9)},
]
header, buffers, _ = encode(value)
for data in (header, encode(set(Colour)).header, *buffers):
    print(hashlib.sha256(data).hexdigest())
"""


def test_equal_sets_have_equal_bytes_whatever_the_hash_seed() -> None:
    told = {run_python(SETS, PYTHONHASHSEED=seed) for seed in ("1", "2", "77")}
    assert len(told) == 1


def test_equal_values_have_equal_bytes_also_where_one_shares_its_parts() -> None:
    row = [1, 2.5, "x"]
    assert encode([row, row, (row,)]) == encode([[1, 2.5, "x"], [1, 2.5, "x"], ([1, 2.5, "x"],)])


def test_a_dict_keeps_its_order() -> None:
    for keys in ("zam", [(3,), (1,), "b", (2,)]):
        assert list(back(dict.fromkeys(keys))) == list(keys)


# ---- depth, cycles, sharing -------------------------------------------------------------------------------


def nested(make: Callable[[Any], Any], depth: int) -> Any:
    value: Any = make(())
    for _ in range(depth):
        value = make(value)
    return value


def depth_of(value: Any) -> int:
    depth = 0
    while value and value != ((),):
        (value,) = value.values() if isinstance(value, dict) else value
        depth += 1
    return depth


MAKERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "odd dict": lambda inner: {(1,): inner},
    "frozenset": lambda inner: frozenset([inner]),
    "key": lambda inner: (frozenset([inner]),),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("depth", [50, 99, 150])
def test_values_nested_by_the_hundred_come_back(kind: str, depth: int) -> None:
    assert depth_of(back(nested(MAKERS[kind], depth))) == depth_of(nested(MAKERS[kind], depth))


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "odd dict"])
@pytest.mark.parametrize("depth", [500, 1000, 5000, 100_000])
def test_values_nested_by_the_thousand_come_back_or_are_refused(kind: str, depth: int) -> None:
    value = nested(MAKERS[kind], depth)
    try:
        got = back(value)
    except CodecError:
        return
    assert depth_of(got) == depth_of(value)


def test_what_is_nested_too_deeply_even_for_pickle_is_told() -> None:
    with pytest.raises(CodecError, match="a value of type list is nested too deeply"):
        encode(nested(MAKERS["list"], 100_000))


def test_a_value_nested_in_5000_frozensets_comes_back_or_is_refused() -> None:
    for depth in (300, 900, 5000):
        value: frozenset[Any] = frozenset()
        for _ in range(depth):
            value = frozenset([value])
        try:
            header, buffers, _ = encode(value)
            decode(header, buffers)
        except CodecError:
            pass


def test_little_stack_left_is_success_or_a_codec_error() -> None:
    header, buffers, _ = encode(nested(MAKERS["tuple"], 90))

    def at(frames: int, call: Callable[[], Any]) -> Any:
        return call() if frames == 0 else at(frames - 1, call)

    refused = 0
    for frames in range(0, sys.getrecursionlimit() - 150, 10):
        for call in (lambda: encode(nested(MAKERS["tuple"], 90)), lambda: decode(header, buffers)):
            try:
                at(frames, call)
            except CodecError:
                refused += 1
    assert refused < 100


def test_a_value_that_holds_itself_comes_back_holding_itself() -> None:
    loop: list[Any] = [1, np.arange(3)]
    loop.append((loop,))
    got = back(loop)
    assert got[2][0] is got
    mapping: dict[str, Any] = {}
    mapping["self"] = [mapping]
    got = back(mapping)
    assert got["self"][0] is got


def test_a_value_that_would_be_written_far_larger_than_it_is_goes_by_pickle() -> None:
    value: Any = [1]
    for _ in range(60):
        value = [value, value]
    got = back(value)
    assert got[0] is got[1]
    row = list(range(1000))
    assert len(encode([row] * 100_000).header) < 1 << 20


def test_many_threads_may_encode_and_decode_at_once() -> None:
    wrong: list[Any] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            value = {
                "a": [(chance.random(), chance.randbytes(chance.randrange(2000)))],
                "b": Record(str(seed), seed),
            }
            if back(value) != value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- bytes that are no value ------------------------------------------------------------------------------

SAMPLE: list[Any] = [
    (1, 2.5, {"a": np.arange(3)}), {1, "a"}, {(1, 2): 2**100}, np.float32(1), 1j,
    bytearray(b"x"), b"y" * 2000,
    np.asfortranarray(np.ones((20, 30))), np.zeros(2, STRUCTURED[2]),
    np.str_("x"), np.datetime64("2020-01-01"),
    frozenset([(1,)]), [[], [None]],
]  # fmt: skip


def sealed(flags: int, buffers: int, tree: bytes, pickled: bytes = b"", places: bytes = b"") -> bytes:
    """A header with a right checksum, whatever is in it."""
    rest = struct.pack("<BIQQ", flags, buffers, len(pickled), len(places)) + pickled + places + tree
    return struct.pack("<I", zlib.crc32(rest)) + rest


def value_or_codec_error(header: bytes, buffers: list[Any], **options: Any) -> None:
    for copy in (False, True):
        try:
            decode(header, buffers, copy=copy, **options)
        except CodecError:
            pass


@pytest.mark.parametrize("value", [SAMPLE, [Record("a", np.arange(500))]])
def test_every_flipped_bit_and_every_cut_of_a_header_is_seen(value: Any) -> None:
    header, buffers, _ = encode(value)
    for bit in range(8 * len(header)):
        changed = bytearray(header)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            decode(bytes(changed), buffers)
    for end in range(len(header)):
        with pytest.raises(CodecError):
            decode(header[:end], buffers)
    with pytest.raises(CodecError):
        decode(header + b"\0", buffers)


@pytest.mark.parametrize("value", [SAMPLE, [Record("a", np.arange(500)), np.arange(600)]])
def test_buffers_lost_added_cut_or_swapped_are_seen(value: Any) -> None:
    header, buffers, _ = encode(value)
    assert len(buffers) == 2
    for wrong in (
        [], buffers[:1], [*buffers, b""], buffers[::-1], [buffers[0], buffers[1][:-1]], [b"", buffers[1]],
        [buffers[0], bytes(buffers[1]) + b"\0"],
    ):  # fmt: skip
        with pytest.raises(CodecError):
            decode(header, wrong)


def test_what_is_not_bytes_is_refused() -> None:
    for header, buffers in (
        ("text", []),
        (None, []),
        (encode(1).header, ["text"]),
        (encode(1).header, [None]),
    ):
        with pytest.raises(CodecError):
            decode(header, buffers)  # type: ignore[arg-type]


def array_ext(dtype: Any, *shape: int, code: int = ARRAY, data: Any = b"12345678", **others: Any) -> bytes:
    """An ext type with what msgpack-numpy would make of such an array, whether there can be one or not."""
    encoding = {b"nd": True, b"type": dtype, b"kind": b"", b"shape": shape}
    encoding.update({key.encode(): value for key, value in others.items()})
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb({**encoding, b"data": data})))


BAD_TREES = {
    "nothing": b"",
    "two values": b"\1\2",
    "never used byte": b"\xc1",
    "cut list": b"\x93\1",
    "list of 4e9": b"\xdd\xff\xff\xff\xff",
    "bytes of 4e9": b"\xc6\xff\xff\xff\xff",
    "ext of 4e9": b"\xc9\xff\xff\xff\xff\1",
    "nested 100,000 deep": b"\x91" * 100_000,
    "nested 1,000 deep": b"\x91" * 1000 + b"\0",
    "unhashable key": b"\x81\x90\1",
    "not utf-8": b"\xa1\xff",
    "unknown ext": msgpack.packb(msgpack.ExtType(99, b"")),
    "timestamp": b"\xd6\xff\0\0\0\0",
    "object not there": msgpack.packb(msgpack.ExtType(OBJECT, b"\5\0\0\0")),
    "short object": msgpack.packb(msgpack.ExtType(OBJECT, b"")),
    "bare mark": msgpack.packb(msgpack.ExtType(TUPLE, b"")),
    "mark in a list": msgpack.packb([1, msgpack.ExtType(TUPLE, b"")]),
    "mark in a tuple": msgpack.packb([msgpack.ExtType(TUPLE, b""), msgpack.ExtType(SET, b"")]),
    "mark in a set": msgpack.packb([msgpack.ExtType(SET, b""), msgpack.ExtType(SET, b"")]),
    "mark in a dict": msgpack.packb({"a": msgpack.ExtType(SET, b"")}),
    "mark as a key": msgpack.packb({msgpack.ExtType(SET, b""): (1,)}),
    "key without a value": msgpack.packb([msgpack.ExtType(DICT, b""), 1, 2, 3]),
    "dict with a list for key": msgpack.packb([msgpack.ExtType(DICT, b""), [], 1]),
    "set of lists": msgpack.packb([msgpack.ExtType(SET, b""), []]),
    "set of bytes": msgpack.packb([msgpack.ExtType(SET, b""), b"abc"]),
    "short complex": msgpack.packb(msgpack.ExtType(COMPLEX, b"abc")),
    "bytes of no kind": msgpack.packb(msgpack.ExtType(BYTES, struct.pack("<BIQ", 9, 0, 0))),
    "bytes of no buffer": msgpack.packb(msgpack.ExtType(BYTES, struct.pack("<BIQ", 0, 7, 1))),
    "short scalar": array_ext("<f8", nd=False, code=SCALAR, data=b"1234"),
    "long scalar": array_ext("<f8", nd=False, code=SCALAR, data=b"1234567890123456"),
    "array of nothing": msgpack.packb(msgpack.ExtType(ARRAY, b"")),
    "array of a list": msgpack.packb(msgpack.ExtType(ARRAY, b"\x90")),
    "array of an empty dict": msgpack.packb(msgpack.ExtType(ARRAY, b"\x80")),
    "array of a complex": msgpack.packb(msgpack.ExtType(ARRAY, msgpack.packb({b"complex": True, b"data": "1j"}))),
    "array of 99 dimensions": array_ext("<f8", *[1] * 99),
    "array of no dtype": array_ext("", 1),
    "array of no dtype at all": array_ext(None, 1),
    "array of a wrong dtype": array_ext("what", 1),
    "array of fields by name": array_ext("i4,i4", 1),
    "array of objects": array_ext("|O", 1),
    "array of python's objects": array_ext("object", 1),
    "array of fields of objects": array_ext({"names": ["a"], "formats": ["|O"], "offsets": [0], "itemsize": 8}, 1),
    "array of msgpack-numpy's fields": array_ext([["a", "<f8"]], 1, kind=b"V"),
    "array of msgpack-numpy's objects": array_ext("|O", 1, kind=b"O"),
    "array of a bad structure": array_ext({"names": 1}, 1),
    "array of fields outside": array_ext({"names": ["a"], "formats": ["<f8"], "offsets": [8], "itemsize": 8}, 1),
    "array of itself": array_ext([["<f8", [-1]], [2**40]], 1),
    "array of a huge item": array_ext({"names": ["a"], "formats": [["<f8", [2**40]]]}, 1),
    "array too large": array_ext("<f8", 2**40),
    "array too large to count": array_ext("<f8", 2**63, 2**63, 2),
    "empty array with a large side": array_ext("<f8", 0, 2**64 - 1),
    "array too short": array_ext("<f8", 2),
    "array too long": array_ext("<f8", 1, data=b"123456789"),
    "array of no shape": array_ext("<f8", shape=None),
    "array of a text": array_ext("<f8", 1, data="12345678"),
    "array of no buffer": array_ext("<f8", 1, code=BUFFER_ARRAY, data=3),
    "array of bytes for a buffer": array_ext("<f8", 1, code=BUFFER_ARRAY),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_forged_tree_with_a_right_checksum_is_refused_or_harmless(name: str) -> None:
    for flags in range(4):
        value_or_codec_error(sealed(flags, 0, BAD_TREES[name]), [])
    if name not in ("timestamp", "nested 1,000 deep"):
        with pytest.raises(CodecError):
            decode(sealed(TAGGED, 0, BAD_TREES[name]), [])


def test_forged_sizes_of_the_pickle_are_refused() -> None:
    for pickled, places in (
        (b"", b""),
        (b"\x80\x05.", b"\x90"),
        (b"N.", b"\x90"),
        (pickle.dumps([1]), b"\x91\x92\5\1"),
    ):
        value_or_codec_error(sealed(HAS_PICKLE, 0, b"\1", pickled, places), [])
    rest = struct.pack("<BIQQ", HAS_PICKLE, 0, 2**63, 2**63) + b"\1"
    with pytest.raises(CodecError):
        decode(struct.pack("<I", zlib.crc32(rest)) + rest, [])


@settings(max_examples=500)
@given(st.data())
def test_mutated_trees_with_a_right_checksum_give_a_value_or_a_codec_error(data: st.DataObject) -> None:
    header, buffers, _ = encode(SAMPLE)
    tree = bytearray(header[BODY:])
    for _ in range(data.draw(st.integers(1, 4))):
        lo = data.draw(st.integers(0, len(tree)))
        tree[lo : lo + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    value_or_codec_error(sealed(header[4], 2, bytes(tree)), buffers, allow_pickle=False)


@settings(max_examples=300)
@given(st.integers(0, 255), st.binary(max_size=80), st.lists(st.binary(max_size=20), max_size=3))
def test_random_trees_with_a_right_checksum_give_a_value_or_a_codec_error(
    flags: int, tree: bytes, buffers: list[bytes]
) -> None:
    value_or_codec_error(sealed(flags, len(buffers), tree), buffers, allow_pickle=False)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data, [])


# ---- the flat form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, SAMPLE, np.arange(1000.0), [Record("a", np.arange(500))], {"a": 1}])
def test_the_flat_form_is_its_pieces_in_order_with_aligned_buffers(value: Any) -> None:
    encoded = encode(value)
    joined = b"".join(flat_pieces(encoded))
    assert len(joined) == flat_size(encoded)
    out = memoryview(bytearray(b"?" * (len(joined) + 100)))
    assert write_flat(encoded, out) == len(joined)
    assert bytes(out) == joined + b"?" * 100
    header, buffers = read_flat(out)
    assert bytes(header) == encoded.header
    assert [bytes(buffer) for buffer in buffers] == [bytes(buffer) for buffer in encoded.buffers]
    base = np.frombuffer(out, "u1").ctypes.data
    for buffer in buffers:
        assert buffer.readonly
        assert (np.frombuffer(buffer, "u1").ctypes.data - base) % 64 == 0


def test_the_buffers_in_the_pieces_are_the_users_memory() -> None:
    array = np.arange(1000.0)
    assert any(np.shares_memory(np.frombuffer(s, "u1"), array) for s in flat_pieces(encode(array)))


def test_a_flat_value_is_read_where_it_lies() -> None:
    array = np.arange(1000.0)
    out = memoryview(bytearray(flat_size(encode(array))))
    write_flat(encode(array), out)
    got = decode(*read_flat(out))
    assert np.shares_memory(got, np.frombuffer(out, "u1"))
    assert not got.flags.writeable


def test_writing_where_there_is_no_room_is_a_codec_error() -> None:
    encoded = encode(np.arange(1000.0))
    with pytest.raises(CodecError, match=rf"takes {flat_size(encoded)} bytes, and there is room for 10"):
        write_flat(encoded, memoryview(bytearray(10)))


def test_every_cut_of_a_flat_form_is_seen() -> None:
    flat = b"".join(flat_pieces(encode([np.arange(200.0), (1, np.arange(150.0))])))
    for end in range(len(flat)):
        with pytest.raises(CodecError):
            read_flat(flat[:end])


@settings(max_examples=300)
@given(st.data())
def test_a_mutated_flat_form_gives_views_or_a_codec_error(data: st.DataObject) -> None:
    flat = bytearray(b"".join(flat_pieces(encode(SAMPLE))))
    for _ in range(data.draw(st.integers(1, 4))):
        flat[data.draw(st.integers(0, 40))] = data.draw(st.integers(0, 255))
    try:
        header, buffers = read_flat(flat)
        decode(header, buffers)
    except CodecError:
        pass


@given(st.binary(max_size=100))
def test_random_bytes_are_no_flat_form(data: bytes) -> None:
    with pytest.raises(CodecError):
        read_flat(data)
    with pytest.raises(CodecError):
        read_flat(b"qjv1" + data[:11])
