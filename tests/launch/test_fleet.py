"""The processes that hold the ssh connections: started at any time, let go of, forgotten, killed, stopped."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from processes import all_end, descendants
from qjam.hosts import HostSpec
from qjam.launch import bootstrap, fleet, host_process
from qjam.launch.fleet import Fleet, Options
from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import Sshd

REFUSED = HostSpec("refused")  # by an ssh server that is not there
SECONDS = 10.0  # for what takes none


class Engine:
    """Takes nodes' connections and never says a word."""

    def __init__(self) -> None:
        self.lost: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.listener = socket.create_server(("127.0.0.1", 0))

    def bind(self, address: str) -> str:
        return f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"

    def lose_node(self, name: str, why: str) -> None:
        self.lost.put((name, why))


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.listener.close()


Make = Callable[..., Fleet]


@pytest.fixture
def make(tmp_path: Path, engine: Engine, ssh_host: Callable[..., Sshd]) -> Iterator[Make]:
    (tmp_path / "nobody").write_text("Host refused\n HostName 127.0.0.1\n Port 1\n IdentityFile none\n")
    with contextlib.ExitStack() as stack:

        def make(sshd: Sshd | None = None) -> Fleet:
            made = Fleet(Options(ssh_config=sshd.config if sshd else tmp_path / "nobody", route="stdio"), engine)
            stack.callback(made.close)
            return made

        yield make


def start(fleet: Fleet, *names: str, spec: HostSpec | None = None) -> None:
    server, (public, secret) = zmq.curve_keypair()[0], zmq.curve_keypair()
    keys = {"server": server.decode(), "public": public.decode(), "secret": secret.decode()}
    fleet.start({name: (spec or HostSpec("testhost", workers=1), keys) for name in names})


