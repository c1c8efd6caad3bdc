"""Messages come back from their frames; frames that are no message raise WireError and nothing else."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import pytest
from fuzzing.mutation import sealed
from hypothesis import given, settings
from hypothesis import strategies as st

from qjam_worker.wire.frames import MAX_HEADER, SMALL, VERSION, Kind, Message, WireError, pack, unpack
from qjam_worker.wire.messages import BUFFERS, HEADERS, MAX_BUFFERS, STATES, Field

LARGE = bytes(SMALL + 1)
ENTRY = {"epoch": 1, "reduce": False, "code": None, "shadows": [], "module": "m", "function": None, "shipped": True}
TASK = {"job": 1, "data": 3, "round": 2, "indices": [0, 1, 5], "params": "inline"}
RESULT = {"round": 1, "roots": [[0, 4, 2]], "seconds": 0.5}
LOST = {"state": "lost", "worker": 1, "how": "was killed", "pid": 77, "round": 3, "slice": None, "slices": [4]}

# Of each kind headers that are right, and how many buffers go with them.
SAMPLES: dict[Kind, list[tuple[dict[str, Any], int]]] = {
    Kind.HELLO: [
        ({"workers": 2, "credit": 1 << 24}, 0),
    ],
    Kind.WELCOME: [({"node": "a/1", "host": "a", "speculation": True}, 0)],
    Kind.JOB: [({"job": 1, "entry": ENTRY, "forget": [4]}, 0)],
    Kind.DATA: [({"data": 3, "slices": [[0, "ref"], [1, "other"]], "nslices": 2, "forget": []}, 0)],
    Kind.TASK: [
        (TASK, 2), ({**TASK, "data": None, "nslices": 6}, 2), ({**TASK, "params": "ref"}, 0),
        ({**TASK, "params": "have"}, 0),
    ],
    Kind.STATE: [
        ({"state": "ready", "workers": [77, 78]}, 0),
        ({"state": "replaced", "worker": 1, "pid": 79}, 0),
        (LOST, 0),
        ({key: LOST[key] for key in ("state", "worker", "how", "pid")}, 0),
        ({"state": "shared", "round": 1, "for": "b/1", "indices": []}, 0),
        ({"state": "note", "text": "t"}, 0),
    ],
    Kind.REFS: [
        ({"ref": ["slice", "r"], "offset": 0, "total": 3}, 1),
        ({"ref": ["params", "1"], "offset": 0, "total": 0, "gone": True}, 1),
    ],
    Kind.GET: [
        ({"round": None, "refs": [[["module", "1:m"], 0, None]]}, 0),
        ({"round": 1, "refs": [[["slice", "r"], 0, None], [["params", "1"], 3, 9]]}, 0),
    ],
    Kind.CREDIT: [({"bytes": 100}, 0)],
    Kind.RESULT: [(RESULT, 2)],
    Kind.ERROR: [
        ({"round": 1, "what": "task", "text": "t", "worker": 0, "slice": 3, "summary": "s"}, 1),
        ({"round": 1, "what": "room", "text": "t", "worker": None, "slice": None, "summary": "s"}, 0),
    ],
    Kind.CANCEL: [({"round": 1}, 0), ({"round": 1, "indices": [2]}, 0)],
    Kind.LOG: [({"worker": 0, "stream": 2}, 1)],
    Kind.PING: [({"t": 0.5}, 0)],
    Kind.PONG: [({"t": 0.5}, 0)],
    Kind.BYE: [({"reason": "done"}, 0)],
    Kind.SHARE: [({"round": 1, "count": 2, "seconds": 0.1, "for": "b/1"}, 0)],
    Kind.RELEASE: [({"data": [3], "forget": []}, 0)],
    Kind.CALLS: [({"ids": [7], "of": [1], "new": [1], "large": [[0, ["abc"]]]}, 2)],
    Kind.FORGET: [({"functions": [1], "arguments": ["abc"]}, 0)],
    Kind.RETURNS: [
        ({"ids": [7], "how": [0], "frames": [1], "begun": [8], "left": 3}, 1),
        ({"ids": [], "how": [], "frames": [], "begun": [], "left": 0, "recalled": True}, 0),
    ],
    Kind.RECALL: [({"count": 3, "cancelled": [8]}, 0)],
}  # fmt: skip
CASES = [(kind, header, count) for kind, cases in SAMPLES.items() for header, count in cases]

# What each kind refuses: the header that is right, but for these fields.
WRONG: dict[Kind, list[dict[str, Any]]] = {
    Kind.HELLO: [
        {"credit": -1}, {"credit": 1.5}, {"workers": []}, {"workers": True}, {"workers": 0}, {"workers": 1 << 17},
    ],
    Kind.WELCOME: [{"speculation": 1}, {"node": b"a"}, {"host": None}],
    Kind.JOB: [
        {"job": -1}, {"forget": ["x"]},
        {"entry": {}}, {"entry": {**ENTRY, "code": 5}}, {"entry": {**ENTRY, "shadows": "os"}},
    ],
    Kind.DATA: [
        {"nslices": 0}, {"nslices": 1 << 40}, {"slices": []}, {"slices": [[0]]}, {"slices": [[0, 1]]},
        {"slices": [["r", 0]]}, {"slices": [0, "ref"]}, {"slices": [[-1, "ref"]]}, {"slices": [[0, None]]},
        {"slices": [[0, "x" * 5000]]}, {"forget": ["x"]}, {"data": -1}, {"data": None},
    ],
    Kind.TASK: [
        {"data": -1}, {"data": [1]}, {"nslices": 0}, {"nslices": 1 << 40},
        {"indices": [0, "1"]}, {"indices": [-1]}, {"indices": {}}, {"params": 1}, {"params": None},
        {"params": "params:2"}, {"round": -1}, {"round": 1 << 60},
    ],
    Kind.REFS: [
        {"offset": -1}, {"total": 1 << 60}, {"gone": 1}, {"ref": None}, {"ref": "r"}, {"ref": ["r"]},
        {"ref": ["stone", "r"]}, {"ref": ["slice", 1]}, {"ref": ["slice", "x" * 5000]},
    ],
    Kind.GET: [
        {"round": -1}, {"round": "1"}, {"refs": []}, {"refs": [[["slice", "r"], -1, None]]},
        {"refs": [[["slice", "r"], 0, -1]]}, {"refs": [[["slice", "r"], None, 5]]},
        {"refs": [[["slice", "x" * 5000], 0, None]]}, {"refs": [[["slice", "r"], 0]]}, {"refs": [["slice:r", 0, None]]},
    ],
    Kind.CREDIT: [{"bytes": -1}, {"bytes": 1 << 63}, {"bytes": 0.5}],
    Kind.RESULT: [
        {"seconds": math.nan}, {"seconds": math.inf}, {"seconds": -1}, {"roots": []}, {"roots": [[0, 1]]},
        {"roots": [[0, 1, 0]]}, {"roots": [[0, 1, -1]]}, {"roots": [[0, 1, 2.0]]}, {"roots": [[False, True, 1]]},
        {"roots": [5]},
    ],
    Kind.ERROR: [
        {"what": "load"}, {"what": "timeout"}, {"worker": -1}, {"slice": "0"}, {"summary": None},
        {"text": "x" * (2 << 20)},
    ],
    Kind.CANCEL: [{"indices": None}, {"indices": [None]}],
    Kind.LOG: [{"stream": 0}, {"stream": 3}, {"worker": -1}],
    Kind.PING: [{"t": math.nan}, {"t": math.inf}, {"t": "0"}],
    Kind.PONG: [{"t": -math.inf}],
    Kind.BYE: [{"reason": "x" * (2 << 20)}],
    Kind.RELEASE: [{"data": 3}, {"data": [-1]}, {"forget": [None]}],
    Kind.CALLS: [{"ids": 7}, {"of": [-1]}, {"new": None}, {"large": [[0, [1]]]}],
    Kind.FORGET: [{"functions": ["f"]}, {"arguments": [1]}],
    Kind.RETURNS: [{"how": [-1]}, {"frames": None}, {"left": -1}, {"recalled": 1}],
    Kind.RECALL: [{"count": -1}, {"cancelled": [1.5]}],
    Kind.SHARE: [{"count": -1}, {"for": 1}, {"seconds": math.nan}],
}  # fmt: skip
WRONG_STATES: list[dict[str, Any]] = [
    {"state": "unheard"},
    {"state": "ready", "workers": []},
    {"state": "ready", "workers": [None]},
    {"state": "replaced", "worker": 1},
    {"state": "replaced", "worker": -1, "pid": 3},
    {**LOST, "slices": None},
    {**LOST, "slice": "3"},
    {**LOST, "how": 9},
    {"state": "shared", "round": 1, "for": "b", "indices": [0.0]},
    {"state": "note", "text": None},
]


def sample(kind: Kind) -> dict[str, Any]:
    return SAMPLES[kind][0][0]


def buffers_for(kind: Kind) -> tuple[bytes, ...]:
    return (b"abc", b"")[: SAMPLES[kind][0][1]]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)  # fmt: skip
buffers_of_any_length = st.lists(st.binary(max_size=40), max_size=5)


@pytest.mark.parametrize(("kind", "header", "count"), CASES)
def test_every_kind_comes_back(kind: Kind, header: dict[str, Any], count: int) -> None:
    buffers = [b"abc", b""][:count]
    message = unpack(pack(kind, header, buffers))
    assert message == (kind, header, buffers)
    assert type(message.kind) is Kind


def test_every_kind_has_a_sample() -> None:
    assert set(SAMPLES) == set(HEADERS) == set(Kind)
    assert {header["state"] for header, _ in SAMPLES[Kind.STATE]} == set(STATES)


@pytest.mark.parametrize("kind", Kind)
def test_tuples_may_stand_for_lists(kind: Kind) -> None:
    for header, count in SAMPLES[kind]:
        tuples = {name: tuple(value) if type(value) is list else value for name, value in header.items()}
        assert unpack(pack(kind, tuples, [b""] * count)).header == header


@given(st.dictionaries(st.text(), plain, max_size=4), buffers_of_any_length)
def test_any_header_and_buffers_come_back(extra: dict[str, Any], buffers: list[bytes]) -> None:
    header = {**extra, **TASK}
    assert unpack(pack(Kind.TASK, header, buffers)) == (Kind.TASK, header, buffers)


def test_large_buffers_are_frames_of_their_own_uncopied_and_small_ones_ride_in_the_first() -> None:
    big = memoryview(bytearray(SMALL + 1))
    small = bytes(range(256)) * (SMALL // 256)
    frames = pack(Kind.TASK, TASK, [b"", big, small, big, b"x"])
    assert len(frames) == 3
    assert frames[1] is frames[2] is big
    buffers = unpack(frames).buffers
    assert buffers == [b"", big, small, big, b"x"]
    assert buffers[1] is buffers[3] is big


@given(st.lists(st.sampled_from([0, 1, 8, SMALL - 1, SMALL, SMALL + 1, 2 * SMALL]), max_size=6), st.binary(max_size=9))
def test_buffers_of_any_size_come_back_in_their_order(sizes: list[int], filling: bytes) -> None:
    buffers = [(filling + bytes([number])) * size for number, size in enumerate(sizes)]
    assert unpack(pack(Kind.TASK, TASK, buffers)).buffers == buffers


def test_frames_may_be_views_and_buffers_need_not_be_of_bytes() -> None:
    numbers = memoryview(struct.pack("10d", *range(10))).cast("d")
    frames = pack(Kind.TASK, TASK, [numbers])
    arrived = [memoryview(bytes(memoryview(frame))) for frame in frames]
    assert bytes(unpack(arrived).buffers[0]) == bytes(numbers)


def test_a_text_with_lone_surrogates_gets_through() -> None:
    text = "File '/home/\udce9'"
    header = {"round": 1, "what": "task", "text": text, "worker": 0, "slice": 0, "summary": text}
    assert unpack(pack(Kind.ERROR, header)).header["text"] == text


def fields_of(kind: Kind, header: dict[str, Any]) -> dict[str, Field]:
    return HEADERS[kind] | (STATES[header["state"]] if kind is Kind.STATE else {})


@pytest.mark.parametrize(("kind", "header", "count"), CASES)
def test_each_field_is_asked_for_by_both_ends(kind: Kind, header: dict[str, Any], count: int) -> None:
    buffers = (b"abc", b"")[:count]
    for name, field in fields_of(kind, header).items():
        lacking = {key: value for key, value in header.items() if key != name}
        for call in (
            lambda: pack(kind, lacking, buffers),
            lambda: unpack(sealed(kind, msgpack.packb(lacking), buffers)),
        ):
            if field.needed:
                with pytest.raises(WireError, match=f"{kind.name} lacks '{name}'"):
                    call()
            else:
                call()
        for wrong in (object, b"x", {}, {"a": 1}):
            with pytest.raises(WireError, match=f"as '{name}', which must be"):
                pack(kind, {**header, name: wrong}, buffers)
        with pytest.raises(WireError, match=f"as '{name}', which must be"):
            unpack(sealed(kind, msgpack.packb({**header, name: b"x"}), buffers))


@pytest.mark.parametrize(("kind", "wrong"), [(kind, wrong) for kind, cases in WRONG.items() for wrong in cases])
def test_values_that_nobody_means_are_refused(kind: Kind, wrong: dict[str, Any]) -> None:
    header = {**sample(kind), **wrong}
    for call in (
        lambda: pack(kind, header, buffers_for(kind)),
        lambda: unpack(sealed(kind, msgpack.packb(header), buffers_for(kind))),
    ):
        with pytest.raises(WireError, match=f"as '{next(iter(wrong))}', which must be") as caught:
            call()
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("header", WRONG_STATES)
def test_states_that_nobody_means_are_refused(header: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        pack(Kind.STATE, header)
    with pytest.raises(WireError):
        unpack(sealed(Kind.STATE, msgpack.packb(header)))


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_has_the_buffers_that_go_with_it(kind: Kind) -> None:
    header, most = sample(kind), BUFFERS.get(kind, range(1))
    for count in {0, 1, 2, 3} - {*most}:
        with pytest.raises(WireError, match=f"{kind.name} has {count} buffers"):
            pack(kind, header, [b""] * count)
        with pytest.raises(WireError, match=f"{kind.name} has {count} buffers"):
            unpack(sealed(kind, msgpack.packb(header), (b"",) * count))


def test_a_number_of_thousands_of_digits_is_the_senders_error() -> None:
    with pytest.raises(WireError, match="as 'round', which must be"):
        pack(Kind.CANCEL, {"round": 10**6000})


def test_keys_that_are_numbers_are_refused_wherever_they_stand() -> None:
    # The hash of a number is the number: a dict of a few megabytes of them can take hours to fill.
    for header in ({**TASK, 1: 2}, {**TASK, "more": {1: 2}}):
        with pytest.raises(WireError):
            unpack(sealed(Kind.TASK, msgpack.packb(header)))


def test_an_error_tells_little_of_what_is_long() -> None:
    for header in ({str(number): "x" * 1000 for number in range(1000)}, {**TASK, "params": ["x" * 10**6] * 10}):
        with pytest.raises(WireError) as caught:
            unpack(sealed(Kind.TASK, msgpack.packb(header)))
        assert len(str(caught.value)) < 1000


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
    frames: list[Any] = pack(Kind.TASK, TASK, [LARGE, LARGE])
    for i in range(3):
        with pytest.raises(WireError, match="not bytes"):
            unpack([*frames[:i], "text", *frames[i + 1 :]])


def test_a_buffer_lost_or_added_is_refused() -> None:
    frames = pack(Kind.TASK, TASK, [LARGE, b"abc", LARGE])
    for wrong in (frames[:-1], frames[:1], [*frames, b"f"], [*frames, LARGE]):
        with pytest.raises(WireError, match="frames were lost, cut or added"):
            unpack(wrong)


def test_oversized_messages_are_refused_by_both_ends() -> None:
    huge = {"reason": "done", "more": "x" * MAX_HEADER}
    with pytest.raises(WireError, match=f"the limit is {MAX_HEADER}"):
        pack(Kind.BYE, huge)
    with pytest.raises(WireError, match=f"the limit is {MAX_HEADER}"):
        unpack(sealed(Kind.BYE, msgpack.packb(huge)))
    with pytest.raises(WireError, match=f"the limit is {MAX_BUFFERS}"):
        pack(Kind.TASK, TASK, [b""] * (MAX_BUFFERS + 1))
    with pytest.raises(WireError, match=f"the limit is {MAX_BUFFERS}"):
        unpack(sealed(Kind.TASK, msgpack.packb(TASK), count=2**32 - 1))
    many = pack(Kind.TASK, TASK, [b""] * MAX_BUFFERS)
    assert len(unpack(many).buffers) == MAX_BUFFERS


def test_a_header_of_many_megabytes_passes() -> None:
    more = "x" * (40 << 20)  # more than msgpack's usual limits
    assert unpack(pack(Kind.BYE, {"reason": "done", "more": more})).header["more"] == more


def test_every_flipped_bit_of_the_fixed_part_and_the_header_is_seen() -> None:
    buffers = [b"abc", LARGE]
    frames = [bytes(frame) for frame in pack(Kind.TASK, TASK, buffers)]
    for bit in range(8 * (len(frames[0]) - 3)):
        changed = bytearray(frames[0])
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack([bytes(changed), *frames[1:]])


def test_every_cut_is_seen() -> None:
    frames = [bytes(frame) for frame in pack(Kind.TASK, TASK, [b"abc", LARGE, b"defg"])]
    for which, frame in enumerate(frames):
        for end in range(max(0, len(frame) - 100), len(frame)):
            with pytest.raises(WireError):
                unpack([*frames[:which], frame[:end], *frames[which + 1 :]])
        with pytest.raises(WireError):
            unpack([*frames[:which], frame + b"\0", *frames[which + 1 :]])


@given(st.permutations(range(4)))
def test_every_other_order_is_seen_where_lengths_differ(order: list[int]) -> None:
    frames = pack(Kind.TASK, TASK, [LARGE, LARGE + b"a", LARGE + b"bc"])
    if order == sorted(order):
        assert unpack(frames).kind is Kind.TASK
    else:
        with pytest.raises(WireError):
            unpack([frames[i] for i in order])


def test_a_frame_of_one_message_in_another_is_seen() -> None:
    one, other = pack(Kind.TASK, TASK, [LARGE]), pack(Kind.TASK, {**TASK, "round": 3}, [LARGE + b"a"])
    with pytest.raises(WireError, match="lost, cut or added"):
        unpack([one[0], other[1]])


def test_a_header_in_place_of_another_one_is_seen() -> None:
    one, other = pack(Kind.TASK, TASK), pack(Kind.TASK, {**TASK, "round": 3})
    assert len(one[0]) == len(other[0])
    with pytest.raises(WireError, match="wrong checksum"):
        unpack([bytes(one[0])[:20] + bytes(other[0])[20:]])


@settings(max_examples=300)
@given(st.data())
def test_fuzzed_frames_give_a_message_or_a_wire_error(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in pack(Kind.RESULT, RESULT, [b"abc", LARGE])]
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, len(frames) - 1))
        lo, hi = sorted(data.draw(st.tuples(*[st.integers(0, len(frames[which]))] * 2)))
        frames[which][lo:hi] = data.draw(st.binary(max_size=12))
    try:
        assert type(unpack(frames)) is Message
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
