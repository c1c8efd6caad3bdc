"""Maps of shared files: where they begin, what they hold, when they go; and large pages."""

from __future__ import annotations

import errno
import gc
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from qjam_worker.ipc import huge_pages
from qjam_worker.ipc.files import Files, map_file
from qjam_worker.ipc.huge_pages import LARGE, MAX_PAGES_PER_CALL, make_large, map_shared
from qjam_worker.node.store import Store

ODD = 2 * LARGE + 12345


@pytest.fixture
def files() -> Iterator[Files]:
    made = Files.make(["/dev/shm"])
    yield made
    made.remove()


@pytest.fixture
def fd(files: Files) -> Iterator[int]:
    fd = os.open(os.path.join(files.directories[0], "file"), os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def in_large_pages(view: memoryview) -> int:
    """Bytes of a map that lie in large pages, as the kernel tells."""
    start = f"{address(view):x}-"
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(start):
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("ShmemPmdMapped"))
    raise LookupError(start)


@pytest.fixture
def gives_large_pages(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_resting_until", 0.0)
    monkeypatch.setattr(huge_pages, "SLOW", 1.0)
    if not make_large(fd, LARGE):
        pytest.skip("this kernel gives no large pages")
    os.ftruncate(fd, 0)


@pytest.mark.parametrize("size", [1, LARGE - 1, LARGE, ODD])
def test_a_map_has_as_many_bytes_as_were_asked_for(fd: int, size: int) -> None:
    os.ftruncate(fd, size + 5)
    view = map_shared(fd, size, write=True)
    assert (view.nbytes, view.format, view.ndim) == (size, "B", 1)
    view[-1] = 7
    assert os.pread(fd, 2, size - 1) == b"\7\0"


def test_a_large_map_begins_where_a_large_page_can(fd: int) -> None:
    os.ftruncate(fd, ODD)
    views = [map_shared(fd, ODD) for _ in range(3)]
    assert [address(view) % LARGE for view in views] == [0, 0, 0]


@pytest.mark.parametrize("size", [10, ODD])
def test_what_is_mapped_to_be_read_cannot_be_written(fd: int, size: int) -> None:
    os.ftruncate(fd, size)
    view = map_shared(fd, size)
    assert view.readonly
    for array in np.frombuffer(view, np.uint8), np.ndarray(size, np.uint8, view), np.ndarray(5, np.uint8, view[3:8]):
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


@pytest.mark.parametrize("size", [10, ODD])
def test_a_map_lives_as_long_as_a_view_of_it_and_leaves_nothing(fd: int, size: int) -> None:
    def maps() -> int:
        gc.collect()
        with open("/proc/self/maps") as lines:
            return sum(line.rstrip().endswith("/file") for line in lines)

    os.ftruncate(fd, size)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    view = map_shared(fd, size)
    array = np.frombuffer(view, np.uint8)[5:]
    del view
    assert array[0] == 0
    assert maps() == 1
    del array
    assert maps() == 0
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [10, ODD])
def test_no_map_is_longer_than_its_file(fd: int, size: int) -> None:
    os.ftruncate(fd, size - 1)
    with pytest.raises(ValueError, match="file"):
        map_shared(fd, size)


@pytest.mark.usefixtures("gives_large_pages")
@pytest.mark.parametrize("size", [LARGE, ODD, 3 * MAX_PAGES_PER_CALL * LARGE - 1])
def test_whole_large_pages_of_a_new_file_are_made_and_read_as_such(fd: int, size: int) -> None:
    assert make_large(fd, size)
    assert os.fstat(fd).st_blocks * 512 == size // LARGE * LARGE
    assert in_large_pages(map_shared(fd, size)) == 0  # nothing is read yet
    view = map_shared(fd, size)
    assert not any(view[::4096])
    assert in_large_pages(view) == size // LARGE * LARGE


@pytest.mark.usefixtures("gives_large_pages")
def test_a_file_for_which_there_is_no_room_is_an_error(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="no room"):
        make_large(fd, ODD)


@pytest.mark.usefixtures("gives_large_pages")
def test_large_pages_that_are_slow_are_not_asked_for_again_at_once(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SLOW", 0.0)
    monkeypatch.setattr(huge_pages, "SLACK", 0.0)
    assert not make_large(fd, ODD)
    assert os.fstat(fd).st_blocks * 512 < LARGE + LARGE  # the first one alone
    monkeypatch.setattr(huge_pages, "SLOW", 1.0)
    os.ftruncate(fd, 0)
    assert not make_large(fd, ODD)
    assert os.fstat(fd).st_blocks == 0
    monkeypatch.setattr(huge_pages, "_resting_until", 0.0)
    assert make_large(fd, ODD)


@pytest.mark.usefixtures("gives_large_pages")
def test_some_slow_large_pages_are_borne(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SLOW", 0.0)
    monkeypatch.setattr(huge_pages, "SLACK", 60.0)
    assert make_large(fd, ODD)


def test_a_small_file_gets_none(fd: int) -> None:
    assert not make_large(fd, LARGE - 1)


@pytest.mark.usefixtures("gives_large_pages")
def test_a_large_file_of_a_node_is_reserved_whole_in_large_pages(files: Files) -> None:
    made = files.create("one", ODD)
    assert os.stat(made.path).st_size == ODD
    assert os.stat(made.path).st_blocks * 512 >= ODD  # a hole would be a SIGBUS later
    assert in_large_pages(map_file(made.path, ODD)) == 0  # nothing is read yet
    view = map_file(made.path, ODD)
    bytes(view)
    assert in_large_pages(view) == ODD // LARGE * LARGE


@pytest.mark.parametrize("libc", [huge_pages._libc, None], ids=["as here", "without large pages"])
@pytest.mark.parametrize("size", [LARGE, ODD])
def test_a_ref_that_comes_in_chunks_is_read_as_it_was(
    files: Files, monkeypatch: pytest.MonkeyPatch, libc: object, size: int
) -> None:
    monkeypatch.setattr(huge_pages, "_libc", libc)
    store = Store(files, limit=10 * ODD)
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    for start in range(0, size, LARGE // 2):
        assert store.have("ref") == start
        store.write("ref", start, size, memoryview(content)[start : start + LARGE // 2])
    assert bytes(map_file(store.path("ref"), size)) == content


FAULTS = """
import ctypes, resource
from qjam_worker.ipc import huge_pages

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [libc.malloc(4 << 20) for _ in range(4)]
        for block in blocks:
            ctypes.memset(block, 1, 4 << 20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(5))
huge_pages.keep_freed()
faults(1)
print(faults(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone gives freed memory back at once")
def test_freed_memory_is_used_again_where_it_is_kept() -> None:
    faults = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout.split()
    assert int(faults[0]) >= 10 * 1024
    assert int(faults[1]) < 1024


@pytest.mark.parametrize("size", [10, ODD])
def test_an_interrupt_is_not_lost_when_a_map_goes(fd: int, size: int) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def map_for_long() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        for _ in range(100_000):
            map_shared(fd, size)

    os.ftruncate(fd, size)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(50):
            with pytest.raises(KeyboardInterrupt):
                map_for_long()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
