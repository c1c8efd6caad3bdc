"""The ring of what calls came to: what is put is taken, in its order, and no garbage does any harm."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjam_worker.ipc.returns import MAX_RECORD, READ, RETURNS, RING, WORDS, WROTE, Return, Ring
from qjam_worker.values.outcomes import IN_FILE, VALUE


def ring() -> Ring:
    return Ring(memoryview(bytearray(RETURNS)))


SIZES = st.integers(0, 40) | st.integers(MAX_RECORD - 40, MAX_RECORD - 1) | st.integers(0, MAX_RECORD - 1)


@given(st.lists(st.tuples(SIZES, st.booleans()), max_size=40))
def test_what_is_put_is_taken_in_its_order(records: list[tuple[int, bool]]) -> None:
    its, expected, found = ring(), [], []
    for number, (size, take) in enumerate(records, start=1):
        one = Return(number, VALUE, bytes([number]) * size)
        while not its.put(*one):
            taken = its.take()
            assert taken, "there is no room in an empty ring"
            found += taken
        expected.append(one)
        if take:
            found += its.take()
    assert found + its.take() == expected
    assert its.take() == []


def test_a_ring_that_is_full_takes_no_more_until_it_is_read() -> None:
    its, put = ring(), 0
    while its.put(put + 1, VALUE, bytes(1000)):
        put += 1
    assert put == RING // 1016
    assert [one.call for one in its.take()] == list(range(1, put + 1))
    assert its.put(put + 1, VALUE, bytes(1000))


def test_a_ring_that_is_cleared_is_as_a_new_one() -> None:
    its = ring()
    its.put(1, VALUE, b"before")
    its.clear()
    assert its.take() == []
    its.put(2, VALUE, b"after")
    assert its.take() == [Return(2, VALUE, b"after")]


WORDS_OF_GARBAGE = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-100, RING + 100)


@given(WORDS_OF_GARBAGE, WORDS_OF_GARBAGE, st.integers(0, 1 << 32), st.booleans())
def test_garbage_gives_records_or_a_value_error(read: int, wrote: int, seed: int, sparse: bool) -> None:
    rng = random.Random(seed)
    view = bytearray(WORDS) + (rng.randbytes(RING) if not sparse else bytes(RING))
    if sparse:
        for _ in range(20):
            at = rng.randrange(0, RING // 8) * 8
            view[WORDS + at : WORDS + at + 8] = rng.randrange(1 << rng.randrange(1, 64)).to_bytes(8, "little")
    its = Ring(memoryview(view))
    its.words[READ], its.words[WROTE] = read, wrote
    try:
        found = its.take()
    except ValueError:
        return
    assert all(one.how <= IN_FILE and len(one.data) <= MAX_RECORD for one in found)
    assert its.words[READ] == its.words[WROTE]


@pytest.mark.parametrize(("read", "wrote"), [(0, RING + 8), (8, 0), (-8, 0), (-(1 << 62), 1 << 62)])
def test_what_cannot_have_been_written_is_not_read(read: int, wrote: int) -> None:
    its = ring()
    its.words[READ], its.words[WROTE] = read, wrote
    with pytest.raises(ValueError, match="written and"):
        its.take()
