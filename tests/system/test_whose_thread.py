"""Who asks a data set for its slices: what docs/data.md says, with sqlite, whose objects refuse other threads."""

from __future__ import annotations

import os
import sqlite3
import threading

import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from qjam import BaseDataSet, Master
from ssh_hosts import home, ssh_host  # noqa: F401


class Rows(BaseDataSet):
    """The numbers of a table, with a connection for each thread, or with one for all."""

    def __init__(self, path, *, shared=False):
        self.path, self.opened = path, threading.local()
        self.askers = set()
        self.shared = sqlite3.connect(path) if shared else None

    def chunks(self):
        return 3

    def slice(self, index):
        self.askers.add((threading.current_thread().name, os.getpid()))
        if not hasattr(self.opened, "connection"):
            self.opened.connection = self.shared or sqlite3.connect(self.path)
        rows = self.opened.connection.execute("select x from t where x % 3 = ? order by x", [index])
        return [x for (x,) in rows]


@pytest.fixture
def table(tmp_path):
    with sqlite3.connect(tmp_path / "table") as connection:
        connection.execute("create table t (x)")
        connection.executemany("insert into t values (?)", [[x] for x in range(10)])
    connection.close()
    return tmp_path / "table"


@pytest.fixture(params=["local*2", "testhost*2"])
def master(request, ssh_host):
    options = {} if request.param.startswith("local") else {"ssh_config": ssh_host().config}
    with Master(request.param, **options) as master:
        yield master


def test_the_caller_and_one_thread_ask_for_slices_here_and_no_fork_does(master, table):
    rows = Rows(table)
    assert master.run(usercode.add_up, 2, rows) == 90
    here = os.getpid()
    assert rows.askers == {(threading.current_thread().name, here), ("qjam-load", here)}


def test_a_connection_that_refuses_the_thread_is_the_error_that_run_raises(master, table):
    rows = Rows(table, shared=True)
    with pytest.raises(sqlite3.ProgrammingError, match="created in a thread can only be used in that same thread"):
        master.run(usercode.add_up, 2, rows)
    rows.shared.close()
    assert master.run(usercode.add_up, 2, Rows(table)) == 90
