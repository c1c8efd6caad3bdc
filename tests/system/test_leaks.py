"""What one function changes in its process is not there for another one, and is there for its own next slices."""

from __future__ import annotations

import importlib
import os
import random
import sys

import numpy as np
import pytest

import leaks
import pyzmq_garbage  # noqa: F401
from qjam import Master, TaskError
from ssh_hosts import home, ssh_host  # noqa: F401


@pytest.fixture
def worker():
    with Master(1) as master:
        yield master


@pytest.mark.parametrize("name", leaks.PUT_BACK)
def test_it_is_put_back_for_another_function_and_kept_for_its_own(worker, name):
    before = worker.run(leaks.look, name)
    first = worker.run(leaks.change_once, name)
    own = worker.run(leaks.change_once, name)
    assert first == before != own
    assert worker.run(leaks.look, name) == before
    assert worker.run(leaks.change_once, name) == own
    assert worker.run(leaks.look, name) == before


def test_all_of_it_is_put_back_on_a_host(ssh_host):
    with Master("testhost*1", ssh_config=ssh_host().config) as master:
        before = {name: master.run(leaks.look, name) for name in leaks.PUT_BACK}
        for name in leaks.PUT_BACK:
            master.run(leaks.change, name)
        assert {name: master.run(leaks.look, name) for name in leaks.PUT_BACK} == before


@pytest.mark.parametrize("name", ["closed stdout", "user"])
def test_a_worker_that_cannot_be_put_right_is_replaced(name):
    if name == "user" and os.getuid() != 0:
        pytest.skip("only root becomes another user")
    with Master(1) as master:
        (before, seen) = master.run(leaks.look, name)
        assert master.run(leaks.change, name) == before
        assert master.run(leaks.change, name) == before  # its own function goes on
        after = master.run(leaks.look, name)
        assert after[0] != before
        assert after[1] == seen
        assert master.run(leaks.look, name) == after


def test_a_timer_of_one_function_does_not_end_another(worker):
    worker.collect(leaks.start_a_timer, 0.2)
    before = worker.workers[0].pid
    assert worker.run(leaks.outlive, 0.4) == before


def test_a_seed_decides_nothing_for_another_function_and_lasts_for_its_own(worker):
    expected = random.Random(5).random(), np.random.RandomState(5).random()
    drawn = set()
    for _ in range(3):
        worker.collect(leaks.seed, 5)
        drawn.add(worker.run(leaks.draw))
    assert len(drawn) == 3
    assert not drawn & {expected}
    stream, legacy = random.Random(6), np.random.RandomState(6)
    for _ in range(3):
        assert worker.run(leaks.seed_once_and_draw, 6) == (stream.random(), legacy.random())
        worker.run(leaks.draw)


def test_every_function_finds_modules_where_this_program_does(worker, tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "found_late.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    for first in ("nothing", "raises"):
        with Master(1) as master:
            if first == "raises":
                with pytest.raises(TaskError):
                    master.run(leaks.Unloadable())
            else:
                master.run(lambda params, part: 0)
            for _ in range(2):
                assert master.run(lambda params, part: __import__("found_late").answer) == 42
                assert master.run(lambda params, part: __import__("found_late").answer + 1) == 43


def test_what_a_module_sets_as_it_is_imported_holds_for_all(worker, tmp_path, monkeypatch):
    source = "import decimal, os\ndecimal.getcontext().prec = 7\nos.environ['SET_BY'] = 'import'\n"
    (tmp_path / "sets_much.py").write_text(
        f"{source}def mapfunc(params, part):\n    return str(decimal.Decimal(1) / 3), os.environ['SET_BY']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before, environ = __import__("decimal").getcontext().copy(), dict(os.environ)
    module = importlib.import_module("sets_much")
    try:
        with Master(1) as master:
            master.run(leaks.look, "cwd")
            assert master.run(module) == ("0.3333333", "import")
            assert master.run(leaks.look, "decimal")[1] == "'0.3333333'"
            assert master.run(module) == ("0.3333333", "import")
    finally:
        __import__("decimal").setcontext(before)
        os.environ.pop("SET_BY")
        assert dict(os.environ) == environ
        del sys.modules["sets_much"]
