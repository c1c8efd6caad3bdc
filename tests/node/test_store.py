"""Slices in mapped files: resumed where they broke off, and the oldest goes when there is no room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mapped_files import files, names, tmpfs  # noqa: F401
from qjam_worker.ipc.files import Files, NoRoom, map_file
from qjam_worker.node.store import Store

MIB = 1024 * 1024


@pytest.fixture
def store(files: Files) -> Store:
    return Store(files, limit=1000)


def whole(store: Store) -> list[str]:
    """The refs that are here whole, the least recently used first."""
    return [ref for ref in store._entries if ref in store]


def put(store: Store, ref: str, content: bytes, *, offset: int = 0, total: int | None = None) -> list[str]:
    return store.write(ref, offset, len(content) if total is None else total, memoryview(content))


def test_a_ref_is_here_once_it_is_whole(store: Store) -> None:
    put(store, "x", b"hel", total=5)
    assert "x" not in store
    assert store.have("x") == 3
    assert whole(store) == []
    put(store, "x", b"lo", offset=3, total=5)
    assert "x" in store
    assert whole(store) == ["x"]
    assert store.read("x") == b"hello"
    assert Path(store.path("x")).read_bytes() == b"hello"


def test_of_a_ref_that_never_came_there_is_nothing(store: Store) -> None:
    assert store.have("x") == 0
    assert "x" not in store


def test_an_empty_ref_is_here_at_once(store: Store) -> None:
    put(store, "x", b"")
    assert "x" in store
    assert store.read("x") == b""


def test_a_block_that_comes_twice_changes_nothing(store: Store) -> None:
    put(store, "x", b"hel", total=5)
    put(store, "x", b"HEL", total=5)
    put(store, "x", b"lo", offset=3, total=5)
    put(store, "x", b"LO", offset=3, total=5)
    assert store.read("x") == b"hello"


def test_a_block_that_leaves_a_gap_is_dropped(store: Store) -> None:
    put(store, "x", b"he", total=5)
    put(store, "x", b"o", offset=4, total=5)
    assert store.have("x") == 2


def test_a_broken_transfer_goes_on_where_it_broke_off(store: Store) -> None:
    put(store, "x", b"he", total=5)
    put(store, "x", b"llo", offset=store.have("x"), total=5)
    assert store.read("x") == b"hello"


@pytest.mark.parametrize(("offset", "total"), [(-1, 5), (3, 5), (0, 4), (0, 6)])
def test_a_block_that_cannot_be_right_is_refused(store: Store, offset: int, total: int) -> None:
    put(store, "x", b"he", total=5)
    with pytest.raises(ValueError, match="block "):
        put(store, "x", b"abc" if (offset, total) == (3, 5) else b"ab", offset=offset, total=total)
    assert store.have("x") == 2


def test_a_dropped_ref_leaves_nothing(store: Store) -> None:
    put(store, "x", b"hello")
    store.drop("x")
    assert "x" not in store
    assert store.bytes == 0
    assert names(store.files) == []
    store.drop("x")


def test_beyond_the_limit_the_oldest_goes(store: Store) -> None:
    put(store, "a", b"a" * 400)
    put(store, "b", b"b" * 400)
    path = store.path("a")
    store.path("b")
    assert put(store, "c", b"c" * 400) == [path]
    assert whole(store) == ["b", "c"]
    assert store.bytes == 800
    assert not os.path.exists(path)


def test_a_file_on_disk_is_taken_in_and_does_not_count(store: Store, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"hello and a trailer")
    put(store, "x", b"hel", total=5)  # a part of it had come
    half = store.path("x")
    store.adopt("x", str(tmp_path / "kept"), 5)
    assert not os.path.exists(half)
    assert "x" in store
    assert (store.path("x"), store.size("x"), store.read("x")) == (str(tmp_path / "kept"), 5, b"hello")
    assert store.bytes == 0
    put(store, "x", b"lo", offset=3, total=5)  # it comes late
    assert store.read("x") == b"hello"
    for ref in "abc":
        put(store, ref, b"x" * 400)
    assert whole(store) == ["x", "b", "c"]  # what takes no memory need not make room
    store.drop("x")
    assert store.bytes == 800
    assert not (tmp_path / "kept").exists()


def test_what_was_used_lately_stays(store: Store) -> None:
    put(store, "a", b"a" * 400)
    put(store, "b", b"b" * 400)
    store.path("a")
    put(store, "c", b"c" * 400)
    assert whole(store) == ["a", "c"]


def test_as_many_go_as_must(store: Store) -> None:
    for ref in "abcd":
        put(store, ref, b"x" * 250)
    assert len(put(store, "large", b"x" * 600)) == 3
    assert whole(store) == ["d", "large"]


def test_nothing_goes_while_there_is_room(store: Store) -> None:
    put(store, "a", b"a" * 500)
    assert put(store, "b", b"b" * 500) == []


def test_what_a_round_needs_stays(store: Store) -> None:
    put(store, "a", b"a" * 400)
    put(store, "b", b"b" * 400)
    store.pin("a")
    put(store, "c", b"c" * 400)
    assert whole(store) == ["a", "c"]


def test_what_a_round_needs_stays_also_beyond_the_limit(store: Store) -> None:
    for ref in "abc":
        store.pin(ref)
        put(store, ref, b"x" * 600)
    assert whole(store) == ["a", "b", "c"]


def test_a_ref_that_two_rounds_need_stays_until_both_are_over(store: Store) -> None:
    put(store, "a", b"a" * 600)
    store.pin("a")
    store.pin("a")
    store.unpin("a")
    put(store, "b", b"b" * 600)
    assert "a" in store
    store.unpin("a")
    put(store, "c", b"c" * 600)
    assert whole(store) == ["c"]


def test_a_ref_may_be_pinned_before_it_comes(store: Store) -> None:
    store.pin("a")
    put(store, "a", b"a" * 300, total=600)
    put(store, "b", b"b" * 600)
    assert store.have("a") == 300


def test_to_unpin_what_is_not_pinned_changes_nothing(store: Store) -> None:
    store.unpin("a")
    put(store, "a", b"a" * 600)
    store.pin("a")
    put(store, "b", b"b" * 600)
    assert "a" in store


def test_a_half_that_nobody_waits_for_goes_as_well(store: Store) -> None:
    put(store, "a", b"a" * 300, total=600)
    put(store, "b", b"b" * 600)
    assert store.have("a") == 0
    assert store.bytes == 600


def test_a_worker_that_still_maps_what_went_can_read_it(store: Store) -> None:
    put(store, "a", b"a" * 600)
    mapped = map_file(store.path("a"), 600)
    put(store, "b", b"b" * 600)
    assert "a" not in store
    assert bytes(mapped) == b"a" * 600


def test_two_refs_lie_in_two_files(store: Store) -> None:
    put(store, "a:../../etc", b"a")
    put(store, "b", b"b")
    assert store.path("a:../../etc") != store.path("b")
    assert {os.path.dirname(store.path(ref)) for ref in ("a:../../etc", "b")} == set(store.files.directories)


def test_a_block_may_lie_in_any_memory(store: Store) -> None:
    content: Any = bytearray(b"hello")
    store.write("x", 0, 5, memoryview(content))
    content[:] = b"XXXXX"
    assert store.read("x") == b"hello"


# ---- no room ------------------------------------------------------------------------------------------------


def test_a_slice_that_does_not_fit_into_shared_memory_lies_on_the_disk(tmpfs: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    store = Store(Files.make([str(tmpfs), str(disk)]), limit=100 * MIB)
    for ref in ("one", "two"):
        put(store, ref, ref.encode() * (2 * MIB))
    assert [store.path(ref).startswith(str(tmpfs)) for ref in ("one", "two")] == [True, False]
    assert store.read("two")[:3] == b"two"
    store.files.remove()


def test_a_slice_without_room_is_an_error_and_the_others_stay(tmpfs: Path) -> None:
    store = Store(Files.make([str(tmpfs)]), limit=100 * MIB)
    put(store, "one", b"1" * (6 * MIB))
    with pytest.raises(NoRoom):
        put(store, "two", b"2" * (6 * MIB))
    assert whole(store) == ["one"]
    assert store.bytes == 6 * MIB
    store.files.remove()
