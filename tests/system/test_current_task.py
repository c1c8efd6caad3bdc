"""What a function may know of its task: `current_task()`, here and on hosts where there is no qjam."""

from __future__ import annotations

import importlib
import os
import types
from contextlib import closing

import numpy as np
import pytest

import pyzmq_garbage  # noqa: F401
import taskcode
from gates import Gate
from qjam import DataSet, HostSpec, Master, Task, TaskError, current_task
from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import bare_python

SIZES = [5, 3, 8, 1, 4, 2]
DATA = DataSet(SIZES, slice_size=1)


@pytest.fixture(params=["local", "ssh"])
def start(request):
    """Starts a Master with so many workers, here or on a host that has neither qjam nor the user's packages."""
    if request.param == "local":
        return lambda workers: Master(f"local*{workers}")
    sshd = request.getfixturevalue("ssh_host")()
    return lambda workers: Master(
        HostSpec(sshd.name, workers=workers, python=f"{bare_python()} -I"), ssh_config=sshd.config
    )


def with_merging(mapfunc, reduce=taskcode.merged):
    """The function as a module whose results are merged."""
    module = types.ModuleType("made_here")
    module.mapfunc, module.reduce = mapfunc, reduce
    return module


def test_a_task_tells_its_slice_its_worker_and_its_host(start):
    with start(2) as master:
        host = master.workers[0].host
        told = master.run(with_merging(taskcode.tell), None, DATA)
        assert {index: [told[index][0], *told[index][1:2], *told[index][3:]] for index in told} == {
            index: [index, 6, host, 1] for index in range(6)
        }
        assert {task[2] for task in told.values()} == {0, 1}
        told = master.run(with_merging(taskcode.tell))
        assert told == {turn: [turn, 2, turn, host, 1] for turn in range(2)}
        assert master.run(with_merging(taskcode.tell_in_a_thread)) == told


def test_random_numbers_are_the_same_on_any_number_of_workers_and_after_a_failure(start, tmp_path):
    drawn = []
    for workers in (1, 3):
        with start(workers) as master:
            drawn.append(master.run(with_merging(taskcode.draw), 42, DATA))
            again = master.run(with_merging(taskcode.draw_and_die_once), (42, str(tmp_path / f"{workers}")), DATA)
        assert again.pop("attempts")[1] == 2
        drawn.append(again)
    streams = np.random.SeedSequence(42).spawn(6)
    expected = {i: np.random.default_rng(streams[i]).random(size).sum() for i, size in enumerate(SIZES)}
    assert drawn == [expected] * 4


def test_a_second_attempt_knows_that_it_is_one(start, tmp_path):
    with closing(Gate(tmp_path / "gate")) as gate, closing(Gate(tmp_path / "way")) as way, start(2) as master:
        told = master.run(with_merging(taskcode.be_late_once), (gate.path, way.path), DATA)
        assert gate.heard() == "1"
    assert {index: task[4] for index, task in told.items()} == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}


def test_asking_for_the_task_loads_no_qjam_and_other_names_load_the_real_one(start):
    with start(1) as master:
        assert master.run(taskcode.what_qjam_is) == {0: [False, True, True]}
        assert master.run(taskcode.what_qjam_is) == {0: [True, True, True]}


def test_streams_differ_from_each_other_and_from_numpys_own():
    seen = {Task(index, 4, 0, "local").rng(seed).random() for index in range(4) for seed in (7, 8, [7, 1], [7, 2])}
    assert len(seen) == 16
    assert np.random.default_rng(7).random() not in seen
    assert Task(1, 2, 0, "a").rng(7).random() == Task(1, 9, 5, "b", 3).rng(np.int64(7)).random()


@pytest.mark.parametrize(("seed", "error"), [(None, TypeError), (1.5, TypeError), ("a", TypeError), (-1, ValueError)])
def test_a_seed_that_is_none_is_refused(seed, error):
    with pytest.raises(error):
        Task(0, 1, 0, "local").rng(seed)


def test_outside_of_mapfunc_there_is_no_task(start, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="is for mapfunc and what it calls"):
        current_task()
    source = f"import os\nfrom qjam import current_task\nif os.getpid() != {os.getpid()}: current_task()\n"
    (tmp_path / "asks_too_soon.py").write_text(f"{source}def mapfunc(params, part): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    asks_too_soon = importlib.import_module("asks_too_soon")
    with start(1) as master:
        told = master.run(with_merging(taskcode.tell, taskcode.outside_of_mapfunc), None, DATA)
        assert "is for mapfunc and what it calls" in told["reduce"]
        with pytest.raises(TaskError, match="RuntimeError: current_task"):
            master.run(asks_too_soon)
