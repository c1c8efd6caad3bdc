"""Hosts give the slices back that nobody in the program holds any more, and the code of jobs that are over."""

from __future__ import annotations

import contextlib
import gc
import glob
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from qjam import DataSet, Master, NumpyMatrixFileDataSet
from qjam.dispatch import holdings
from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import Sshd, write_config

MIB = 1 << 20
PATIENCE = 30.0


class Pool:
    """A Master, and what its node has in shared memory."""

    def __init__(self, master: Master) -> None:
        self.master = master
        master.run(usercode.total, None, [0.0])
        own = {path for worker in master.workers for path in _mapped(worker.pid)}
        (self.folder,) = {os.path.dirname(path) for path in own if path.startswith("/dev/shm/qjam-")}
        self.pids = [worker.pid for worker in master.workers]

    def files(self) -> list[str]:
        return glob.glob(f"{self.folder}/ref*")

    def bytes(self) -> int:
        size = 0
        for path in self.files():
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(path).st_blocks * 512
        return size

    def sent(self, data: Any) -> int:
        before = self.master.stats().dataset_sent
        self.master.run(usercode.total, None, data)
        return self.master.stats().dataset_sent - before

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, (self.files(), self.bytes())
            time.sleep(0.01)


def _mapped(pid: int | None) -> set[str]:
    with open(f"/proc/{pid}/maps") as lines:
        return {line.rstrip("\n").split(None, 5)[5] for line in lines if "/" in line}


@pytest.fixture(params=["local", "ssh"])
def pool(request: pytest.FixtureRequest, tmp_path: Path, ssh_host: Callable[..., Sshd]) -> Iterator[Pool]:
    if request.param == "local":
        with Master(2) as master:
            yield Pool(master)
        return
    config = write_config(tmp_path / "config", [ssh_host()])
    with Master("testhost*2", ssh_config=config) as master:
        yield Pool(master)


def test_the_slices_of_a_data_set_that_is_released_go_at_once_and_are_sent_again_if_it_is_used(pool: Pool) -> None:
    data = DataSet(np.arange(2.0 * MIB))
    assert pool.sent(data) >= 16 * MIB
    assert pool.sent(data) == 0
    data.release()
    pool.until(lambda: pool.bytes() < MIB)
    pool.until(lambda: not any("(deleted)" in path for pid in pool.pids for path in _mapped(pid)))
    assert pool.sent(data) >= 16 * MIB
    data.release()
    data.release()
    pool.until(lambda: pool.bytes() < MIB)


def test_the_slices_of_a_data_set_go_some_time_after_it(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "GRACE", 0.5)
    data = DataSet(np.arange(1.0 * MIB))
    pool.sent(data)
    assert pool.bytes() >= 8 * MIB
    gc.disable()  # nothing waits for it
    try:
        del data
        pool.until(lambda: pool.bytes() < MIB)
    finally:
        gc.enable()


def test_data_that_is_made_anew_for_each_round_is_sent_once(pool: Pool) -> None:
    array = np.arange(1.0 * MIB)
    makes: list[Callable[[], Any]] = [
        lambda: array,
        lambda: array[5:],
        lambda: DataSet(array[7:]),
        lambda: array[:1000].tolist(),
        lambda: range(3, 50),
    ]
    for make in makes:
        assert pool.sent(make()) > 0
        assert [pool.sent(make()) for _ in range(3)] == [0, 0, 0]


def test_an_array_is_held_for_as_long_as_it_lives_and_is_what_it_was(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "GRACE", 0.0)
    array = np.arange(1.0 * MIB)
    pool.sent(array)
    for number in range(20):
        pool.sent([number])
    assert pool.sent(array) == 0
    for number in range(40):
        array[0] = number + 1
        assert pool.sent(array) > 0
    pool.until(lambda: pool.bytes() < 9 * MIB)
    del array
    pool.until(lambda: pool.bytes() < MIB)


