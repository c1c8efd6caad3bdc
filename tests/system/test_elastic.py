"""Hosts that are added to a Master and removed from it, while it is idle and while rounds run."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elasticcode
import pyzmq_garbage  # noqa: F401
import usercode
from faults import kill_sessions
from gates import Gate
from processes import all_end
from qjam import BootstrapError, DataSet, Master, MasterClosed, RemoteWorker
from qjam_worker.values import flat
from qjam_worker.values.reduction import Tree
from ssh_hosts import block, home, run_seven, ssh_host  # noqa: F401
from sshd import Sshd

ROUNDS_S = 30.0  # for a few rounds; they take milliseconds


@pytest.fixture(scope="module")
def local() -> Iterator[Master]:
    """This machine alone, and no wrong argument has changed that."""
    with Master(["local*2"]) as master:
        yield master
        assert master.run(usercode.forty_two) == 84
        assert [worker.host for worker in master.workers] == ["local", "local"]
        assert len(master.start_reports) == 1


# ---- what cannot be meant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", ["local", "local*4", 3, None, ["nowhere", "local"], RemoteWorker("local")])
def test_a_host_that_is_here_already_cannot_be_added(local: Master, hosts: Any) -> None:
    with pytest.raises(ValueError, match="hosts: 'local' is already a host of this Master; remove it first"):
        local.add_hosts(hosts)


@pytest.mark.parametrize("method", ["add_hosts", "remove_hosts"])
@pytest.mark.parametrize(
    ("hosts", "error", "text"),
    [
        ([], ValueError, "hosts: no host is named"),
        ("", ValueError, "hosts: no host is named"),
        ("a b*x", ValueError, "hosts: 'b\\*x' is not a host"),
        (True, TypeError, "hosts must be None, a number of workers"),
        (1.5, TypeError, "hosts must be None, a number of workers"),
        ([1], TypeError, "hosts: 1 .* is neither a text nor a HostSpec"),
    ],
)
def test_hosts_must_be_hosts(local: Master, method: str, hosts: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        getattr(local, method)(hosts)


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (0, ValueError, "min_workers must be from 1 to 2, not 0"),
        (3, ValueError, "min_workers must be from 1 to 2, not 3"),
        ("1", TypeError, "min_workers must be an int or None, not '1'"),
        (True, TypeError, "min_workers must be an int or None, not True"),
    ],
)
def test_min_workers_must_be_a_number_of_those_that_are_added(
    local: Master, number: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        local.add_hosts("nowhere*2", min_workers=number)


@pytest.mark.parametrize("hosts", ["there", ["local", "there"], "localhost", "me@there:22*3"])
def test_a_host_that_is_not_here_cannot_be_removed(local: Master, hosts: Any) -> None:
    with pytest.raises(ValueError, match=r"hosts: '[^']+' is not a host of this Master; those are local"):
        local.remove_hosts(hosts)


@pytest.mark.parametrize("hosts", ["local", "local*2", 2, None])
def test_the_last_host_cannot_be_removed(local: Master, hosts: Any) -> None:
    with pytest.raises(ValueError, match="hosts: no host would be left; use close\\(\\) to end the Master"):
        local.remove_hosts(hosts)


def test_a_closed_master_has_no_hosts_to_add_or_remove() -> None:
    master = Master(1)
    master.close()
    for method in (master.add_hosts, master.remove_hosts):
        with pytest.raises(MasterClosed, match="this Master is closed"):
            method("there")


@pytest.mark.parametrize("speculation", [None, 0, 1, "no"])
def test_speculation_must_be_true_or_false(speculation: Any) -> None:
    with pytest.raises(TypeError, match=f"speculation must be True or False, not {speculation!r}"):
        Master(1, speculation=speculation)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_memory_limit_must_be_some_memory(limit: int) -> None:
    with pytest.raises(ValueError, match=f"memory_limit must be .*, not {limit}"):
        Master(1, memory_limit=limit)


@pytest.mark.parametrize("limit", [True, 1e9, b"1GB", [1]])
def test_a_memory_limit_must_be_bytes(limit: Any) -> None:
    with pytest.raises(TypeError, match=r"memory_limit must be .* not "):
        Master(1, memory_limit=limit)


# ---- hosts that do not come ---------------------------------------------------------------------------------------


@pytest.fixture
def mute() -> Iterator[str]:
    """A host that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def no_config(tmp_path: Path) -> Path:
    path = tmp_path / "no_config"
    path.write_text("")
    return path


