"""Large arrays added up in segments, and the pages in which node and worker leave each other word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import usercode
from qjam import DataSet, Master
from qjam_worker.ipc.files import Mapped
from qjam_worker.ipc.mailbox import MAILBOX, TEXT, Mailbox
from qjam_worker.ipc.slots import SLOT
from qjam_worker.node.results import Held, Slot, fold_rows
from qjam_worker.values import codec, flat, segmented_sum
from qjam_worker.values.reduction import Tree, default_reduce

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i1", "u2", "u8"]


def flat_bytes(value: Any) -> memoryview:
    return memoryview(b"".join(flat.pieces(codec.encode(value, inline=8))))


def array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    numbers = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)
    return (numbers + 1j * numbers[::-1] if dtype[0] == "c" else np.abs(numbers)).astype(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 23),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.sampled_from([(2,), (777,), (40_000,), (3, 50), (0, 4), (1,)]),
    st.integers(0, 1 << 30),
    st.data(),
)
def test_the_segments_make_what_the_tree_makes_to_the_last_bit(
    n: int, parts: int, dtype: str, shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    tree, folded = Tree(n), Tree(n)
    for index in range(n):
        value = array(rng, dtype, shape)
        tree.add((index, index + 1), value)
        folded.add((index, index + 1), value)
    for index in data.draw(st.lists(st.integers(0, n - 1), max_size=3)):  # some were folded before
        if (index, index + 1) in tree.values and tree.pairs():
            left, right = tree.pairs()[0]
            total = tree.take(left) + tree.take(right)
            tree.add((left[0], right[1]), total)
    folded.fold(default_reduce)
    flats = {span: flat_bytes(value) for span, value in tree.values.items()}
    if len(flats) < 2 or not segmented_sum.are_alike(flats.values()):
        assert len(flats) < 2 or np.prod(shape) * np.dtype(dtype).itemsize <= 8
        return
    out = memoryview(bytearray(len(next(iter(flats.values())))))
    for part in rng.permutation(parts):
        segmented_sum.add_up(flats, n, out, int(part), parts)
    result = flat.load(out)
    assert result.dtype == dtype
    assert result.shape == shape
    assert result.tobytes() == folded.values[0, n].tobytes()


LONG = np.ones(1000)


@pytest.mark.parametrize(
    "values",
    [
        [LONG, LONG.astype("f4")],
        [LONG, np.ones(1001)],
        [LONG, LONG.reshape(10, 100)],
        [LONG > 0, LONG > 0],
        [LONG.tolist(), LONG.tolist()],
        [[LONG], [LONG]],
        [(LONG, 1.0), (LONG, 1.0)],
        [LONG.astype("M8[s]"), LONG.astype("M8[s]")],
        ["text" * 1000, "text" * 1000],
        [LONG, None],
    ],
)
def test_what_does_not_add_up_number_by_number_is_not_alike(values: list[Any]) -> None:
    assert not segmented_sum.are_alike([flat_bytes(value) for value in values])


def test_arrays_of_one_kind_are_alike() -> None:
    assert segmented_sum.are_alike([flat_bytes(LONG), flat_bytes(2 * LONG)])


@pytest.fixture(scope="module")
def master(request: pytest.FixtureRequest) -> Iterator[Master]:
    with Master(request.param) as master:
        yield master


@pytest.mark.parametrize("dtype", ["f8", "f4", "c16", "i2"])
@pytest.mark.parametrize("master", [1, 2, 5], indirect=True)
def test_large_results_are_the_serial_sum_to_the_last_bit(master: Master, dtype: str) -> None:
    rng = np.random.default_rng(1)
    params = array(rng, dtype, (300, 1001))
    numbers = [float(number) for number in rng.standard_normal(7)]
    data = DataSet(numbers, slice_size=1)
    tree = Tree(7)
    for index in range(7):
        tree.add((index, index + 1), usercode.seventh(params, [numbers[index]]))
    tree.fold(default_reduce)
    for _ in range(3):
        result = master.run(usercode.seventh, params, data)
        assert result.dtype == tree.values[0, 7].dtype
        assert result.tobytes() == tree.values[0, 7].tobytes()
    arrays, count = master.run(usercode.times_and_count, params, data)  # pair by pair
    assert count == pytest.approx(sum(numbers))
    assert arrays.shape == params.shape


# ---- rows of small results --------------------------------------------------------------------------------------


def laid(values: list[Any], order: list[int] | None = None) -> list[Held]:
    """The results of slices, in the slots of so many workers."""
    memory = memoryview(bytearray(len(values) * SLOT))
    slots = [Slot(Mapped("slots", memory[row * SLOT : (row + 1) * SLOT]), memory, row) for row in range(len(values))]
    found = []
    for value, row in zip(values, order or range(len(values)), strict=True):
        encoded = codec.encode(value)
        found.append(slots[row].hold(encoded.plain, 0, flat.write(encoded, slots[row].view)))
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 33),
    st.sampled_from(["f8", "f4", "i8", "i2", "u8"]),
    st.sampled_from([(300,), (8000,), (40, 50), (2, 3, 500)]),
    st.integers(0, 1 << 30),
)
def test_rows_make_what_the_tree_makes_to_the_last_bit(n: int, dtype: str, shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [array(rng, dtype, shape) for _ in range(n)]
    tree = Tree(n)
    for index, value in enumerate(values):
        tree.add((index, index + 1), value)
    tree.fold(default_reduce)
    results = laid(values)
    total = fold_rows(results)
    if np.prod(shape) * np.dtype(dtype).itemsize <= 1024:  # lies in the header
        assert total is None
        return
    assert total is not None
    assert total.value.dtype == dtype
    assert total.value.shape == shape
    assert total.value.tobytes() == tree.values[0, n].tobytes()
    assert total.value.flags.owndata
    assert all(held.flat is None for held in results)


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ([LONG, LONG], [1, 0]),
        ([LONG, LONG.astype("f4")], None),
        ([LONG, np.ones(1001)], None),
        ([LONG, [LONG]], None),
        ([1.0, 2.0], None),
        ([LONG > 0, LONG > 0], None),
        ([np.empty(0), np.empty(0)], None),
    ],
)
def test_rows_that_are_not_alike_or_not_in_order_are_left(values: list[Any], order: list[int] | None) -> None:
    results = laid(values, order)
    before = [bytes(held.flat or b"") for held in results]
    assert fold_rows(results) is None
    assert [bytes(held.flat or b"") for held in results] == before


def test_what_was_copied_out_of_a_slot_is_left() -> None:
    results = laid([LONG, LONG, LONG])
    results[1].detach()
    assert fold_rows(results) is None
    assert np.array_equal(results[1].opened(), LONG)


@pytest.mark.parametrize("workers", [2, 3, 5, 8, 13])
def test_small_results_of_as_many_slices_as_workers_are_the_serial_sum(workers: int) -> None:
    rng = np.random.default_rng(workers)
    params, numbers = rng.standard_normal(3934), [float(number) for number in rng.standard_normal(workers)]
    tree = Tree(workers)
    for index, number in enumerate(numbers):
        tree.add((index, index + 1), params * number)
    tree.fold(default_reduce)
    with Master(workers) as master:
        for _ in range(5):
            assert master.run(usercode.scaled, params, numbers).tobytes() == tree.values[0, workers].tobytes()


# ---- mailboxes --------------------------------------------------------------------------------------------------


def test_a_message_is_read_by_the_other_side() -> None:
    memory = memoryview(bytearray(MAILBOX))
    ours, theirs = Mailbox(memory), Mailbox(memory)
    for message in ({"op": "run", "slices": [[0, None, 0]]}, {"op": "run", "slices": [[1, None, 0]]}, None, {}):
        assert ours.task.write(message)
        assert theirs.task.read() == message
        assert ours.answer.write({"echo": message})
        assert theirs.answer.read() == {"echo": message}


def test_a_message_like_the_last_one_is_not_read_again() -> None:
    memory = memoryview(bytearray(MAILBOX))
    ours, theirs = Mailbox(memory), Mailbox(memory)
    ours.task.write({"op": "run"})
    first = theirs.task.read()
    ours.task.write({"op": "run"})
    assert theirs.task.read() is first


def test_a_message_that_is_too_long_is_not_left() -> None:
    memory = memoryview(bytearray(MAILBOX))
    ours, theirs = Mailbox(memory), Mailbox(memory)
    ours.task.write({"op": "run"})
    assert not ours.task.write({"text": "x" * TEXT})
    assert theirs.task.read() == {"op": "run"}
    assert ours.task.write({"text": "x" * (TEXT - 100)})
    assert theirs.task.read() == {"text": "x" * (TEXT - 100)}


def test_a_message_that_is_none_is_an_error() -> None:
    memory = memoryview(bytearray(MAILBOX))
    ours, theirs = Mailbox(memory), Mailbox(memory)
    ours.answer.write({"op": "done"})
    memory[:] = b"\xc1" * MAILBOX
    with pytest.raises(ValueError, match=r"(?i)unpack"):
        theirs.answer.read()
