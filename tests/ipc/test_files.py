"""Mapped files: private, where there is room, gone when their node is."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from mapped_files import files, names, tmpfs  # noqa: F401
from qjam_worker.ipc import files as files_module
from qjam_worker.ipc.files import MARGIN, Files, NoRoom, map_file, remove, sweep

MIB = 1024 * 1024


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


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