def test_slices_that_another_data_set_has_too_stay(pool: Pool) -> None:
    array = np.arange(1.0 * MIB)
    one, same = DataSet(array, slice_size=MIB // 4), DataSet(array.copy(), slice_size=MIB // 4)
    part = DataSet(array[: MIB // 2].copy(), slice_size=MIB // 4)
    assert pool.sent(one) > 0
    assert pool.sent(same) == 0
    pool.sent(part)
    one.release()
    assert pool.sent(same) == 0
    same.release()
    pool.until(lambda: 4 * MIB <= pool.bytes() < 5 * MIB)
    assert pool.sent(part) == 0
    part.release()
    pool.until(lambda: pool.bytes() < MIB)


def test_a_round_that_runs_keeps_its_slices(pool: Pool) -> None:
    def slow(params: Any, part: Any) -> float:
        import time

        time.sleep(0.1)
        return float(part.sum())

    array = np.arange(1000.0)
    data = DataSet(array, slice_size=50)
    expected = array.sum()
    rounds = [pool.master.submit(slow, None, data) for _ in range(3)]
    data.release()
    del data
    assert [done.result(PATIENCE) for done in rounds] == [expected] * 3
    pool.until(lambda: len(pool.files()) <= 5)


def test_a_future_does_not_keep_the_data(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "GRACE", 0.5)
    done = pool.master.submit(usercode.total, None, DataSet(np.arange(1.0 * MIB)))
    assert done.result(PATIENCE) == MIB * (MIB - 1) / 2
    pool.until(lambda: pool.bytes() < MIB)


def test_many_data_sets_and_many_functions_leave_little(pool: Pool) -> None:
    for number in range(300):
        kept = DataSet(np.full(MIB // 8, float(number)))
        assert pool.master.run(usercode.total, None, kept) == number * MIB // 8
        pool.master.run(usercode.total, None, np.full(MIB // 8, number + 0.5))
        pool.master.run(lambda params, part, number=number: number, None, [1])
    assert pool.bytes() < 40 * MIB
    assert len(pool.files()) < 2 * holdings.MOST + 80
    dispatch = pool.master._engine.dispatch
    assert len(dispatch._jobs) <= 65
    assert len(dispatch._holdings) <= holdings.MOST + 2
    assert len(pool.master._leases._leases) <= 2


def test_closures_with_much_in_them_do_not_pile_up(pool: Pool) -> None:
    for number in range(10):
        much = np.full(3 * MIB, float(number))
        assert pool.master.run(lambda params, part, much=much: float(much[0]), None, [1]) == number
    assert pool.bytes() < 64 * MIB + 30 * MIB


def test_a_file_that_is_released_is_mapped_no_longer(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.arange(1.0 * MIB))
    with Master(2) as master:
        pool = Pool(master)
        data = NumpyMatrixFileDataSet(tmp_path / "m.npy")
        assert pool.sent(data) == 0
        assert any(str(tmp_path / "m.npy") in _mapped(pid) for pid in pool.pids)
        data.release()
        pool.until(lambda: not any(str(tmp_path / "m.npy") in _mapped(pid) for pid in pool.pids))
        assert pool.sent(data) == 0


def test_what_is_kept_on_disk_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arrays = [np.full(MIB // 8, float(number)) for number in range(20)]
    with Master(2, keep_data=True) as master:
        for array in arrays:
            data = DataSet(array, slice_size=MIB // 8)
            master.run(usercode.total, None, data)
            data.release()
        pool = Pool(master)
        pool.until(lambda: pool.bytes() < MIB)
        pool.until(lambda: len(list(tmp_path.glob("qjam/data/slices/*"))) > 20)
        pool.until(lambda: len(list(tmp_path.glob("qjam/data/qjam-*/[0-9a-f]*"))) <= 1)
        assert pool.sent(DataSet(arrays[0], slice_size=MIB // 8)) == 0
    with Master(2, keep_data=True) as master:
        for array in arrays:
            master.run(usercode.total, None, DataSet(array, slice_size=MIB // 8))
        assert master.stats().dataset_sent == 0


def test_data_outlives_its_master_and_a_master_its_data() -> None:
    data = DataSet([1.0, 2.0])
    for _ in range(2):
        with Master(1) as master:
            assert master.run(usercode.total, None, data) == 3
    data.release()
    del data
    gc.collect()
