"""A host's node lives as long as its master, and not five seconds longer: whatever ends the master or the way to it."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

import processes
import pyzmq_garbage  # noqa: F401
import usercode
from faults import kill_sessions
from gates import Gate
from namespaces import Namespace, namespace, namespaces_work
from needs import need
from processes import GRACE_S, Program, all_end, descendants
from qjam import HostSpec, Master
from qjam.launch import fleet, host_process
from ssh_hosts import home, run_seven, ssh_host  # noqa: F401
from sshd import Sshd, private_sshd, sshd_works, write_config

ROUTES = ["direct", "tunnel", "stdio"]
GIL_S = 60  # seconds for which a busy master holds the GIL

MASTER = """
import ctypes, os, sys, time
import qjam, usercode
route, gate, then = sys.argv[1:4]
master = qjam.Master("testhost*2", route=route)
def pids():
    return sorted(worker.pid for worker in master.workers)
assert master.run(usercode.forty_two) == 84
if then == "hold":
    before = pids()
    print("holding", flush=True)
    ctypes.PyDLL(None).sleep(int(sys.argv[4]))
    assert master.run(usercode.forty_two) == 84
    assert pids() == before
    print("kept")
    master.close()
elif then == "leave":
    future = master.submit(usercode.deaf, gate)
    sys.stdin.readline()
    sys.exit(3)
else:
    master.run(usercode.deaf, gate)
"""


@pytest.fixture(autouse=True)
def _needs() -> None:
    need(sshd_works())


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


class Remains:
    """What a host has of a node now, to see it go."""

    def __init__(self, sshd: Sshd) -> None:
        self.processes = sshd.sessions()
        maps = "".join(_read(f"/proc/{pid}/maps") for pid in self.processes)
        self.folders = {Path(found) for found in re.findall(r"(/\S*/qjam-\d+-[^/\s]+)/\S*$", maps, re.MULTILINE)}
        assert len(self.processes) >= 4  # sshd's own, node, fork server, workers
        assert self.folders

    def are_gone(self, seconds: float = GRACE_S) -> bool:
        ended = all_end(self.processes, time.monotonic() + seconds)
        return ended and not any(folder.exists() for folder in self.folders)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def await_loss(caplog: pytest.LogCaptureFixture, why: str, seconds: float = GRACE_S) -> None:
    """Wait until the log says that the host is lost, and why."""
    deadline = time.monotonic() + seconds
    while not re.search(rf"testhost is lost: .*{why}", caplog.text):
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


def begin(tmp_path: Path, sshd: Sshd, *arguments: object) -> Program:
    os.environ["QJAM_SSH_CONFIG"] = str(sshd.config)
    os.environ["PYTHONPATH"] = str(Path(processes.__file__).parent)
    try:
        return processes.start(tmp_path, MASTER, *arguments)
    finally:
        del os.environ["QJAM_SSH_CONFIG"], os.environ["PYTHONPATH"]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Program]:
    """A master in C code, with the GIL held, while the other tests of this file run: the last one sees how it went."""
    need(sshd_works())
    folder = tmp_path_factory.mktemp("held")
    with private_sshd(folder, home=home) as sshd:
        program = begin(folder, sshd, "direct", "-", "hold", GIL_S)
        assert program.stdout is not None
        assert program.stdout.readline() == "holding\n"
        yield program
        program.kill()
        program.communicate()
        assert all_end(sshd.sessions())


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("route", ROUTES)
def test_kill_9_of_a_master_ends_its_host_in_the_middle_of_work(tmp_path, ssh_host, gate, route):
    sshd = ssh_host()
    program = begin(tmp_path, sshd, route, gate.path, "wait")
    for _ in range(2):
        gate.heard()
    remains, here = Remains(sshd), descendants(program.pid)
    program.kill()
    program.communicate()
    assert remains.are_gone()
    assert all_end(here)
    assert list(sshd.temporary.iterdir()) == []


@pytest.mark.usefixtures("held")
def test_the_exit_of_a_program_ends_its_host(tmp_path, ssh_host, gate):
    sshd = ssh_host()
    program = begin(tmp_path, sshd, "direct", gate.path, "leave")
    for _ in range(2):
        gate.heard()
    remains = Remains(sshd)
    program.communicate("\n")
    assert program.returncode == 3
    assert remains.are_gone()


@pytest.mark.parametrize("route", ROUTES)
def test_a_killed_ssh_process_here_ends_the_host_and_is_told(ssh_host, caplog, route):
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config, route=route) as master:
        run_seven(master)
        remains = Remains(sshd)
        (fork_server,) = [
            pid
            for pid in descendants(os.getpid())
            if "qjam.launch.host_process" in _read(f"/proc/{pid}/cmdline") and processes.parent(pid) == os.getpid()
        ]
        for pid in descendants(fork_server):
            os.kill(pid, signal.SIGKILL)
        await_loss(caplog, "(ssh connection|link to the master|connection is gone)")
        assert remains.are_gone()
        run_seven(master)


@pytest.mark.parametrize("route", ROUTES)
def test_a_killed_session_there_loses_the_host_and_leaves_nothing_of_it(ssh_host, caplog, route):
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config, route=route) as master:
        run_seven(master)
        remains = Remains(sshd)
        kill_sessions(sshd)
        await_loss(caplog, "")
        assert remains.are_gone()
        run_seven(master)


def test_a_killed_node_is_told_and_its_workers_and_files_go(ssh_host, caplog):
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config) as master:
        run_seven(master)
        remains = Remains(sshd)
        worker = master.workers[0].pid
        os.kill(processes.parent(processes.parent(worker)), signal.SIGKILL)
        await_loss(caplog, "it(s connection is gone| has ended: killed by a signal)")
        assert remains.are_gone()
        run_seven(master)


def test_slices_of_a_host_that_is_gone_are_done_by_another_and_the_log_says_so(tmp_path, ssh_host, gate, caplog):
    hosts = ssh_host("one"), ssh_host("other")
    config = write_config(tmp_path / "config", hosts)
    with Master(["one*2", "other*2"], ssh_config=config) as master:
        assert master.run(usercode.add_up, 2, list(range(8))) == 56
        future = master.submit(usercode.linger_once, (gate.path, str(tmp_path / "flag")), list(range(8)))
        lingers = int(gate.heard())
        (gone,) = [sshd for sshd in hosts if lingers in sshd.sessions()]
        kill_sessions(gone)
        assert future.result() == sum(range(8))
        assert master.run(usercode.add_up, 2, list(range(8))) == 56
        assert re.search(rf"{gone.name} is lost: .*; its work goes to the others", caplog.text)
    assert caplog.text.count("is lost") == 1


# Stopped processes


def stop(pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def family(worker: int) -> list[int]:
    """The node of a worker, and all that it has started, its fork server first."""
    fork_server = processes.parent(worker)
    node = processes.parent(fork_server)
    return [node, fork_server, *(descendants(node) - {fork_server})]


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host counts as lost at the second beat without an echo."""
    monkeypatch.setattr(fleet, "SILENCE", 3.0)


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize(
    ("route", "stopped"), [("direct", "the node"), ("direct", "all of it"), ("stdio", "all of it")]
)
def test_a_node_that_is_stopped_is_lost_and_nothing_of_it_stays(ssh_host, monkeypatch, caplog, route, stopped):
    quick(monkeypatch)
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config, route=route) as master:
        run_seven(master)
        remains = Remains(sshd)
        everything = family(master.workers[0].pid)
        stop(everything if stopped == "all of it" else everything[:1])
        await_loss(caplog, "no sign of life for 3 s", 2 * fleet.SILENCE)
        assert remains.are_gone()
        run_seven(master)


