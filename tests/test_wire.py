"""Messages come back from their frames; frames that are no message raise WireError and nothing else."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjam_worker import wire
from qjam_worker.wire import MAX_BUFFERS, MAX_HEADER, REQUIRED, VERSION, Kind, WireError, pack, unpack

SAMPLES = {str: "x", int: 7, float: 0.5, list: [1, [2]], dict: {"a": None}}
TASK = {"job": 1, "round": 2, "indices": [0, 1, 5]}


def sample(kind: Kind) -> dict[str, Any]:
    return {name: SAMPLES[types[0] if isinstance(types, tuple) else types] for name, types in REQUIRED[kind].items()}


def sealed(kind: int, header: bytes, buffers: tuple[bytes, ...] = (), count: int | None = None) -> list[Any]:
    """Frames with a right checksum, whatever is in them."""
    fixed = struct.pack("!4sBBI", b"qjam", VERSION, kind, len(buffers) if count is None else count)
    lengths = b"".join(struct.pack("!Q", len(buffer)) for buffer in buffers)
    return [fixed + struct.pack("!I", zlib.crc32(fixed + header + lengths)), header, *buffers]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)  # fmt: skip
buffers_of_any_length = st.lists(st.binary(max_size=40), max_size=5)


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_comes_back(kind: Kind) -> None:
    message = unpack(pack(kind, sample(kind), [b"abc", b""]))
    assert message == (kind, sample(kind), [b"abc", b""])
    assert type(message.kind) is Kind


@given(st.dictionaries(st.text(), plain, max_size=4), buffers_of_any_length)
def test_any_header_and_buffers_come_back(extra: dict[str, Any], buffers: list[bytes]) -> None:
    header = {**extra, **TASK}
    assert unpack(pack(Kind.TASK, header, buffers)) == (Kind.TASK, header, buffers)


def test_the_frames_are_the_fixed_part_the_header_and_the_buffers_uncopied() -> None:
    big = memoryview(bytearray(1000))
    frames = pack(Kind.TASK, TASK, [big, b""])
    assert len(frames) == 4
    assert frames[2] is big
    assert unpack(frames).buffers[0] is big


def test_frames_may_be_views_and_buffers_need_not_be_of_bytes() -> None:
    numbers = memoryview(struct.pack("10d", *range(10))).cast("d")
    frames = pack(Kind.TASK, TASK, [numbers])
    arrived = [memoryview(bytes(memoryview(frame))) for frame in frames]
    assert bytes(unpack(arrived).buffers[0]) == bytes(numbers)


def test_a_text_with_lone_surrogates_gets_through() -> None:
    text = "File '/home/\udce9'"
    header = {"round": 1, "what": "OSError", "text": text}
    assert unpack(pack(Kind.ERROR, header)).header["text"] == text


@pytest.mark.parametrize("kind", Kind)
def test_each_required_field_is_asked_for_by_both_ends(kind: Kind) -> None:
    for name in REQUIRED[kind]:
        lacking = {key: value for key, value in sample(kind).items() if key != name}
        for call in (lambda: pack(kind, lacking), lambda: unpack(sealed(kind, msgpack.packb(lacking)))):
            with pytest.raises(WireError, match=f"{kind.name} lacks '{name}'"):
                call()
        for wrong in (None, True, b"x", object):
            header = {**sample(kind), name: wrong}
            with pytest.raises(WireError, match=f"'{name}' of {kind.name} is a"):
                pack(kind, header)
        with pytest.raises(WireError, match=f"'{name}' of {kind.name} is a NoneType"):
            unpack(sealed(kind, msgpack.packb({**sample(kind), name: None})))


def test_fields_that_are_not_required_are_kept() -> None:
    assert unpack(pack(Kind.BYE, {"reason": "done", "more": {"a": [1]}})).header["more"] == {"a": [1]}


@pytest.mark.parametrize(
    "header",
    [{"t": 1.0, "x": object()}, {"t": 1.0, "x": 2**64}, {"t": 1.0, "x": {1, 2}}, {"t": 1.0, 1: 2}, [], "t"],
)
def test_a_header_that_cannot_travel_is_the_senders_error(header: Any) -> None:
    with pytest.raises(WireError):
        pack(Kind.PING, header)


def test_a_header_that_holds_itself_is_the_senders_error() -> None:
    header: dict[str, Any] = {"t": 1.0}
    header["x"] = header
    with pytest.raises(WireError, match="cannot be packed"):
        pack(Kind.PING, header)


# ---- frames that are no message ---------------------------------------------------------------------------


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x81", b"\x90", b"\xa1t", b"\x81\x90\x01", b"\xdd\xff\xff\xff\xff"])
def test_a_header_that_is_no_dict_in_msgpack_is_refused(header: bytes) -> None:
    with pytest.raises(WireError):
        unpack(sealed(Kind.PING, header))


def test_a_header_nested_too_deeply_is_refused() -> None:
    with pytest.raises(WireError):
        unpack(sealed(Kind.PING, b"\x82\xa1t\x00\xa1x" + b"\x91" * 100_000 + b"\x00"))


def test_another_version_is_told_with_both_numbers_and_what_to_do() -> None:
    frames = pack(Kind.PING, {"t": 1.0})
    for other in (
        [b"qjam" + bytes([VERSION + 1]) + b"whatever", b"x"],
        [frames[0][:4] + b"\xff" + frames[0][5:], b""],
    ):
        with pytest.raises(WireError, match=f"version {other[0][4]}, this side {VERSION}: install the same"):
            unpack(other)


@pytest.mark.parametrize("frames", [[], [b""], [b"qjam"], [b"", b""], [b"GET / HTTP/1.1", b""], [b"qjam\x01", b"\x80"]])
def test_what_never_was_a_message_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        unpack(frames)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(WireError, match="no message kind 99"):
        unpack(sealed(99, msgpack.packb({})))


def test_a_frame_that_is_not_bytes_is_refused() -> None:
    frames: list[Any] = pack(Kind.TASK, TASK, [b"abc"])
    for i in range(3):
        with pytest.raises(WireError, match="not bytes"):
            unpack([*frames[:i], "text", *frames[i + 1 :]])


def test_a_buffer_lost_or_added_is_refused() -> None:
    frames = pack(Kind.TASK, TASK, [b"abc", b"de"])
    for wrong in (frames[:-1], frames[:2], [*frames, b"f"]):
        with pytest.raises(WireError, match="2 buffers were sent"):
            unpack(wrong)


def test_oversized_messages_are_refused_by_both_ends() -> None:
    huge = "x" * MAX_HEADER
    with pytest.raises(WireError, match=f"the limit is {MAX_HEADER}"):
        pack(Kind.BYE, {"reason": huge})
    with pytest.raises(WireError, match=f"the limit is {MAX_HEADER}"):
        unpack(sealed(Kind.BYE, msgpack.packb({"reason": huge})))
    with pytest.raises(WireError, match=f"the limit is {MAX_BUFFERS}"):
        pack(Kind.TASK, TASK, [b""] * (MAX_BUFFERS + 1))
    with pytest.raises(WireError, match=f"the limit is {MAX_BUFFERS}"):
        unpack(sealed(Kind.TASK, msgpack.packb(TASK), count=2**32 - 1))
    many = pack(Kind.TASK, TASK, [b""] * MAX_BUFFERS)
    assert len(unpack(many).buffers) == MAX_BUFFERS


def test_a_header_of_many_megabytes_passes() -> None:
    reason = "x" * (40 << 20)  # more than msgpack's usual limits
    assert unpack(pack(Kind.BYE, {"reason": reason})).header["reason"] == reason


def test_every_flipped_bit_of_the_fixed_part_and_the_header_is_seen() -> None:
    frames = [bytes(frame) for frame in pack(Kind.TASK, TASK, [b"abc"])]
    for which in (0, 1):
        for bit in range(8 * len(frames[which])):
            changed = bytearray(frames[which])
            changed[bit // 8] ^= 1 << bit % 8
            mutated = [*frames]
            mutated[which] = bytes(changed)
            with pytest.raises(WireError):
                unpack(mutated)


def test_every_cut_is_seen() -> None:
    frames = [bytes(frame) for frame in pack(Kind.TASK, TASK, [b"abc", b"defg"])]
    for which, frame in enumerate(frames):
        for end in range(len(frame)):
            with pytest.raises(WireError):
                unpack([*frames[:which], frame[:end], *frames[which + 1 :]])
        with pytest.raises(WireError):
            unpack([*frames[:which], frame + b"\0", *frames[which + 1 :]])


@given(st.permutations(range(5)))
def test_every_other_order_is_seen_where_lengths_differ(order: list[int]) -> None:
    frames = pack(Kind.TASK, TASK, [b"a", b"bc", b"def"])
    if order == sorted(order):
        assert unpack(frames).kind is Kind.TASK
    else:
        with pytest.raises(WireError):
            unpack([frames[i] for i in order])


def test_a_frame_of_one_message_in_another_is_seen() -> None:
    one, other = pack(Kind.TASK, TASK), pack(Kind.TASK, {**TASK, "round": 3})
    with pytest.raises(WireError, match="wrong checksum"):
        unpack([one[0], other[1]])


@settings(max_examples=300)
@given(st.data())
def test_fuzzed_frames_give_a_message_or_a_wire_error(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in pack(Kind.RESULT, {"round": 1, "roots": [[0, 4]]}, [b"abc", b"defgh"])]
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, len(frames) - 1))
        lo, hi = sorted(data.draw(st.tuples(*[st.integers(0, len(frames[which]))] * 2)))
        frames[which][lo:hi] = data.draw(st.binary(max_size=12))
    try:
        assert type(unpack(frames)) is wire.Message
    except WireError:
        pass


@settings(max_examples=300)
@given(st.integers(0, 255), st.binary(max_size=60), buffers_of_any_length)
def test_random_headers_with_a_right_checksum_give_a_message_or_a_wire_error(
    kind: int, header: bytes, buffers: list[bytes]
) -> None:
    try:
        assert unpack(sealed(kind, header, tuple(buffers))).kind == kind
    except WireError:
        pass


@given(st.lists(st.binary(max_size=30), max_size=6))
def test_random_frames_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        unpack(frames)
