"""The threads that read and write what is kept: each look is answered, and the end does not wait."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qjam import DataSet, Master, RoundTimeout
from qjam_worker.node import disk_cache_threads as module
from qjam_worker.node.disk_cache import DiskCache
from qjam_worker.node.disk_cache_threads import DiskCacheThreads, Found

QUOTA = 1 << 30
MOST = 5000


def ref(number: int) -> str:
    return f"{number:032x}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory in which the slices 0 to 9 are kept."""
    folder = tmp_path / "qjam" / "data"
    with closing(DiskCache(str(folder), QUOTA)) as kept:
        for number in range(10):
            kept.put(ref(number), str(source(tmp_path, number)), 1000)
    return folder


def source(folder: Path, number: int) -> Path:
    path = folder / f"source{number}"
    path.write_bytes(bytes([number]) * 1000)
    return path


@pytest.fixture
def disk_cache(folder: Path) -> Iterator[DiskCacheThreads]:
    with closing(DiskCacheThreads(DiskCache(str(folder), QUOTA), MOST)) as disk_cache:
        yield disk_cache


def found(disk_cache: DiskCacheThreads, count: int) -> list[Found]:
    """Waits for the answers to so many looks."""
    answers: list[Found] = []
    while len(answers) < count:
        assert select.select([disk_cache], [], [], 10.0)[0]
        answers += disk_cache.found()
    return answers


def notes(disk_cache: DiskCacheThreads) -> list[str]:
    return [disk_cache.notes.get() for _ in range(disk_cache.notes.qsize())]


def test_what_is_not_kept_is_told_at_once(disk_cache: DiskCacheThreads) -> None:
    assert not disk_cache.look(ref(77), 1)
    assert not disk_cache.look("params:1", 1)
    assert disk_cache.found() == []


def test_each_look_is_answered_once_with_the_round_that_asked_last(disk_cache: DiskCacheThreads) -> None:
    for number in range(10):
        assert disk_cache.look(ref(number), 1)
    for number in range(5):
        disk_cache.look(ref(number), 2)
    answers = {one.ref: one for one in found(disk_cache, 10)}
    assert len(answers) == 10
    for number in range(10):
        one = answers[ref(number)]
        assert one.path is not None
        assert Path(one.path).read_bytes()[: one.size] == bytes([number]) * 1000
    assert [answers[ref(number)].round for number in range(10)] == [2] * 5 + [1] * 5
    assert disk_cache.found() == []
    assert disk_cache.look(ref(3), 3)
    assert [(one.ref, one.round) for one in found(disk_cache, 1)] == [(ref(3), 3)]


def test_damage_is_an_answer_and_is_told_of_more_and_more_seldom(disk_cache: DiskCacheThreads, folder: Path) -> None:
    for number in range(10):
        path = folder / "slices" / ref(number)
        path.chmod(0o600)
        path.write_bytes(b"nonsense")
        assert disk_cache.look(ref(number), 1)
    assert {one.path for one in found(disk_cache, 10)} == {None}
    said = notes(disk_cache)
    assert len(said) == 4
    assert [text.partition("fetched again")[2] for text in said] == ["", " (2 so far)", " (4 so far)", " (8 so far)"]


def test_a_defect_of_the_disk_is_an_answer(disk_cache: DiskCacheThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DiskCache, ref: str) -> Any:
        raise MemoryError

    monkeypatch.setattr(DiskCache, "take", fail)
    for number in range(10):
        assert disk_cache.look(ref(number), 1)
    assert {one.path for one in found(disk_cache, 10)} == {None}
    assert "MemoryError" in notes(disk_cache)[0]


