"""Data that changes after it was hashed is never sent under its old hash: the round fails, the pool goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import pyzmq_garbage  # noqa: F401
import usercode
from qjam import BaseDataSet, DataSet, Master, NumpyMatrixDataSet
from qjam.engine import loader
from ssh_hosts import furnished, home, ssh_host, with_parts_of  # noqa: F401
from sshd import Sshd, write_config

CHANGED = "changed since it was hashed: make a new DataSet"


@pytest.fixture(params=["local", "ssh"])
def start(
    request: pytest.FixtureRequest, tmp_path: Path, ssh_host: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Master]:
    """Starts a Master of two workers, on this machine or on a host; all keep their data in the same place."""
    if request.param == "local":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return lambda **options: Master(2, **options)
    own = with_parts_of(request.getfixturevalue("furnished"), tmp_path / "home")
    config = write_config(tmp_path / "config", [ssh_host(home=own)])
    return lambda **options: Master("testhost*2", ssh_config=config, **options)


@pytest.fixture
def master(start: Callable[..., Master]) -> Iterator[Master]:
    with start() as master:
        yield master


def fails(master: Master, data: BaseDataSet) -> None:
    """A run over changed data says so, and the next one over other data is right."""
    with pytest.raises(RuntimeError, match=rf"slice \d+ of the data set {CHANGED}"):
        master.run(usercode.total, None, data)
    assert master.run(usercode.total, None, [1, 2, 3]) == 6


@pytest.mark.parametrize("rows", [8, 300_000], ids=["small", "of many blocks"])
def test_an_array_that_changed_is_not_sent(master: Master, rows: int) -> None:
    array = np.arange(rows * 8.0).reshape(rows, 8)
    data = DataSet(array).bind(2)
    data.hash_list()
    array[-1, -1] = 0
    fails(master, data)
    assert master.run(usercode.total, None, DataSet(array)) == array.sum()


def test_a_list_that_changed_is_not_sent(master: Master) -> None:
    for change in (lambda items: items[1].append(5), lambda items: items.pop(), lambda items: items.reverse()):
        items = [[1, 2], [3], [4, 4, 4]]
        data = DataSet(items).bind(2)
        data.hash_list()
        change(items)
        fails(master, data)


def test_a_data_set_that_gives_other_slices_the_second_time_is_not_sent(master: Master) -> None:
    class Fickle(BaseDataSet):
        calls = 0

        def chunks(self) -> int:
            return 3

        def slice(self, index: int) -> Any:
            self.calls += 1
            return [index, self.calls > 3]

    fails(master, Fickle())


def test_what_changes_while_it_is_sent_is_never_taken_for_what_was_hashed(master: Master) -> None:
    array = np.zeros(4_000_000)
    for turn in range(8):
        array[:] = turn
        data = NumpyMatrixDataSet(array).bind(2)
        data.hash_list()
        writes = threading.Timer(0.002 * turn, array.fill, [99.0])
        writes.start()
        try:
            assert master.run(usercode.total, None, data) == 4_000_000.0 * turn
        except RuntimeError as error:
            assert CHANGED in str(error)  # noqa: PT017
        writes.join()
        array[:] = turn  # whatever the hosts have under these hashes, it is this
        assert master.run(usercode.total, None, DataSet(array)) == 4_000_000.0 * turn


def test_another_data_set_with_the_right_bytes_goes_on_when_one_has_changed(start: Callable[..., Master]) -> None:
    array = np.arange(2_400_000.0)
    data = DataSet(array).bind(2)
    data.hash_list()
    array[7] = 2
    with start() as master:
        with pytest.raises(RuntimeError, match=CHANGED):
            master.run(usercode.total, None, data)
        array[7] = 7
        assert master.run(usercode.total, None, DataSet(array)) == array.sum()


def test_changed_data_is_not_kept_for_later_programs(start: Callable[..., Master]) -> None:
    array = np.ones(1 << 20)
    data = DataSet(array).bind(2)
    data.hash_list()
    array[:] = 3
    with start(keep_data=True) as master, pytest.raises(RuntimeError, match=CHANGED):
        master.run(usercode.total, None, data)
    with start(keep_data=True) as master:
        assert master.run(usercode.total, None, DataSet(np.ones(1 << 20))) == 1_048_576


def test_blocks_of_a_slice_are_copied_and_their_memory_is_used_again() -> None:
    scratch = loader.Scratch()
    content = np.arange(1_000_000, dtype=np.uint8)
    wanted = xxhash.xxh3_128(content).hexdigest()
    blob = loader.HashedBlob([content], wanted, [wanted], scratch)
    first = blob.range(0, 400_000)
    content_before = bytes(first[0])
    content[:5] = 77
    assert bytes(first[0]) == content_before
    content[:5] = range(5)
    del first
    other = loader.HashedBlob([content], wanted[::-1], [wanted[::-1]], scratch)
    with pytest.raises(loader.Changed):
        other.range(0, 1_000_000)
    assert b"".join(blob.range(400_000, 600_000)) == content[400_000:].tobytes()
    assert b"".join(blob.range(999_999, 1)) == content[999_999:].tobytes()  # asked for once more
    assert len(scratch._buffers) == 1
