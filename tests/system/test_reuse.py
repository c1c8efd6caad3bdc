"""Files of large params and results are written again, and nobody notices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import arraycode
from qjam import Master, TaskError

SIZES = [40_000, 400_000]  # float64: in small pages, and in large ones


@pytest.fixture
def master() -> Iterator[Master]:
    with Master(2) as master:
        yield master


def files(master: Master) -> dict[str, int]:
    """The names and inodes of the files that the node of this machine has made."""
    (node,) = master._engine._local_nodes._nodes.values()
    found = [path for folder in node.files.directories for path in Path(folder).iterdir()]
    return {path.name: path.stat().st_ino for path in found if path.name.startswith(("params", "result"))}


@pytest.mark.parametrize("size", SIZES)
def test_params_that_user_code_keeps_stay_as_they_were(master: Master, size: int) -> None:
    for number in range(6):
        assert master.run(arraycode.keep, np.full(size, float(number))) == 2 * (number + 1)


def test_params_that_a_child_of_user_code_reads_stay_as_they_were(master: Master, tmp_path: Path) -> None:
    name = str(tmp_path / "seen")
    assert master.run(arraycode.fork, (name, np.full(SIZES[1], 7.0))) == 2
    for number in range(3):
        assert master.run(arraycode.first, np.full(SIZES[1], float(number))) == 2 * number
    Path(f"{name}.go").touch()
    deadline = time.monotonic() + 30
    while len(seen := [path for path in tmp_path.glob("seen.*") if path.suffix[1:].isdigit()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert [path.read_text() for path in seen] == ["7.0", "7.0"]


@pytest.mark.parametrize("size", SIZES)
def test_the_file_of_params_is_used_again(master: Master, size: int) -> None:
    seen = []
    for number in range(4):
        assert master.run(arraycode.first, np.full(size, float(number))) == 2 * number
        seen.append(files(master))
    assert len(seen[0]) == 1
    assert seen == [seen[0]] * 4
    assert master.run(arraycode.first, np.full(size + 100, 3.0)) == 6
    assert files(master) != seen[0]
    assert len(files(master)) == 1


@pytest.mark.parametrize("size", SIZES)
def test_results_are_right_in_files_that_are_used_again(master: Master, size: int) -> None:
    kept = []
    for number in range(8):
        params = np.full(size + 10 * (number // 4), float(number))
        kept.append((4 * params, master.run(arraycode.twice, params)))
    for expected, result in kept:
        assert np.array_equal(result, expected)
    assert len(files(master)) <= 3  # of two workers, and the params


def test_files_that_were_not_used_again_go(master: Master) -> None:
    for number in range(5):
        with pytest.raises(TaskError, match="not this one"):
            master.run(arraycode.sometimes, np.full(SIZES[0], 2.0), [0, 1, 2, 3])
        result = master.run(arraycode.sometimes, np.full(SIZES[0], 7.0 + number), [0, 1, 2, 3])
        assert np.array_equal(result, np.full(SIZES[0], 2 * (7.0 + number) + 2))
        assert master.run(arraycode.first, np.full(3, 1.0)) == 2
    assert len(files(master)) <= 3
    assert master.run(arraycode.first, np.full(3, 1.0)) == 2
    assert not [name for name in files(master) if name.startswith("result")]
