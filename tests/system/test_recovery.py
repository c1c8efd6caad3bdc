"""Rounds go on, and give what one process would have given to the last bit, while workers, hosts and links fail."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from faults import fork_server_of, host_processes, node_of, send, sessions_of
from namespaces import Namespace, namespace, namespaces_work
from needs import lacking_programs, need, program
from processes import all_end
from qjam import BootstrapError, DataSet, Master
from qjam.dispatch import stealing
from qjam.launch import fleet, supervisor
from qjam_worker.node import pool
from qjam_worker.values.reduction import Tree, default_reduce
from ssh_hosts import home, run_seven, ssh_host  # noqa: F401
from sshd import Sshd, private_sshd, sshd_works, write_config

ROUTES = ["direct", "tunnel", "stdio"]
NSLICES = 8
BACK_S = 30.0  # it takes 1 or 2


@pytest.fixture(autouse=True)
def _needs(caplog: pytest.LogCaptureFixture) -> None:
    need(sshd_works())
    caplog.set_level(logging.INFO, "qjam")


class Loop:
    """Rounds over one data set, each compared with what the fixed tree gives here."""

    def __init__(self, master: Master, nslices: int = NSLICES) -> None:
        self.master = master
        # The order in which these are added shows in the last bits.
        values = np.random.default_rng(7).standard_normal((nslices, 500)) * np.logspace(-9, 9, 500)
        self.data = DataSet(values, slice_size=1)
        tree = Tree(nslices)
        for index in range(nslices):
            tree.add((index, index + 1), usercode.scaled(3.0, values[index : index + 1]))
        tree.fold(default_reduce)
        self.serial = tree.values[0, nslices].tobytes()
        self.rounds = 0

    def turn(self) -> None:
        result = self.master.run(usercode.scaled, 3.0, self.data, timeout=60.0)
        assert result.tobytes() == self.serial
        self.rounds += 1

    def until(self, happened: Callable[[], bool], seconds: float = BACK_S, pause: float = 0.01) -> float:
        """Goes on until something has happened; gives how many seconds that took. `pause`: rounds without one between
        them keep all cores busy.
        """
        began = time.monotonic()
        while not happened():
            assert time.monotonic() < began + seconds, f"not after {seconds} s: {self.master.workers}"
            self.turn()
            time.sleep(pause)
        return time.monotonic() - began

    def all_back(self) -> bool:
        return all(worker.state == "ready" for worker in self.master.workers)


def two(tmp_path: Path, ssh_host: Callable[..., Sshd], **options: Any) -> tuple[Master, Sshd, Sshd]:
    one, other = ssh_host("one"), ssh_host("other")
    config = write_config(tmp_path / "config", [one, other])
    return Master(["one*2", "other*2"], ssh_config=config, **options), one, other


def told(caplog: pytest.LogCaptureFixture, what: str) -> bool:
    return re.search(what, caplog.text) is not None


# Workers


@pytest.mark.parametrize("remote", [False, True])
def test_killed_workers_cost_nothing_but_time(tmp_path, ssh_host, caplog, monkeypatch, remote):
    monkeypatch.setattr(stealing, "MIN_SEARCH_DELAY", 1e6)  # else a host that is held up may be helped by the other
    with two(tmp_path, ssh_host)[0] if remote else Master(4) as master:
        loop = Loop(master)
        loop.turn()
        sent = master.stats().dataset_sent
        for turn in range(8):
            victim = master.workers[turn % 4]
            pid = victim.pid
            killer = threading.Timer(0.002, send, (pid, signal.SIGKILL))
            killer.start()
            loop.until(lambda victim=victim, pid=pid: victim.pid != pid, pause=0)  # it is to die in a round
            killer.join()
        assert master.stats().dataset_sent == sent  # what a host has it keeps
    assert told(caplog, r"worker \d on \w+ was killed by signal 9 \(SIGKILL\)")
    assert told(caplog, r"worker \d on \w+ is replaced after \d+\.\d\d s")


def test_a_worker_that_is_stopped_is_replaced_also_when_nobody_else_could_try_its_slice(monkeypatch):
    monkeypatch.setattr(pool, "STOPPED", 0.2)
    with Master(1) as master:
        loop = Loop(master)
        loop.turn()
        pid = master.workers[0].pid
        os.kill(pid, signal.SIGSTOP)
        loop.turn()
        assert master.workers[0].pid != pid


def test_a_worker_that_is_stopped_holds_nobody_up():
    with Master(2) as master:
        loop = Loop(master)
        loop.turn()
        pid = master.workers[0].pid
        os.kill(pid, signal.SIGSTOP)
        loop.until(lambda: master.workers[0].pid != pid)  # it is deaf, and so is killed
        loop.turn()


# Hosts

FAULTS: dict[str, Callable[[Sshd], Any]] = {
    "the node is killed": lambda sshd: send(node_of(sshd), signal.SIGKILL),
    "sshd is killed": lambda sshd: [send(pid, signal.SIGKILL) for pid in sessions_of(sshd)],
    "the ssh connection is cut": lambda sshd: [send(pid, signal.SIGKILL) for pid in host_processes()],
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_host_is_started_again_and_goes_on(ssh_host, caplog, fault, route):
    """It is the only one, so the round that was under way waits for it."""
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config, route=route) as master:
        loop = Loop(master)
        loop.turn()
        pids = {worker.pid for worker in master.workers}
        FAULTS[fault](sshd)
        loop.until(lambda: told(caplog, "testhost is back"))
        loop.turn()
        assert loop.all_back()
        assert not pids & {worker.pid for worker in master.workers}
        assert {worker.route for worker in master.workers} == {route}
    assert told(
        caplog, r"testhost is lost: .+; its work goes to the others, and it is started again in 0\.5 s \(1 of 10\)"
    )
    assert told(caplog, r"testhost is back after \d\.\d s, with 2 workers")
    assert master.stats().resent_slices <= NSLICES


def test_a_killed_fork_server_is_replaced_and_the_host_is_not_lost(ssh_host, caplog):
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config) as master:
        loop = Loop(master)
        loop.turn()
        pids = [worker.pid for worker in master.workers]
        assert send(fork_server_of(node_of(sshd) or 0), signal.SIGKILL)
        loop.until(lambda: all(worker.pid not in pids for worker in master.workers))
        loop.turn()
    assert not told(caplog, "testhost is lost")


def test_only_the_slices_that_a_node_lacks_are_sent_again(tmp_path, ssh_host, caplog, monkeypatch):
    monkeypatch.setattr(
        stealing, "MIN_SEARCH_DELAY", 1e6
    )  # else one may help the other, and then has more than its half
    master, one, _ = two(tmp_path, ssh_host)
    with master:
        loop = Loop(master)
        loop.turn()
        everything = master.stats().dataset_sent
        loop.turn()
        assert master.stats().dataset_sent == everything
        send(node_of(one), signal.SIGKILL)
        loop.until(lambda: told(caplog, "one is lost"))
        loop.turn()
        assert master.stats().dataset_sent == everything * 3 // 2  # the other one had its own half
        loop.until(lambda: told(caplog, "one is back"))
        loop.turn()
        assert master.stats().dataset_sent == everything * 2  # it takes its half over again, with an empty store
        loop.turn()
        assert master.stats().dataset_sent == everything * 2


def test_a_host_that_comes_back_with_an_empty_cache_is_given_all_that_it_lacks(tmp_path, ssh_host, caplog):
    sshd = ssh_host(home=tmp_path / "own")
    with Master("testhost*2", ssh_config=sshd.config) as master:
        loop = Loop(master)
        loop.turn()
        shutil.rmtree(sshd.home / ".cache")
        send(node_of(sshd), signal.SIGKILL)
        loop.until(lambda: told(caplog, "testhost is back"))
        loop.turn()
        assert (sshd.home / ".cache" / "qjam").is_dir()


def test_a_host_that_does_not_come_back_is_given_up_and_the_others_go_on(tmp_path, ssh_host, caplog, monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(supervisor, "RESTARTS", 2)
    master, one, _ = two(tmp_path, ssh_host)
    with master:
        loop = Loop(master)
        loop.turn()
        os.kill(one.pid, signal.SIGSTOP)  # the one that listens
        shutil.move(one.identity, tmp_path / "away")
        os.kill(one.pid, signal.SIGCONT)
        send(node_of(one), signal.SIGKILL)
        loop.until(lambda: told(caplog, "one is lost: .*not started again .after 2 times"))
        loop.turn()
        assert [worker.state for worker in master.workers] == ["lost"] * 2 + ["ready"] * 2
        assert told(caplog, r"started again in 0\.1 s \(2 of 2\)")


def test_when_the_last_host_is_given_up_the_round_ends_with_the_reason(ssh_host, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(supervisor, "RESTARTS", 1)
    sshd = ssh_host()
    with Master("testhost", ssh_config=sshd.config) as master:
        run_seven(master)
        future = master.submit(usercode.linger_forever)
        shutil.move(sshd.identity, tmp_path / "away")
        send(node_of(sshd), signal.SIGKILL)
        with pytest.raises(BootstrapError, match=r"no worker is left: testhost: auth"):
            future.result(BACK_S)
        with pytest.raises(BootstrapError, match=r"no worker is left: testhost: auth"):
            run_seven(master)


def test_a_node_that_is_stopped_is_suspect_then_lost_and_nobody_waits_for_it(tmp_path, ssh_host, caplog, monkeypatch):
    monkeypatch.setattr(fleet, "SILENCE", 8.0)
    master, one, _ = two(tmp_path, ssh_host)
    with master:
        loop = Loop(master)
        loop.turn()
        left = node_of(one)
        send(left, signal.SIGSTOP)
        began = time.monotonic()
        loop.turn()
        assert time.monotonic() - began < 6.0
        assert {worker.state for worker in master.workers if worker.host == "one"} == {"suspect"}
        rounds = loop.rounds
        loop.until(lambda: told(caplog, "one is lost: no sign of life for 8 s"))
        assert loop.rounds > rounds + 10  # quickly, and without it
        loop.until(lambda: told(caplog, "one is back"))
        loop.turn()
        assert left not in one.sessions()
    assert told(caplog, r"nothing was heard of one for \d\.\d s; others do its work as well")


def test_a_node_that_is_stopped_for_a_moment_goes_on(tmp_path, ssh_host, caplog):
    master, one, _ = two(tmp_path, ssh_host)
    with master:
        loop = Loop(master)
        loop.turn()
        pids = [worker.pid for worker in master.workers]
        node = node_of(one)
        send(node, signal.SIGSTOP)
        again = threading.Timer(5.0, send, (node, signal.SIGCONT))
        again.start()
        loop.until(lambda: told(caplog, r"one is heard again after \d\.\d s of silence"))
        again.join()
        loop.turn()
        assert [worker.pid for worker in master.workers] == pids
    assert not told(caplog, "is lost")


# The network


@pytest.fixture
def net() -> Iterator[Namespace]:
    need(namespaces_work())
    with namespace() as net:
        yield net


@pytest.mark.parametrize(("cut", "mend"), [("cut", "mend"), ("blackhole", "unblackhole")])
def test_a_link_that_is_down_for_3_s_loses_nobody(tmp_path, home, net, caplog, cut, mend):
    with (
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        Master(["testhost*2", "local*2"], ssh_config=sshd.config) as master,
    ):
        loop = Loop(master)
        loop.turn()
        pids = [worker.pid for worker in master.workers]
        getattr(net, cut)()
        again = threading.Timer(3.0, getattr(net, mend))
        again.start()
        while again.is_alive():
            loop.turn()
            again.join(0.01)
        loop.until(loop.all_back)
        loop.turn()
        assert [worker.pid for worker in master.workers] == pids
    assert not told(caplog, "is lost")


def test_a_link_that_is_down_for_30_s_loses_the_host_until_it_is_up_again(tmp_path, home, net, caplog):
    with (
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        Master(["testhost*2", "local*2"], ssh_config=sshd.config) as master,
    ):
        loop = Loop(master)
        loop.turn()
        net.blackhole()
        again = threading.Timer(30.0, net.unblackhole)
        again.start()
        slowest = 0.0
        while again.is_alive():
            began = time.monotonic()
            loop.turn()
            slowest = max(slowest, time.monotonic() - began)
            again.join(0.01)
        assert told(caplog, "testhost is lost")
        assert slowest < 6.0
        loop.until(loop.all_back, 60.0)
        loop.turn()
    assert told(caplog, r"testhost is back after \d+\.\d s, with 2 workers")


# Room

SHORT_OF_ROOM = """
import os, sys
import numpy as np
import qjam
from qjam_worker.values.reduction import Tree, default_reduce