def until(true: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def spawner() -> int:
    (pid,) = [pid for pid in descendants(os.getpid()) if "qjam.launch.host_process" in _command(pid)
              and _command(pid) != _command(_parent(pid))]  # fmt: skip
    return pid


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """From the third field on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_hosts_may_be_started_at_any_time_and_in_any_thread(make, ssh_host, engine):
    hosts = make(ssh_host())
    names = [f"n{number}" for number in range(6)]
    for name in names[:2]:
        start(hosts, name)
    until(lambda: hosts.welcomed_at("n0"))
    threads = [threading.Thread(target=start, args=(hosts, name)) for name in names[2:]]
    for thread in threads:
        thread.start()
    for name in names:
        until(lambda name=name: hosts.welcomed_at(name), name)
    for thread in threads:
        thread.join()
    hosts.close()
    assert {hosts.report(name).route for name in names} == {"stdio"}


def test_a_killed_forker_of_processes_is_replaced_and_no_host_minds(make, ssh_host, engine):
    sshd = ssh_host()
    hosts = make(sshd)
    start(hosts, "old")
    until(lambda: hosts.welcomed_at("old"))
    pid = spawner()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # one that is asked while it dies takes the host along
    start(hosts, "new")
    until(lambda: hosts.welcomed_at("new"))
    assert spawner() != pid
    assert engine.lost.empty()
    ours = {host.pid for host in hosts._hosts.values()}
    assert len(ours) == 2
    hosts.close()
    assert all_end(ours)
    assert all_end(sshd.sessions())


def test_a_forgotten_host_leaves_nothing_and_the_engine_hears_no_more_of_it(make, ssh_host, engine):
    sshd = ssh_host()
    hosts = make(sshd)
    start(hosts, "stays", "goes")
    until(lambda: hosts.welcomed_at("stays"))
    until(lambda: hosts.welcomed_at("goes"))
    pid = hosts._hosts["goes"].pid
    hosts.forget("goes")
    hosts.forget("goes")
    hosts.forget("never heard of")
    until(lambda: set(hosts._hosts) == {"stays"})
    assert all_end([pid])
    with pytest.raises(KeyError):
        hosts.report("goes")
    assert engine.lost.empty()


def test_thousands_of_hosts_that_did_not_start_do_not_pile_up(make, engine):
    hosts = make()
    start(hosts, "first", spec=REFUSED)
    assert "refused" in engine.lost.get(timeout=SECONDS)[1]
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        start(hosts, str(number), spec=REFUSED)
        name, _ = engine.lost.get(timeout=SECONDS)
        while name != str(number):  # the process that held the connection of an earlier one has ended
            name, _ = engine.lost.get(timeout=SECONDS)
        hosts.forget(name)
    hosts.forget("first")
    until(lambda: not hosts._hosts)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_host_that_is_disconnected_before_its_turn_is_not_started(make, ssh_host, engine, monkeypatch):
    monkeypatch.setattr(fleet, "PARALLEL", 1)
    sshd = ssh_host()
    hosts = make(sshd)
    start(hosts, "first", "second", "third", spec=HostSpec("testhost", workers=1, setup="sleep 0.5"))
    hosts.disconnect("second")
    until(lambda: hosts.welcomed_at("third"))
    assert hosts.report("second").phases == {}
    assert len(re.findall("Accepted publickey", sshd.log_text())) == 2


def test_a_fleet_that_is_closed_loses_hosts_at_once(make, engine):
    for hosts in (make(), make()):
        start(hosts, "before", spec=REFUSED)
        engine.lost.get(timeout=SECONDS)
        hosts.close()
    start(hosts, "after", spec=REFUSED)
    until(lambda: engine.lost.get(timeout=SECONDS) == ("after", "the master is closed"))
    unused = make()
    unused.close()
    start(unused, "late", spec=REFUSED)
    assert engine.lost.get(timeout=SECONDS) == ("late", "the master is closed")
    assert not [thread for thread in threading.enumerate() if thread.name == "qjam-fleet"]


def test_close_while_hosts_are_being_started(make, ssh_host, engine):
    sshd = ssh_host()
    hosts = make(sshd)
    threads = [threading.Thread(target=start, args=(hosts, f"n{number}")) for number in range(4)]
    for thread in threads:
        thread.start()
    hosts.close()
    for thread in threads:
        thread.join()
    assert all_end(sshd.sessions())


def test_a_process_that_is_stopped_here_does_not_outlive_the_master(make, ssh_host, engine, monkeypatch):
    monkeypatch.setattr(fleet, "STOP_TIMEOUT", 0.5)
    sshd = ssh_host()
    hosts = make(sshd)
    start(hosts, "n")
    until(lambda: hosts.welcomed_at("n"))
    pid = hosts._hosts["n"].pid
    os.kill(pid, signal.SIGSTOP)
    hosts.close()
    assert all_end([pid])
    assert all_end(sshd.sessions())


def test_many_hosts_do_not_log_in_at_the_same_moment(make, monkeypatch):
    delays: list[float] = []
    monkeypatch.setattr(Fleet, "_launch", lambda self, host: delays.append(host.order["delay"]))
    hosts = make()
    start(hosts, *map(str, range(40)), spec=REFUSED)
    until(lambda: len(delays) == 40)
    assert len(set(delays[:32])) > 1
    assert 0.0 <= min(delays[:32]) <= max(delays[:32]) <= fleet.JITTER * 32
    assert set(delays[32:]) == {0.0}


# What kills a stopped node


@pytest.mark.parametrize("shell", [shell for shell in ("dash", "bash", "tcsh", "zsh", "fish") if shutil.which(shell)])
def test_the_line_that_kills_a_node_passes_through_any_shell(tmp_path, shell):
    def kill(pid: int, began: int) -> int:
        line = f"exec /bin/sh -c {shlex.quote(host_process.KILL)} qjam {pid} {began}"
        return subprocess.run([shell, "-c", line], check=False, stderr=subprocess.DEVNULL).returncode

    name = tmp_path / "a) S 1 (b"  # /proc/PID/stat does not mind
    shutil.copy("/bin/sh", name)
    # A parent that is stopped, and a child that would have ended by itself, were it not stopped as well.
    with subprocess.Popen([name, "-c", "sleep 0.2 & echo $!; wait; wait"], stdout=subprocess.PIPE) as node:
        assert node.stdout is not None
        child = int(node.stdout.readline())
        for pid in (node.pid, child):
            os.kill(pid, signal.SIGSTOP)
        until(lambda: _stat(node.pid)[0] == _stat(child)[0] == "T")
        began = int(_stat(node.pid)[19])
        assert kill(node.pid, began + 1) == 1
        assert _stat(node.pid)[0] == "T"
        assert kill(node.pid, began) == 0
        assert node.wait(SECONDS) == -signal.SIGKILL
        assert all_end([child])
        assert kill(node.pid, began) == 1


def test_the_bootstrap_reports_when_its_process_began():
    assert bootstrap.process() == [os.getpid(), int(_stat(os.getpid())[19])]