@pytest.mark.usefixtures("held")
def test_a_stopped_node_goes_whose_session_is_over_while_ssh_holds(tmp_path, ssh_host, monkeypatch, caplog):
    """The session is that of a wrapper around python."""
    quick(monkeypatch)
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\npython3 "$@"\nexit $?\n')
    wrapper.chmod(0o755)
    sshd = ssh_host()
    with Master(HostSpec("testhost", workers=2, python=str(wrapper)), ssh_config=sshd.config) as master:
        run_seven(master)
        remains = Remains(sshd)
        everything = family(master.workers[0].pid)
        stop(everything)
        os.kill(processes.parent(everything[0]), signal.SIGKILL)
        await_loss(caplog, "", 2 * fleet.SILENCE)
        assert remains.are_gone()


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("route", ["direct", "stdio"])
def test_a_master_that_closes_leaves_nothing_of_a_stopped_node(ssh_host, route):
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config, route=route) as master:
        run_seven(master)
        remains = Remains(sshd)
        stop(family(master.workers[0].pid))
        began = time.monotonic()
        master.close()
        assert time.monotonic() - began < 9.0  # 5 for it to say goodbye, and some until 6 after its last sign of life
        assert remains.are_gone()


@pytest.mark.usefixtures("held")
def test_kill_9_of_a_master_leaves_nothing_of_a_stopped_node(tmp_path, ssh_host, gate):
    sshd = ssh_host()
    program = begin(tmp_path, sshd, "direct", gate.path, "wait")
    workers = [int(gate.heard()) for _ in range(2)]
    remains, here = Remains(sshd), descendants(program.pid)
    stop(family(workers[0]))
    program.kill()
    program.communicate()
    assert remains.are_gone(host_process.LEAVE_TIMEOUT + GRACE_S)
    assert all_end(here)


def test_a_fork_server_that_is_stopped_ends_with_its_node(ssh_host, caplog):
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config) as master:
        run_seven(master)
        remains = Remains(sshd)
        stop(family(master.workers[0].pid)[1:])
        kill_sessions(sshd)
        await_loss(caplog, "")
        assert remains.are_gone()