def mapfunc(params, part):
    return part[0] * params

values = np.random.default_rng(7).standard_normal((8, 500_000)) * np.logspace(-9, 9, 500_000)
tree = Tree(8)
for index in range(8):
    tree.add((index, index + 1), mapfunc(3.0, values[index : index + 1]))
tree.fold(default_reduce)
serial = tree.values[0, 8].tobytes()
data = qjam.DataSet(values, slice_size=1)
with qjam.Master(2) as master:
    assert master.run(mapfunc, 3.0, data).tobytes() == serial
    room = os.statvfs("/dev/shm")
    assert room.f_blocks * room.f_frsize <= 24 << 20
    with open("/dev/shm/filler", "wb") as filler:
        try:
            while True:
                filler.write(bytes(1 << 16))
                filler.flush()
        except OSError:
            print("full")
        for _ in range(5):
            assert master.run(mapfunc, 3.0, data).tobytes() == serial
        more = qjam.DataSet(-values, slice_size=1)
        assert (-master.run(mapfunc, 3.0, more)).tobytes() == serial
    os.unlink("/dev/shm/filler")
    assert master.run(mapfunc, 3.0, data).tobytes() == serial
print("right")
"""


def test_a_full_dev_shm_changes_no_result(tmp_path):
    """In a mount namespace with one of its own, of 24 MiB."""
    need(namespaces_work())
    need(lacking_programs("unshare", "mount"))
    (tmp_path / "script.py").write_text(textwrap.dedent(SHORT_OF_ROOM))
    mount = f"{program('mount')} -t tmpfs -o size=24m tmpfs /dev/shm && exec {sys.executable} -W error script.py"
    import subprocess

    done = subprocess.run(
        [program("unshare") or "unshare", "--mount", "sh", "-c", mount],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "full\nright\n"), done.stderr


# Elastic


def test_hosts_come_and_go_during_a_loop(tmp_path, ssh_host):
    one, other = ssh_host("one"), ssh_host("other")
    config = write_config(tmp_path / "config", [one, other])
    with Master("local*2", ssh_config=config) as master:
        loop = Loop(master, 24)
        loop.turn()
        for _ in range(2):
            changes = threading.Thread(
                target=lambda: (master.add_hosts("one*2, other*2"), master.remove_hosts("local"))
            )
            changes.start()
            loop.until(lambda changes=changes: not changes.is_alive())
            loop.turn()
            assert {worker.host for worker in master.workers} == {"one", "other"}
            changes = threading.Thread(
                target=lambda: (master.add_hosts("local*2"), master.remove_hosts(["one", "other"]))
            )
            changes.start()
            loop.until(lambda changes=changes: not changes.is_alive())
            loop.turn()
            assert {worker.host for worker in master.workers} == {"local"}
        assert all_end(one.sessions() | other.sessions())
        assert all_end(host_processes())
