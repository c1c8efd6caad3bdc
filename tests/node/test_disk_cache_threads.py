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
from qjam_worker.node.disk_cache import Kept
from qjam_worker.node.disk_cache_threads import Found, Keeper

QUOTA = 1 << 30
MOST = 5000


def ref(number: int) -> str:
    return f"{number:032x}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory in which the slices 0 to 9 are kept."""
    folder = tmp_path / "qjam" / "data"
    with closing(Kept(str(folder), QUOTA)) as kept:
        for number in range(10):
            kept.put(ref(number), str(source(tmp_path, number)), 1000)
    return folder


def source(folder: Path, number: int) -> Path:
    path = folder / f"source{number}"
    path.write_bytes(bytes([number]) * 1000)
    return path


@pytest.fixture
def keeper(folder: Path) -> Iterator[Keeper]:
    with closing(Keeper(Kept(str(folder), QUOTA), MOST)) as keeper:
        yield keeper


def found(keeper: Keeper, count: int) -> list[Found]:
    """Waits for the answers to so many looks."""
    answers: list[Found] = []
    while len(answers) < count:
        assert select.select([keeper], [], [], 10.0)[0]
        answers += keeper.found()
    return answers


def notes(keeper: Keeper) -> list[str]:
    return [keeper.notes.get() for _ in range(keeper.notes.qsize())]


def test_what_is_not_kept_is_told_at_once(keeper: Keeper) -> None:
    assert not keeper.look(ref(77), 1)
    assert not keeper.look("params:1", 1)
    assert keeper.found() == []


def test_each_look_is_answered_once_with_the_round_that_asked_last(keeper: Keeper) -> None:
    for number in range(10):
        assert keeper.look(ref(number), 1)
    for number in range(5):
        keeper.look(ref(number), 2)
    answers = {one.ref: one for one in found(keeper, 10)}
    assert len(answers) == 10
    for number in range(10):
        one = answers[ref(number)]
        assert one.path is not None
        assert Path(one.path).read_bytes()[: one.size] == bytes([number]) * 1000
    assert [answers[ref(number)].round for number in range(10)] == [2] * 5 + [1] * 5
    assert keeper.found() == []
    assert keeper.look(ref(3), 3)
    assert [(one.ref, one.round) for one in found(keeper, 1)] == [(ref(3), 3)]


def test_damage_is_an_answer_and_is_told_of_more_and_more_seldom(keeper: Keeper, folder: Path) -> None:
    for number in range(10):
        path = folder / "slices" / ref(number)
        path.chmod(0o600)
        path.write_bytes(b"nonsense")
        assert keeper.look(ref(number), 1)
    assert {one.path for one in found(keeper, 10)} == {None}
    said = notes(keeper)
    assert len(said) == 4
    assert [text.partition("fetched again")[2] for text in said] == ["", " (2 so far)", " (4 so far)", " (8 so far)"]


def test_a_defect_of_the_disk_is_an_answer(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Kept, ref: str) -> Any:
        raise MemoryError

    monkeypatch.setattr(Kept, "take", fail)
    for number in range(10):
        assert keeper.look(ref(number), 1)
    assert {one.path for one in found(keeper, 10)} == {None}
    assert "MemoryError" in notes(keeper)[0]


def test_writing_begins_when_it_is_to_or_when_much_is_held_back(
    folder: Path, tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(Kept, "put", lambda self, ref, path, size: written.put(ref) or True)
    for number in range(10, 15):
        keeper.keep(ref(number), str(source(tmp_path, number)), 1000)
    assert written.empty()
    assert not keeper._writers
    keeper.keep(ref(15), str(source(tmp_path, 15)), 1000)
    assert [written.get(timeout=10.0) for _ in range(6)] == [ref(number) for number in range(10, 16)]
    keeper.keep(ref(16), str(source(tmp_path, 16)), 1000)
    keeper.write()
    assert written.get(timeout=10.0) == ref(16)


def test_at_the_end_what_waits_is_written(folder: Path, tmp_path: Path) -> None:
    keeper = Keeper(Kept(str(folder), QUOTA), MOST)
    for number in range(10, 60):
        keeper.keep(ref(number), str(source(tmp_path, number)), 1000)
    keeper.close()
    assert set(os.listdir(folder / "slices")) == set(map(ref, range(60)))


class Slow:
    """Every piece that is written waits here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writing, self.go_on = threading.Event(), threading.Event()
        check = Kept._go_on

        def wait(kept: Kept) -> None:
            self.writing.set()
            self.go_on.wait()
            check(kept)

        monkeypatch.setattr(Kept, "_go_on", wait)


def test_what_is_being_written_at_the_end_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    keeper = Keeper(Kept(str(folder), QUOTA), MOST)
    keeper.keep(ref(10), str(source(tmp_path, 10)), 1000)
    keeper.write()
    slow.writing.wait()
    keeper.keep(ref(11), str(source(tmp_path, 11)), 1000)
    threading.Timer(0.1, slow.go_on.set).start()
    keeper.close()
    assert set(os.listdir(folder / "slices")) == set(map(ref, range(12)))


def test_the_end_does_not_wait_for_ever(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", -1.0)
    slow = Slow(monkeypatch)
    keeper = Keeper(Kept(str(folder), QUOTA), MOST)
    keeper.keep(ref(10), str(source(tmp_path, 10)), 1000)
    keeper.write()
    slow.writing.wait()
    threading.Timer(0.1, slow.go_on.set).start()
    keeper.close()
    assert set(os.listdir(folder / "slices")) == set(map(ref, range(10)))
    assert set(os.listdir(folder)) == {"slices", "used"}


def test_a_thread_that_is_stuck_in_the_disk_is_left_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP", 0.05)
    slow = Slow(monkeypatch)
    keeper = Keeper(Kept(str(folder), QUOTA), MOST)
    assert keeper.look(ref(1), 1)
    slow.writing.wait()
    keeper.close()
    threads = [thread for thread in threading.enumerate() if thread.name == "qjam-keep"]
    assert threads
    slow.go_on.set()
    for thread in threads:
        thread.join()
    os.close(keeper._bell_fd)


def test_a_disk_that_takes_no_more_is_told_of_once(
    folder: Path, tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Kept, *_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Kept, "put", fail)
    for number in range(10, 13):
        keeper.keep(ref(number), str(source(tmp_path, number)), 1000)
    keeper.write()
    assert select.select([keeper], [], [], 10.0)[0]
    assert notes(keeper) == ["slices are kept no longer: [Errno 28] No space left on device"]


def test_to_write_has_the_lowest_priority(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    priorities: queue.SimpleQueue[int] = queue.SimpleQueue()
    put = Kept.put

    def note(self: Kept, *slice_: Any) -> bool:
        priorities.put(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return put(self, *slice_)

    monkeypatch.setattr(Kept, "put", note)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    keeper = Keeper(Kept(str(folder), QUOTA), MOST)
    keeper.keep(ref(10), str(source(tmp_path, 10)), 1000)
    keeper.write()
    assert priorities.get(timeout=10.0) == 19
    keeper.keep(ref(11), str(source(tmp_path, 11)), 1000)
    keeper.close()
    assert priorities.get(timeout=10.0) == before  # who waits for the end writes as the others do
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


# ---- rounds that end while their slices are read ----------------------------------------------------------------


class Held:
    """Holds back what is read of the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.go_on = threading.Event(), threading.Event()
        take = Kept.take

        def held(kept: Kept, ref: str) -> Any:
            self.reading.set()
            self.go_on.wait()
            return take(kept, ref)

        monkeypatch.setattr(Kept, "take", held)


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
