"""Slices on disk: what is kept is what was put, for all programs of a user at once, within the quota."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from needs import need
from qjam_worker.node import disk_cache as module
from qjam_worker.node.disk_cache import TRAILER, Damaged, DiskCache, Stopped
from qjam_worker.values import flat

A, B, C, D = ("a" * 32, "b" * 32, "c" * 32, "d" * 32)
ENOUGH = 1 << 30
Open = Callable[..., DiskCache]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".cache" / "qjam" / "data"


@pytest.fixture
def open_kept(folder: Path) -> Iterator[Open]:
    """Opens the directory, as each node does for itself."""
    opened: list[DiskCache] = []

    def open_kept(quota: int = ENOUGH) -> DiskCache:
        opened.append(DiskCache(str(folder), quota))
        return opened[-1]

    yield open_kept
    for kept in opened:
        if os.path.isdir(kept._links):
            kept.close()


def put(kept: DiskCache, ref: str, content: bytes, more: bytes = b"") -> bool:
    source = Path(kept.folder).parent.parent / "source"
    source.write_bytes((content + more) or b"\0")
    return kept.put(ref, str(source), len(content))


def taken(kept: DiskCache, ref: str) -> bytes | None:
    found = kept.take(ref)
    return None if found is None else Path(found[0]).read_bytes()[: found[1]]


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder / "slices"))


def used(folder: Path, ref: str, at: int) -> None:
    os.utime(folder / "slices" / ref, (at, at))


# ---- what is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, module.PIECE - 1, module.PIECE, 2 * module.PIECE + 7])
def test_the_next_program_finds_what_was_put(open_kept: Open, size: int) -> None:
    content = os.urandom(size)
    first = open_kept()
    assert A not in first
    assert put(first, A, content, more=b"not of it")
    first.close()
    second = open_kept()
    assert A in second
    assert taken(second, A) == content


def test_what_was_never_put_is_not_there(open_kept: Open) -> None:
    assert open_kept().take(A) is None


@pytest.mark.parametrize("ref", ["", "a", "A" * 32, "params:1", "module:1:m", "../" + "a" * 29, "a" * 33])
def test_only_slices_are_kept(open_kept: Open, ref: str) -> None:
    assert ref not in open_kept()


def test_a_slice_that_is_put_again_is_not_written_again(open_kept: Open, folder: Path) -> None:
    put(open_kept(), A, b"first")
    before = os.stat(folder / "slices" / A)
    assert put(open_kept(), A, b"first")
    assert os.path.samestat(before, os.stat(folder / "slices" / A))


def test_a_source_that_has_gone_is_not_kept(open_kept: Open, folder: Path, tmp_path: Path) -> None:
    assert open_kept().put(A, str(tmp_path / "nowhere"), 3)
    assert names(folder) == set()


def test_a_source_that_is_too_short_is_not_kept(open_kept: Open, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"ab")
    kept = open_kept()
    with pytest.raises(OSError, match="cut short"):
        kept.put(A, str(tmp_path / "short"), 3)
    assert names(folder) == set()


def test_what_is_put_can_be_taken_by_the_same_program(open_kept: Open) -> None:
    kept = open_kept()
    put(kept, A, b"mine")
    assert taken(kept, A) == b"mine"
    assert taken(kept, A) == b"mine"


# ---- damage ---------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(path, bytes(content))


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)


def swap_with_another(path: Path) -> None:
    other = path.with_name(B)
    middle = path.with_name("middle")
    for old, new in ((path, middle), (other, path), (middle, other)):
        os.rename(old, new)


def in_place_of(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGE = {
    "a bit": flip,
    "the first byte": lambda path: overwrite(path, b"X" + path.read_bytes()[1:]),
    "the last byte": lambda path: overwrite(path, path.read_bytes()[:-1] + b"X"),
    "cut at the end": lambda path: overwrite(path, path.read_bytes()[:-1]),
    "cut in the content": lambda path: overwrite(path, path.read_bytes()[:1000]),
    "cut to nothing": lambda path: overwrite(path, b""),
    "longer": lambda path: overwrite(path, path.read_bytes() + b"X"),
    "zeros, as after a power cut": lambda path: overwrite(path, bytes(path.stat().st_size)),
    "another slice": swap_with_another,
    "a symbolic link": lambda path: path.symlink_to(path.rename(path.parent / "elsewhere")),
    "a pipe": in_place_of(os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_and_removed_and_the_slice_can_be_kept_again(
    open_kept: Open, folder: Path, damage: Callable[[Path], object]
) -> None:
    with closing(open_kept()) as first:
        put(first, A, b"a" * 100_000)
        put(first, B, b"b" * 100_000)
    damage(folder / "slices" / A)
    second = open_kept()
    with pytest.raises(Damaged, match=A):
        second.take(A)
    assert A not in second
    assert second.take(A) is None
    assert put(second, A, b"a" * 100_000)
    assert taken(open_kept(), A) == b"a" * 100_000


def test_a_node_that_lacks_descriptors_removes_nothing(
    open_kept: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_kept()) as first:
        put(first, A, b"a" * 1000)
    second = open_kept()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        found = second.take(A)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found is None
    assert taken(second, A) == b"a" * 1000


# ---- several at the same time ---------------------------------------------------------------------------------


def test_what_a_program_has_taken_stays_for_it_whatever_becomes_of_the_name(open_kept: Open, folder: Path) -> None:
    kept = open_kept()
    put(kept, A, b"mine")
    found = kept.take(A)
    assert found is not None
    os.unlink(folder / "slices" / A)
    assert Path(found[0]).read_bytes().startswith(b"mine")


def test_what_is_in_use_is_not_evicted_and_what_is_put_is_in_use(open_kept: Open, folder: Path) -> None:
    one, other = open_kept(), open_kept(quota=20_000)
    put(one, A, b"a" * 8000)
    used(folder, A, 0)
    assert put(other, B, b"b" * 8000)
    assert not put(other, C, b"c" * 8000)
    assert names(folder) == {A, B}
    one.close()
    assert not put(other, C, b"c" * 8000)  # it has given up on slices of this size
    assert put(open_kept(quota=20_000), D, b"d" * 8000)
    assert names(folder) == {B, D}


def test_what_another_is_writing_counts(open_kept: Open, folder: Path) -> None:
    one, other = open_kept(quota=20_000), open_kept(quota=20_000)
    fd = one._begin(f"{one._links}/new-{A}", 8000)
    assert fd is not None
    os.close(fd)
    assert put(other, B, b"b" * 8000)
    (folder / "used").unlink()  # counted anew
    assert not put(other, C, b"c" * 8000)


def test_who_counts_and_makes_room_is_alone(open_kept: Open, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    look = DiskCache._look

    def look_at_the_lock(self: DiskCache) -> module.Room:
        with open(folder / "used") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        looks.append(self)
        return look(self)

    monkeypatch.setattr(DiskCache, "_look", look_at_the_lock)
    kept = open_kept()
    assert put(kept, A, b"a")
    kept.trim()
    assert looks == [kept, kept]


def test_nobody_waits_for_ever_for_one_that_is_stopped_while_it_counts(open_kept: Open, folder: Path) -> None:
    kept = open_kept()
    put(kept, A, b"a")
    with open(folder / "used") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        kept.until = time.monotonic() + 0.02
        with pytest.raises(Stopped):
            put(kept, B, b"b")
    assert names(folder) == {A}


def test_a_program_that_wrote_the_same_slice_meanwhile_changes_nothing(open_kept: Open, folder: Path) -> None:
    one, other = open_kept(), open_kept()
    begin = one._begin

    def write_meanwhile(new: str, size: int) -> int | None:
        put(other, A, b"same")
        return begin(new, size)

    one._begin = write_meanwhile  # type: ignore[method-assign]
    assert put(one, A, b"same")
    assert taken(one, A) == taken(other, A) == b"same"


MANY = """
import os, sys
from pathlib import Path
from qjam_worker.node.disk_cache import DiskCache