def test_writing_begins_when_it_is_to_or_when_much_is_held_back(
    folder: Path, tmp_path: Path, disk_cache: DiskCacheThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(DiskCache, "put", lambda self, ref, path, size: written.put(ref) or True)
    for number in range(10, 15):
        disk_cache.keep(ref(number), str(source(tmp_path, number)), 1000)
    assert written.empty()
    assert not disk_cache._writers
    disk_cache.keep(ref(15), str(source(tmp_path, 15)), 1000)
    assert [written.get(timeout=10.0) for _ in range(6)] == [ref(number) for number in range(10, 16)]
    disk_cache.keep(ref(16), str(source(tmp_path, 16)), 1000)
    disk_cache.write()
    assert written.get(timeout=10.0) == ref(16)


def test_at_the_end_what_waits_is_written(folder: Path, tmp_path: Path) -> None:
    disk_cache = DiskCacheThreads(DiskCache(str(folder), QUOTA), MOST)
    for number in range(10, 60):
        disk_cache.keep(ref(number), str(source(tmp_path, number)), 1000)
    disk_cache.close()
    assert set(os.listdir(folder / "slices")) == set(map(ref, range(60)))


class Slow:
    """Every piece that is written waits here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writing, self.go_on = threading.Event(), threading.Event()
        check = DiskCache._go_on

        def wait(kept: DiskCache) -> None:
            self.writing.set()
            self.go_on.wait()
            check(kept)

        monkeypatch.setattr(DiskCache, "_go_on", wait)


def test_what_is_being_written_at_the_end_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    disk_cache = DiskCacheThreads(DiskCache(str(folder), QUOTA), MOST)
    disk_cache.keep(ref(10), str(source(tmp_path, 10)), 1000)
    disk_cache.write()
    slow.writing.wait()
    disk_cache.keep(ref(11), str(source(tmp_path, 11)), 1000)
    threading.Timer(0.1, slow.go_on.set).start()
    disk_cache.close()
    assert set(os.listdir(folder / "slices")) == set(map(ref, range(12)))


def test_the_end_does_not_wait_for_ever(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", -1.0)
    slow = Slow(monkeypatch)
    disk_cache = DiskCacheThreads(DiskCache(str(folder), QUOTA), MOST)
    disk_cache.keep(ref(10), str(source(tmp_path, 10)), 1000)
    disk_cache.write()
    slow.writing.wait()
    threading.Timer(0.1, slow.go_on.set).start()
    disk_cache.close()
    assert set(os.listdir(folder / "slices")) == set(map(ref, range(10)))
    assert set(os.listdir(folder)) == {"slices", "used"}


def test_a_thread_that_is_stuck_in_the_disk_is_left_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP", 0.05)
    slow = Slow(monkeypatch)
    disk_cache = DiskCacheThreads(DiskCache(str(folder), QUOTA), MOST)
    assert disk_cache.look(ref(1), 1)
    slow.writing.wait()
    disk_cache.close()
    threads = [thread for thread in threading.enumerate() if thread.name == "qjam-keep"]
    assert threads
    slow.go_on.set()
    for thread in threads:
        thread.join()
    os.close(disk_cache._wake_write_fd)


def test_a_disk_that_takes_no_more_is_told_of_once(
    folder: Path, tmp_path: Path, disk_cache: DiskCacheThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DiskCache, *_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskCache, "put", fail)
    for number in range(10, 13):
        disk_cache.keep(ref(number), str(source(tmp_path, number)), 1000)
    disk_cache.write()
    assert select.select([disk_cache], [], [], 10.0)[0]
    assert notes(disk_cache) == ["slices are kept no longer: [Errno 28] No space left on device"]


def test_to_write_has_the_lowest_priority(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    priorities: queue.SimpleQueue[int] = queue.SimpleQueue()
    put = DiskCache.put

    def note(self: DiskCache, *slice_: Any) -> bool:
        priorities.put(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return put(self, *slice_)

    monkeypatch.setattr(DiskCache, "put", note)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    disk_cache = DiskCacheThreads(DiskCache(str(folder), QUOTA), MOST)
    disk_cache.keep(ref(10), str(source(tmp_path, 10)), 1000)
    disk_cache.write()
    assert priorities.get(timeout=10.0) == 19
    disk_cache.keep(ref(11), str(source(tmp_path, 11)), 1000)
    disk_cache.close()
    assert priorities.get(timeout=10.0) == before  # who waits for the end writes as the others do
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


# ---- rounds that end while their slices are read ----------------------------------------------------------------


class Held:
    """Holds back what is read of the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.go_on = threading.Event(), threading.Event()
        take = DiskCache.take

        def held(kept: DiskCache, ref: str) -> Any:
            self.reading.set()
            self.go_on.wait()
            return take(kept, ref)

        monkeypatch.setattr(DiskCache, "take", held)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("again", ["before", "after"])
def test_a_round_that_ends_meanwhile_is_no_harm_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool, again: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DataSet([1, 2, 3, 4], slice_size=1)
    with Master(2, keep_data=True) as master:
        assert master.run(lambda params, part: sum(part), None, data) == 10
    if damaged:
        for path in (tmp_path / "qjam" / "data" / "slices").iterdir():
            path.chmod(0o600)
            path.write_bytes(b"nonsense")
    held = Held(monkeypatch)
    with Master(2, keep_data=True) as master:
        with pytest.raises(RoundTimeout):
            master.run(lambda params, part: sum(part), None, data, timeout=0.1)
        assert held.reading.is_set()
        if again == "after":
            held.go_on.set()
        second = master.submit(lambda params, part: 2 * sum(part), None, data)
        if again == "before":
            threading.Timer(0.1, held.go_on.set).start()
        assert second.result(30.0) == 20
        assert (master.stats().dataset_sent > 0) is damaged
