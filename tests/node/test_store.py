"""Mapped files: private, where there is room, resumed where they broke off, gone when they are not needed."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qjam_worker.ipc import files as files_module
from qjam_worker.ipc.files import MARGIN, Files, NoRoom, map_file, remove, sweep
from qjam_worker.node.store import Store

MIB = 1024 * 1024


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    made = Files.make([str(tmp_path)])
    yield made
    made.remove()


@pytest.fixture
def store(files: Files) -> Store:
    return Store(files, limit=1000)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(where)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mount: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def put(store: Store, ref: str, content: bytes, *, offset: int = 0, total: int | None = None) -> list[str]:
    return store.write(ref, offset, len(content) if total is None else total, memoryview(content))


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def names(files: Files) -> list[str]:
    return sorted(name for directory in files.directories for name in os.listdir(directory))


# ---- files ------------------------------------------------------------------------------------------------


def test_the_directory_is_private(files: Files) -> None:
    (directory,) = files.directories
    assert mode(directory) == 0o700
    assert os.path.basename(directory).startswith(f"qjam-{os.getuid()}-")


def test_a_file_is_private_whatever_the_umask(files: Files) -> None:
    before = os.umask(0)
    try:
        made = files.create("one", 10)
    finally:
        os.umask(before)
    assert mode(made.path) == 0o600


def test_two_nodes_have_different_directories(tmp_path: Path) -> None:
    one, other = Files.make([str(tmp_path)]), Files.make([str(tmp_path)])
    assert not set(one.directories) & set(other.directories)
    assert all(os.path.isdir(directory) for directory in one.directories + other.directories)


def test_what_is_written_to_a_mapping_is_read_by_another(files: Files) -> None:
    made = files.create("one", 5)
    made.view[:] = b"hello"
    assert bytes(map_file(made.path, 5)) == b"hello"


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097])
def test_a_mapping_has_exactly_the_size_asked_for(files: Files, size: int) -> None:
    made = files.create("one", size)
    assert len(made.view) == size
    assert len(map_file(made.path, size)) == size


def test_a_file_mapped_to_read_cannot_be_written(files: Files) -> None:
    view = map_file(files.create("one", 5).path, 5)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_a_file_mapped_to_write_can_be_written(files: Files) -> None:
    made = files.create("one", 5)
    map_file(made.path, 5, write=True)[:] = b"12345"
    assert bytes(made.view) == b"12345"


def test_a_mapping_outlives_its_name(files: Files) -> None:
    made = files.create("one", 5)
    made.view[:] = b"hello"
    view = map_file(made.path, 5)
    remove(made.path)
    assert bytes(view) == b"hello"


def test_to_remove_a_file_that_is_gone_is_no_error(files: Files) -> None:
    remove(os.path.join(files.directories[0], "never was"))


def test_no_file_is_made_twice(files: Files) -> None:
    files.create("one", 1)
    with pytest.raises(FileExistsError):
        files.create("one", 1)


def test_the_pages_of_a_file_are_reserved(files: Files) -> None:
    made = files.create("one", MIB)
    assert os.stat(made.path).st_blocks * 512 >= MIB  # a hole would be a SIGBUS later, when the disk is full


def test_no_descriptor_is_left_open(files: Files) -> None:
    before = set(os.listdir("/proc/self/fd"))
    view = files.create("one", 10).view
    again = map_file(os.path.join(files.directories[0], "one"), 10)
    del view, again
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_remove_removes_everything(tmp_path: Path) -> None:
    files = Files.make([str(tmp_path)])
    files.create("one", 10)
    files.remove()
    assert list(tmp_path.iterdir()) == []
    files.remove()


def test_bases_that_are_not_there_or_not_writable_are_left_out(tmp_path: Path) -> None:
    files = Files.make(["/nowhere", str(tmp_path)])
    assert [os.path.dirname(directory) for directory in files.directories] == [str(tmp_path)]


def test_without_any_base_the_error_names_them() -> None:
    with pytest.raises(NoRoom, match=r"no writable directory .* /nowhere, /neither"):
        Files.make(["/nowhere", "/neither"])


def test_shared_memory_comes_before_the_disk() -> None:
    files = Files.make()
    try:
        assert files.directories[0].startswith("/dev/shm/")
        assert files.create("one", 10).path.startswith("/dev/shm/")
    finally:
        files.remove()


# ---- no room ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_goes_to_the_next_directory(tmpfs: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    files = Files.make([str(tmpfs), str(disk)])
    assert files.create("small", 5 * MIB).path.startswith(str(tmpfs))
    large = files.create("large", 5 * MIB)
    assert large.path.startswith(str(disk))
    large.view[:] = b"x" * len(large.view)
    assert "large" not in os.listdir(files.directories[0])  # the attempt has left nothing
    files.remove()


def test_what_fits_nowhere_is_no_room_and_leaves_nothing(tmpfs: Path) -> None:
    files = Files.make([str(tmpfs)])
    with pytest.raises(NoRoom, match=rf"no room for 9,437,184 bytes in {tmpfs}"):
        files.create("large", 9 * MIB)
    assert names(files) == []
    files.create("small", 7 * MIB)
    files.remove()


def test_a_full_file_system_takes_files_again_once_some_are_gone(tmpfs: Path) -> None:
    files = Files.make([str(tmpfs)])
    first = files.create("first", 7 * MIB)
    with pytest.raises(NoRoom):
        files.create("second", 7 * MIB)
    remove(first.path)
    del first
    files.create("second", 7 * MIB)
    files.remove()


def test_some_shared_memory_is_left_to_others(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "SHARED_MEMORY", str(tmpfs))
    files = Files.make([str(tmpfs)])
    files.create("fits", 8 * MIB - MARGIN - MIB)
    with pytest.raises(NoRoom):
        files.create("would take the rest", 2 * MIB)
    files.remove()


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
    assert store.refs() == ["one"]
    assert store.bytes == 6 * MIB
    store.files.remove()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_no_room(files: Files, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(fd: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module, "_reserve", full)
    with pytest.raises(NoRoom):
        files.create("one", 10)
    assert names(files) == []


def test_another_error_is_told_as_it_is(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(files_module, "_reserve", broken)
    with pytest.raises(OSError, match="input/output error") as raised:
        files.create("one", 10)
    assert not isinstance(raised.value, NoRoom)
    assert names(files) == []


# ---- stale directories ----------------------------------------------------------------------------------------


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """The directory of a node that is dead, with its lock and a file."""
    directory = tmp_path / f"qjam-{os.getuid()}-dead"
    directory.mkdir(0o700)
    (directory / "lock").touch()
    (directory / "ref1").write_bytes(b"data")
    return directory


def test_the_directory_of_a_dead_node_is_removed_when_the_next_one_starts(stale: Path, tmp_path: Path) -> None:
    files = Files.make([str(tmp_path)])
    assert not stale.exists()
    files.remove()


def test_the_directory_of_a_live_node_is_left_alone(tmp_path: Path) -> None:
    live = Files.make([str(tmp_path)])
    locks = live.lock()
    sweep(str(tmp_path))
    assert os.path.isdir(live.directories[0])
    for lock in locks:
        os.close(lock)
    sweep(str(tmp_path))
    assert not os.path.exists(live.directories[0])


def test_a_directory_that_is_just_being_made_is_left_alone(stale: Path, tmp_path: Path) -> None:
    (stale / "lock").unlink()
    sweep(str(tmp_path))
    assert stale.exists()


def test_the_directory_of_another_user_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"qjam-{os.getuid() + 1}-dead"
    other.mkdir()
    (other / "lock").touch()
    sweep(str(tmp_path))
    assert other.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_directory_that_has_our_name_and_another_owner_is_left_alone(stale: Path, tmp_path: Path) -> None:
    os.chown(stale, 65534, 65534)
    sweep(str(tmp_path))
    assert stale.exists()


def test_a_link_to_a_directory_is_not_followed(stale: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    stale.rename(precious)
    stale.symlink_to(precious)
    sweep(str(tmp_path))
    assert (precious / "ref1").exists()


def test_what_else_lies_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "qjam").mkdir()
    (tmp_path / f"qjam-{os.getuid()}-file").touch()
    sweep(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lock_is_private_and_held_as_long_as_its_descriptor(files: Files) -> None:
    (lock,) = files.lock()
    path = os.path.join(files.directories[0], "lock")
    assert mode(path) == 0o600
    with open(path) as second:
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- the store ------------------------------------------------------------------------------------------------


def test_a_ref_is_here_once_it_is_whole(store: Store) -> None:
    put(store, "x", b"hel", total=5)
    assert "x" not in store
    assert store.have("x") == 3
    assert store.refs() == []
    put(store, "x", b"lo", offset=3, total=5)
    assert "x" in store
    assert store.refs() == ["x"]
    assert store.read("x") == b"hello"
    assert Path(store.path("x")).read_bytes() == b"hello"


def test_of_a_ref_that_never_came_there_is_nothing(store: Store) -> None:
    assert store.have("x") == 0
    assert "x" not in store


def test_an_empty_ref_is_here_at_once(store: Store) -> None:
    put(store, "x", b"")
    assert "x" in store
    assert store.read("x") == b""


def test_a_chunk_that_comes_twice_changes_nothing(store: Store) -> None:
    put(store, "x", b"hel", total=5)
    put(store, "x", b"HEL", total=5)
    put(store, "x", b"lo", offset=3, total=5)
    put(store, "x", b"LO", offset=3, total=5)
    assert store.read("x") == b"hello"


def test_a_chunk_that_leaves_a_gap_is_dropped(store: Store) -> None:
    put(store, "x", b"he", total=5)
    put(store, "x", b"o", offset=4, total=5)
    assert store.have("x") == 2


def test_a_broken_transfer_goes_on_where_it_broke_off(store: Store) -> None:
    put(store, "x", b"he", total=5)
    put(store, "x", b"llo", offset=store.have("x"), total=5)
    assert store.read("x") == b"hello"


@pytest.mark.parametrize(("offset", "total"), [(-1, 5), (3, 5), (0, 4), (0, 6)])
def test_a_chunk_that_cannot_be_right_is_refused(store: Store, offset: int, total: int) -> None:
    put(store, "x", b"he", total=5)
    with pytest.raises(ValueError, match="chunk "):
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
    assert store.refs() == ["b", "c"]
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
    assert store.refs() == ["x", "b", "c"]  # what takes no memory need not make room
    store.drop("x")
    assert store.bytes == 800
    assert not (tmp_path / "kept").exists()


def test_what_was_used_lately_stays(store: Store) -> None:
    put(store, "a", b"a" * 400)
    put(store, "b", b"b" * 400)
    store.path("a")
    put(store, "c", b"c" * 400)
    assert store.refs() == ["a", "c"]


def test_as_many_go_as_must(store: Store) -> None:
    for ref in "abcd":
        put(store, ref, b"x" * 250)
    assert len(put(store, "large", b"x" * 600)) == 3
    assert store.refs() == ["d", "large"]


def test_nothing_goes_while_there_is_room(store: Store) -> None:
    put(store, "a", b"a" * 500)
    assert put(store, "b", b"b" * 500) == []


def test_what_a_round_needs_stays(store: Store) -> None:
    put(store, "a", b"a" * 400)
    put(store, "b", b"b" * 400)
    store.pin("a")
    put(store, "c", b"c" * 400)
    assert store.refs() == ["a", "c"]


def test_what_a_round_needs_stays_also_beyond_the_limit(store: Store) -> None:
    for ref in "abc":
        store.pin(ref)
        put(store, ref, b"x" * 600)
    assert store.refs() == ["a", "b", "c"]


def test_a_ref_that_two_rounds_need_stays_until_both_are_over(store: Store) -> None:
    put(store, "a", b"a" * 600)
    store.pin("a")
    store.pin("a")
    store.unpin("a")
    put(store, "b", b"b" * 600)
    assert "a" in store
    store.unpin("a")
    put(store, "c", b"c" * 600)
    assert store.refs() == ["c"]


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


def test_a_chunk_may_lie_in_any_memory(store: Store) -> None:
    content: Any = bytearray(b"hello")
    store.write("x", 0, 5, memoryview(content))
    content[:] = b"XXXXX"
    assert store.read("x") == b"hello"