kept, source = DiskCache(sys.argv[1], 200_000), Path(sys.argv[2])
for turn in range(200):
    ref = f"{turn * int(sys.argv[3]) % 60:032x}"
    content = ref.encode() * 300
    found = kept.take(ref)
    if found is None:
        source.write_bytes(content)
        kept.put(ref, str(source), len(content))
    elif Path(found[0]).read_bytes()[:found[1]] != content:
        sys.exit(f"{ref} is not what was put")
    if found is not None and turn % 3:
        os.unlink(found[0])  # it uses it no longer
kept.close()
"""


def test_many_programs_at_once_find_what_was_put_and_keep_to_the_quota(folder: Path, tmp_path: Path) -> None:
    programs = [
        subprocess.Popen([sys.executable, "-c", MANY, str(folder), str(tmp_path / f"source{step}"), str(step)])
        for step in (1, 7, 11, 13)
    ]
    assert [program.wait() for program in programs] == [0, 0, 0, 0]
    assert 0 < sum(path.stat().st_size for path in (folder / "slices").iterdir()) <= 200_000
    assert set(os.listdir(folder)) == {"slices", "used"}


# ---- the quota ------------------------------------------------------------------------------------------------


def test_beyond_the_quota_what_was_used_least_recently_goes(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        for ref in (A, B, C):
            put(first, ref, b"x" * 8000)
    for at, ref in enumerate((B, A, C)):
        used(folder, ref, at)
    with closing(open_kept(quota=30_000)) as second:
        assert put(second, D, b"x" * 8000)
    assert names(folder) == {A, C, D}


def test_a_program_that_is_killed_has_used_what_it_took(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        put(first, A, b"a")
    used(folder, A, 0)
    open_kept().take(A)
    assert os.stat(folder / "slices" / A).st_mtime > 0


def test_to_be_taken_is_to_be_used(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        for ref in (A, B):
            put(first, ref, b"x" * 8000)
    used(folder, A, 0)
    used(folder, B, 1)
    with closing(open_kept()) as second:
        second.take(A)
    assert put(open_kept(quota=20_000), C, b"x" * 8000)
    assert names(folder) == {A, C}


def test_the_end_of_a_program_is_when_it_used_its_slices_last(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        put(first, A, b"a")
        used(folder, A, 0)
    assert os.stat(folder / "slices" / A).st_mtime > 0


def test_nothing_goes_for_a_slice_that_would_not_fit_even_then(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        put(first, A, b"a" * 8000)
    kept = open_kept(quota=20_000)
    assert not put(kept, B, b"b" * 20_000)
    assert put(kept, C, b"c" * 4000)
    assert names(folder) == {A, C}


def test_a_smaller_quota_is_kept_to_from_its_beginning(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        for ref in (A, B, C):
            put(first, ref, b"x" * 8000)
    for at, ref in enumerate((A, B, C)):
        used(folder, ref, at)
    open_kept(quota=20_000).trim()
    assert names(folder) == {B, C}


def test_a_count_that_was_lost_is_made_anew(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        put(first, A, b"a" * 8000)
    for nonsense in (b"", b"nonsense", b"-5"):
        (folder / "used").write_bytes(nonsense)
        kept = open_kept(quota=20_000)
        assert put(kept, B, b"b" * 4000)
        assert int((folder / "used").read_bytes()) == 8192 + 4096
        kept.close()
        os.unlink(folder / "slices" / B)


FULL = """
import os, sys
from pathlib import Path
from qjam_worker.node.disk_cache import DiskCache