def test_a_host_that_cannot_be_added_changes_nothing(no_config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"127.0.0.1:{server.getsockname()[1]}"
    with Master("local*2", ssh_config=no_config) as master:
        with pytest.raises(BootstrapError, match=f"{nobody}: connect") as caught:
            master.add_hosts(nobody)
        assert [report.host for report in caught.value.hosts] == [nobody]
        assert [worker.host for worker in master.workers] == ["local", "local"]
        assert [report.failed for report in master.start_reports] == [None, "connect"]
        assert master.run(usercode.forty_two) == 84
        with pytest.raises(BootstrapError):  # it is no host of the master, so it may be tried again
            master.add_hosts(nobody)


def test_a_master_that_is_closed_while_a_host_is_added_says_so(no_config: Path, mute: str) -> None:
    raised: list[BaseException] = []

    def add() -> None:
        try:
            master.add_hosts(mute)
        except BaseException as error:
            raised.append(error)

    with Master(1, ssh_config=no_config) as master:
        adding = threading.Thread(target=add)
        adding.start()
        deadline = time.monotonic() + 10.0
        while len(master._supervisor) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        master.close()
        adding.join(10.0)
    assert not adding.is_alive()
    assert [type(error) for error in raised] == [MasterClosed], raised


def test_a_host_that_is_removed_while_it_is_added_has_not_come(no_config: Path, mute: str) -> None:
    raised: list[BaseException] = []

    def add() -> None:
        try:
            master.add_hosts(mute)
        except BaseException as error:
            raised.append(error)

    with Master(1, ssh_config=no_config) as master:
        adding = threading.Thread(target=add)
        adding.start()
        deadline = time.monotonic() + 10.0
        while len(master._supervisor) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        master.remove_hosts(mute)
        adding.join(10.0)
        assert not adding.is_alive()
        assert [worker.host for worker in master.workers] == ["local"]
        assert master.run(usercode.forty_two) == 42
    assert [isinstance(error, BootstrapError) for error in raised] == [True], raised


# ---- hosts that come and go -----------------------------------------------------------------------------------------


DATA = np.random.default_rng(7).standard_normal((260, 5)) * 10.0 ** np.arange(5)


def serial(factor: float, data: DataSet) -> bytes:
    """The result without any worker, to the last bit."""
    tree = Tree(len(data))
    for index in range(len(data)):
        tree.add((index, index + 1), elasticcode.scaled(factor, data.slice(index)))
    tree.fold(lambda left, right: left + right)
    return bytes(tree.values[0, len(data)].tobytes())


class Rounds:
    """A thread that runs one round after the other; `check` sees whether each was right."""

    def __init__(self, master: Master, data: DataSet) -> None:
        self._master, self._data = master, data
        self.results: list[bytes] = []
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                result = self._master.run(elasticcode.scaled, 0.1 * len(self.results), self._data)
                with self._more:
                    self.results.append(result.tobytes())
                    self._more.notify_all()
        except BaseException as error:
            self._error = error

    def some(self, count: int = 5) -> None:
        """Waits for so many more."""
        with self._more:
            wanted = len(self.results) + count
            assert self._more.wait_for(lambda: len(self.results) >= wanted, ROUNDS_S), self._error

    def check(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self._error is None
        wrong = [k for k, result in enumerate(self.results) if result != serial(0.1 * k, self._data)]
        assert wrong == []


def sessions(sshd: Sshd) -> set[int]:
    found = sshd.sessions()
    assert found
    return found


def test_a_host_is_added_to_a_running_loop_and_removed_from_it(ssh_host: Any) -> None:
    sshd = ssh_host()
    with Master("local", ssh_config=sshd.config) as master:
        rounds = Rounds(master, DataSet(DATA, slice_size=7))
        rounds.some()
        added = master.add_hosts("testhost*2")
        assert [(worker.host, worker.index, worker.state) for worker in added] == [
            ("testhost", 0, "ready"),
            ("testhost", 1, "ready"),
        ]
        assert [worker.host for worker in master.workers] == ["local", "testhost", "testhost"]
        assert added[0].ping() < 5.0
        assert [report.host for report in master.start_reports] == ["local", "testhost"]
        rounds.some()
        there = sessions(sshd)
        master.remove_hosts("testhost")
        assert [worker.host for worker in master.workers] == ["local"]
        assert [worker.state for worker in added] == ["closed", "closed"]
        assert all_end(there)
        rounds.some()
        rounds.check()
        assert master.stats().failed_rounds == 0


def test_every_host_may_go_as_long_as_one_is_left(ssh_host: Any) -> None:
    sshd = ssh_host()
    with Master("local*2", ssh_config=sshd.config) as master:
        rounds = Rounds(master, DataSet(DATA, slice_size=7))
        rounds.some()
        master.add_hosts("testhost")
        rounds.some()
        master.remove_hosts("local")
        rounds.some()
        assert [worker.host for worker in master.workers] == ["testhost"]
        assert [worker.host for worker in master.add_hosts("local*3")] == ["local"] * 3
        rounds.some()
        master.remove_hosts("testhost")
        rounds.some()
        rounds.check()


def test_a_host_may_be_added_again_and_again(ssh_host: Any) -> None:
    sshd = ssh_host()
    with Master("local", ssh_config=sshd.config) as master:
        for workers in (1, 2, 1):
            master.add_hosts(f"testhost*{workers}")
            assert master.run(usercode.forty_two) == 42 * (1 + workers)
            there = sessions(sshd)
            master.remove_hosts("testhost")
            assert all_end(there)
            assert master.run(usercode.forty_two) == 42
        run_seven(master)


def test_only_the_slices_that_move_are_sent(ssh_host: Any) -> None:
    sshd = ssh_host()
    data = DataSet([np.arange(1000.0 + index) for index in range(3)], slice_size=1)
    sizes = [flat.size(data.slice_data(index)) for index in range(3)]

    def sent(master: Master) -> int:
        before = master.stats().dataset_sent
        assert master.run(elasticcode.take_a_while, None, data) == 3
        return master.stats().dataset_sent - before

    with Master("local", ssh_config=sshd.config, speculation=False) as master:
        assert [sent(master), sent(master)] == [sum(sizes), 0]
        master.add_hosts("testhost*2")
        assert [sent(master), sent(master)] == [sum(sizes[1:]), 0]
        master.remove_hosts("testhost")
        assert [sent(master), sent(master)] == [0, 0]  # they are here still


def test_what_a_removed_host_was_doing_is_done_by_the_others(ssh_host: Any, tmp_path: Path) -> None:
    sshd = ssh_host()
    gate = Gate(tmp_path / "gate")
    with Master("local", ssh_config=sshd.config) as master:
        master.add_hosts("testhost")
        future = master.submit(
            elasticcode.linger_elsewhere, (gate.path, os.getpid()), DataSet([1, 2, 3, 4], slice_size=2)
        )
        gate.heard()  # a worker there is at it and would never be done
        there = sessions(sshd)
        master.remove_hosts("testhost")
        assert future.result(ROUNDS_S) == 10
        assert all_end(there)
    gate.close()


def test_a_host_whose_session_is_killed_comes_back_in_a_running_loop(ssh_host: Any, caplog: Any) -> None:
    sshd = ssh_host()
    with (
        caplog.at_level(logging.WARNING, "qjam"),
        Master(["local", "testhost*2"], ssh_config=sshd.config) as master,
    ):
        rounds = Rounds(master, DataSet(DATA, slice_size=7))
        rounds.some()
        there = sessions(sshd)
        kill_sessions(sshd)
        deadline = time.monotonic() + ROUNDS_S
        while "testhost is back" not in caplog.text and time.monotonic() < deadline:
            rounds.some(1)
        assert "testhost is lost" in caplog.text
        assert "testhost is back" in caplog.text
        assert all_end(there)
        assert [worker.state for worker in master.workers] == ["ready"] * 3
        rounds.some()
        rounds.check()
        assert master.run(usercode.forty_two) == 3 * 42


def test_two_hosts_at_once_are_added_or_none(ssh_host: Any, tmp_path: Path) -> None:
    one = ssh_host("one")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = tmp_path / "both"
    config.write_text(block(one) + block(one, "gone", Port=port))
    with Master("local", ssh_config=config) as master:
        with pytest.raises(BootstrapError, match="1 of 2 hosts did not start"):
            master.add_hosts("one, gone")
        assert [worker.host for worker in master.workers] == ["local"]
        assert all_end(one.sessions())
        assert [worker.host for worker in master.add_hosts("one*2, gone", min_workers=1)] == ["one", "one"]
        assert master.run(usercode.forty_two) == 3 * 42