# The network


@pytest.fixture
def net() -> Iterator[Namespace]:
    need(namespaces_work())
    with namespace() as net:
        yield net


@pytest.mark.usefixtures("held")
def test_a_host_that_is_cut_off_ends_by_itself_and_its_master_hears_of_it(tmp_path, home, net, caplog):
    with (
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        Master("testhost*2", ssh_config=sshd.config) as master,
    ):
        run_seven(master)
        remains = Remains(sshd)
        ours = {pid for pid in remains.processes if "sshd" not in _read(f"/proc/{pid}/cmdline")}
        assert len(ours) == 4
        net.blackhole()
        await_loss(caplog, "", fleet.HEARTBEAT_TIMEOUT + GRACE_S)
        assert all_end(ours, time.monotonic() + fleet.HEARTBEAT_TIMEOUT + GRACE_S)
        assert not any(folder.exists() for folder in remains.folders)


@pytest.mark.usefixtures("held")
def test_a_master_closes_in_time_when_its_host_is_cut_off(tmp_path, home, net, monkeypatch):
    monkeypatch.setattr(fleet, "HEARTBEAT_TIMEOUT", 5.0)
    with (
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        Master("testhost*2", ssh_config=sshd.config) as master,
    ):
        run_seven(master)
        remains = Remains(sshd)
        ours = {pid for pid in remains.processes if "sshd" not in _read(f"/proc/{pid}/cmdline")}
        here = descendants(os.getpid()) - remains.processes - {sshd.pid}
        assert len(here) >= 2
        net.blackhole()
        began = time.monotonic()
        master.close()
        assert time.monotonic() - began < 5.0 + host_process.LEAVE_TIMEOUT + host_process.KILL_TIMEOUT
        assert all_end(ours, time.monotonic() + fleet.HEARTBEAT_TIMEOUT + GRACE_S)
        assert not any(folder.exists() for folder in remains.folders)
        assert not [pid for pid in here if "qjam.launch.host_process" in _read(f"/proc/{pid}/cmdline")]


def test_a_link_that_breaks_while_ssh_holds_loses_the_host_and_no_round_hangs(tmp_path, home, net, caplog):
    with (
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        Master("testhost*2", ssh_config=sshd.config) as master,
    ):
        run_seven(master)
        assert master.workers[0].route == "direct"
        remains = Remains(sshd)
        net._nft(
            "table inet broken {\n chain output {\n type filter hook output priority filter\n "
            f"ip daddr {net.master} tcp sport != {sshd.port} reject with tcp reset\n }}\n}}"
        )
        assert master.run(usercode.forty_two) == 84
        await_loss(caplog, "")
        assert master.workers[0].route == "tunnel"
        assert remains.are_gone()


THROTTLE = """
import os, socket, sys, threading, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def move(read, write):
    while data := read():
        write(data)
        time.sleep(len(data) / RATE)
    os._exit(0)
threading.Thread(target=move, args=(lambda: os.read(0, 8192), sock.sendall), daemon=True).start()
move(lambda: sock.recv(8192), lambda data: os.write(1, data))
"""


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("route", ["tunnel", "stdio"])
def test_a_slow_link_is_no_broken_one(tmp_path, ssh_host, route):
    """One message that takes longer than any silence that is allowed; beats and echoes stand behind it."""
    sshd = ssh_host()
    with Master("testhost*2", ssh_config=sshd.config):
        pass  # what lacks is brought at full speed
    (tmp_path / "throttle.py").write_text(THROTTLE.replace("RATE", "200_000"))
    config = tmp_path / "config"
    command = f"ProxyCommand {sys.executable} {tmp_path / 'throttle.py'} %h %p"
    config.write_text(sshd.config.read_text() + f"    {command}\n")
    with Master("testhost*2", ssh_config=config, route=route) as master:
        size = int(200_000 * (fleet.HEARTBEAT_TIMEOUT + 3))
        began = time.monotonic()
        result = master.run(lambda size, part: np.zeros(size, np.uint8), size, [[1]])
        assert len(result) == size
        assert time.monotonic() - began > fleet.HEARTBEAT_TIMEOUT  # else it was not what it should be


def test_a_link_that_is_out_for_three_seconds_is_no_loss(tmp_path, home, net):
    with (
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        Master("testhost*2", ssh_config=sshd.config) as master,
    ):
        run_seven(master)
        pids = [worker.pid for worker in master.workers]
        mended = threading.Timer(3.0, net.unblackhole)
        net.blackhole()
        mended.start()
        run_seven(master)  # waits for it
        mended.join()
        assert [worker.pid for worker in master.workers] == pids


@pytest.mark.timeout(GIL_S + 60)
def test_a_master_that_holds_the_gil_for_a_minute_keeps_its_nodes(held):
    printed, errors = held.communicate()
    assert (printed, errors, held.returncode) == ("kept\n", "", 0)