kept, source = DiskCache(sys.argv[1], 1 << 40), Path("/dev/shm", f"qjam-full-{os.getpid()}")
try:
    source.write_bytes(bytes(1 << 20))
    fits = [kept.put(f"{number:032x}", str(source), 1 << 20) for number in range(8)]
finally:
    source.unlink()
room = os.statvfs(sys.argv[1])
print(fits.count(True), room.f_bavail * room.f_frsize >> 20)
"""


def test_no_more_than_half_of_the_free_disk_is_taken(tmp_path: Path) -> None:
    need("" if os.geteuid() == 0 else "to mount a small disk needs root")
    mount = f'mount -t tmpfs -o size=8m none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}/qjam/data'
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, FULL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 4\n"  # of 8 MiB; the trailers take a block each


# ---- who may look, and what is left ---------------------------------------------------------------------------


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022])
def test_nobody_else_can_read_what_is_kept(open_kept: Open, folder: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        put(open_kept(), A, b"secret")
    finally:
        os.umask(before)
    assert mode(folder.parent) == mode(folder) == mode(folder / "slices") == 0o700
    assert mode(folder / "slices" / A) == 0o400
    assert mode(folder / "used") == 0o600


@pytest.mark.parametrize(("which", "right"), [("", 0o750), ("slices", 0o705), ("..", 0o722)])
def test_a_directory_that_others_may_use_is_refused(open_kept: Open, folder: Path, which: str, right: int) -> None:
    open_kept().close()
    (folder / which).chmod(right)
    with pytest.raises(PermissionError, match="yours alone"):
        open_kept()


@pytest.mark.parametrize("which", ["", "slices"])
def test_a_directory_that_is_a_link_is_refused(open_kept: Open, folder: Path, tmp_path: Path, which: str) -> None:
    open_kept().close()
    os.rename(folder / which, tmp_path / "elsewhere")
    (folder / which if which else folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="yours alone"):
        open_kept()


def test_a_file_in_its_place_is_refused(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    with pytest.raises(OSError, match="directory"):
        DiskCache(str(folder), ENOUGH)


def test_a_directory_of_somebody_else_is_refused(open_kept: Open, folder: Path) -> None:
    need("" if os.geteuid() == 0 else "to give a directory away needs root")
    open_kept().close()
    os.chown(folder, 12345, -1)
    with pytest.raises(PermissionError, match="yours alone"):
        open_kept()


def test_what_a_killed_program_has_left_goes_when_the_next_one_starts(open_kept: Open, folder: Path) -> None:
    killed = open_kept()
    put(killed, A, b"a")
    Path(killed._links, f"new-{B}").write_bytes(b"half")
    for lock in killed._locks:
        fcntl.flock(lock, fcntl.LOCK_UN)  # as its end does
    (living,) = [open_kept()]
    assert not os.path.exists(killed._links)
    assert os.path.exists(living._links)
    assert names(folder) == {A}
    assert taken(living, A) == b"a"


def test_after_the_end_only_slices_are_left(open_kept: Open, folder: Path) -> None:
    kept = open_kept()
    put(kept, A, b"a")
    kept.take(A)
    kept.close()
    assert set(os.listdir(folder)) == {"slices", "used"}
    assert names(folder) == {A}


def test_what_cannot_be_finished_is_not_kept(open_kept: Open, folder: Path) -> None:
    with closing(open_kept()) as first:
        put(first, A, b"a")
    kept = open_kept()
    kept.until = 0.0
    with pytest.raises(Stopped):
        put(kept, B, b"b")
    with pytest.raises(Stopped):
        kept.take(A)
    assert names(folder) == {A}
    assert os.listdir(kept._links).count(f"new-{B}") == 0


def test_the_place_is_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.default_folder() == f"{tmp_path}/qjam/data"
    monkeypatch.setenv("HOME", "/somewhere")
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert module.default_folder() == "/somewhere/.cache/qjam/data"
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no home"):
        module.default_folder()


def test_what_is_kept_in_another_layout_of_values_is_not_taken_for_ours() -> None:
    assert module.SIGN == b"kept" + flat.FLAT_MAGIC


def test_the_trailer_is_the_format(open_kept: Open, folder: Path) -> None:
    put(open_kept(), A, b"content")
    expected = b"content" + TRAILER.pack(b"keptqjv1", A.encode(), 7, zlib.crc32(b"content"))
    assert (folder / "slices" / A).read_bytes() == expected
