"""The queue of calls: whole records, each for one reader, in their order."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from qjam_worker.ipc.call_pipe import SIZE, CallPipe, CallSource, Record

READERS = 4


def record(number: int) -> Record:
    return Record(number, number + 1, number + 2, number + 3, number + 4, number + 5, number + 6)


RECORDS = [record(number) for number in range(1, 20_001)]


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[CallPipe]:
    made = CallPipe(str(tmp_path / "calls"))
    yield made
    made.close()


def open_source(pipe: CallPipe) -> tuple[int, CallSource]:
    fd = os.open(pipe.path, os.O_RDONLY | os.O_NONBLOCK)
    return fd, CallSource(fd)


def test_what_is_put_is_drained_in_its_order(pipe: CallPipe) -> None:
    assert pipe.put(RECORDS[:1000]) == 1000
    assert len(pipe) == 1000
    assert pipe.drain() == RECORDS[:1000]
    assert (len(pipe), pipe.drain()) == (0, [])


def test_put_tells_how_many_there_was_room_for(pipe: CallPipe) -> None:
    written = pipe.put(RECORDS)
    assert 64 * 1024 // SIZE // 2 <= written < len(RECORDS)
    assert len(pipe) == written
    assert pipe.put(RECORDS[written:]) == 0
    assert pipe.drain() == RECORDS[:written]


def test_a_reader_takes_the_oldest_and_none_of_an_empty_queue(pipe: CallPipe) -> None:
    fd, source = open_source(pipe)
    assert source.take() is None
    pipe.put(RECORDS[:3])
    assert [source.take(), source.take()] == RECORDS[:2]
    assert pipe.drain() == RECORDS[2:3]
    assert source.take() is None
    os.close(fd)


def fill(pipe: CallPipe, drained: list[Record]) -> None:
    """Put all records, and take some out again meanwhile, as a node does."""
    left, turns = RECORDS, 0
    while left:
        left = left[pipe.put(left[:300]) :]
        turns += 1
        if turns % 7 == 0:
            drained += pipe.drain()


def test_threads_that_read_at_once_get_each_record_once_and_whole(pipe: CallPipe) -> None:
    taken: list[list[Record]] = [[] for _ in range(READERS)]
    done = threading.Event()

    def read(its: list[Record]) -> None:
        fd, source = open_source(pipe)
        while True:
            over = done.is_set()
            one = source.take()
            if one is not None:
                its.append(one)
            elif over:
                break
        os.close(fd)

    threads = [threading.Thread(target=read, args=(its,)) for its in taken]
    for thread in threads:
        thread.start()
    drained: list[Record] = []
    fill(pipe, drained)
    done.set()
    for thread in threads:
        thread.join()
    assert Counter(one for its in [*taken, drained] for one in its) == Counter(RECORDS)
    for its in [*taken, drained]:
        assert its == sorted(its)


def test_processes_that_read_at_once_get_each_record_once_and_whole(pipe: CallPipe, tmp_path: Path) -> None:
    end, end_writer = os.pipe()
    pids = []
    for reader in range(READERS):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(end_writer)
                os.set_blocking(end, False)
                _, source = open_source(pipe)
                numbers = []
                while True:
                    one = source.take()
                    if one is not None:
                        numbers.append(one.call if one == record(one.call) else 0)
                        continue
                    try:
                        os.read(end, 1)
                        break
                    except BlockingIOError:
                        os.sched_yield()
                (tmp_path / f"reader{reader}").write_text(" ".join(map(str, numbers)))
            finally:
                os._exit(0)
        pids.append(pid)
    drained: list[Record] = []
    fill(pipe, drained)
    while len(pipe):
        os.sched_yield()
    os.close(end_writer)
    os.close(end)
    for pid in pids:
        os.waitpid(pid, 0)
    numbers = [int(word) for reader in range(READERS) for word in (tmp_path / f"reader{reader}").read_text().split()]
    assert sorted([*numbers, *(one.call for one in drained)]) == [one.call for one in RECORDS]
