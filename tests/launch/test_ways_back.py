"""How a host reaches its master: directly, through a tunnel, through stdio; chosen without being told, and guarded."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.utils.z85

import pyzmq_garbage  # noqa: F401
from namespaces import inner_namespace, namespace, namespaces_work
from needs import need
from processes import all_end, descendants
from qjam import BootstrapError, Master
from qjam_worker.wire import frames
from qjam_worker.wire.frames import Kind
from ssh_hosts import home, run_seven, ssh_host  # noqa: F401
from sshd import private_sshd, sshd_works, write_config

NO_FORWARDING = {"AllowTcpForwarding": "no"}
LOCAL_FORWARDING = {"AllowTcpForwarding": "local"}


@pytest.fixture(autouse=True)
def _needs() -> None:
    need(sshd_works())


def start(sshd: Any, workers: int = 2, **options: Any) -> Master:
    return Master(f"{sshd.name}*{workers}", ssh_config=sshd.config, **options)


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def listeners() -> dict[str, int]:
    """The IPv4 addresses on which this process accepts TCP connections, and their ports."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found[socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else address] = int(port, 16)
    return found


# Which way is chosen


@pytest.mark.parametrize(
    ("incoming", "options", "route"),
    [
        ("open", {}, "direct"),
        ("drop", {}, "tunnel"),
        ("reject", {}, "tunnel"),
        ("drop", NO_FORWARDING, "stdio"),
        ("reject", NO_FORWARDING, "stdio"),
        ("reject", LOCAL_FORWARDING, "stdio"),
        ("reject", {"PermitListen": "none"}, "stdio"),
        ("reject", {"DisableForwarding": "yes"}, "stdio"),
        ("open", NO_FORWARDING, "direct"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_the_first_way_that_works_is_taken(tmp_path, home, incoming, options, route):
    need(namespaces_work())
    with (
        namespace(incoming=incoming) as net,
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home, options=options) as sshd,
        start(sshd) as master,
    ):
        assert {worker.route for worker in master.workers} == {route}
        assert master.start_reports[0].route == route
        run_seven(master)
        back = master.run(lambda params, part: params[::-1].copy(), np.arange(1_000_000), [[1]])
        assert back[0] == 999_999


@pytest.mark.parametrize(("options", "route"), [({}, "tunnel"), (NO_FORWARDING, "stdio")], ids=["tunnel", "stdio"])
def test_a_host_behind_a_jump_host_with_no_way_back_of_its_own_is_reached(tmp_path, home, options, route):
    need(namespaces_work())
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(namespace())
        inner = stack.enter_context(inner_namespace(outer))
        jump = stack.enter_context(private_sshd(tmp_path, name="jump", address=outer.host, namespace=outer.name))
        place = {"address": inner.host, "namespace": inner.name, "jump": jump, "home": home}
        host = stack.enter_context(private_sshd(tmp_path, name="far", options=options, **place))
        with Master("far*2", ssh_config=write_config(tmp_path / "config", [host])) as master:
            assert master.workers[0].route == route
            run_seven(master)


def test_hosts_with_different_ways_back_work_together(tmp_path, home):
    need(namespaces_work())
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, incoming, options in (("a", "open", {}), ("b", "reject", {}), ("c", "reject", NO_FORWARDING)):
            net = stack.enter_context(namespace(incoming=incoming))
            hosts.append(
                stack.enter_context(
                    private_sshd(tmp_path, name=name, address=net.host, namespace=net.name, options=options, home=home)
                )
            )
        config = write_config(tmp_path / "config", hosts)
        with Master(["local*2", "a*2", "b*2", "c*2"], ssh_config=config) as master:
            assert [worker.route for worker in master.workers[::2]] == ["local", "direct", "tunnel", "stdio"]
            data = np.random.default_rng(5).standard_normal((800, 10))
            everywhere = master.run(lambda params, part: part.sum(axis=0), None, data)
        with Master(8) as master:
            assert np.array_equal(everywhere, master.run(lambda params, part: part.sum(axis=0), None, data))


def test_a_configured_address_is_tried_after_that_of_the_connection(tmp_path, home):
    need(namespaces_work())
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(namespace())
        # The host sees the connection come from the jump host, and has a way to this machine that ssh does not show.
        jump = stack.enter_context(private_sshd(tmp_path, name="jump", address="127.0.0.1"))
        host = stack.enter_context(
            private_sshd(tmp_path, name="far", address=outer.host, namespace=outer.name, jump=jump, home=home)
        )
        config = write_config(tmp_path / "config", [host])
        with Master("far*2", ssh_config=config) as master:  # 127.0.0.1 is not this machine there
            assert master.workers[0].route == "tunnel"
        for address in (outer.master, f"{outer.master}:{free_port(outer.master)}", ["192.0.2.1", outer.master]):
            with Master("far*2", ssh_config=config, address=address) as master:
                assert master.workers[0].route == "direct"
                run_seven(master)


def test_a_way_that_is_asked_for_and_does_not_work_is_an_error_that_says_why(tmp_path, home):
    need(namespaces_work())
    with (
        namespace(incoming="reject") as net,
        private_sshd(
            tmp_path, address=net.host, namespace=net.name, home=home, options={"AllowTcpForwarding": "no"}
        ) as sshd,
    ):
        with pytest.raises(BootstrapError, match=rf"way back: .*{net.master} port \d+: Connection refused"):
            start(sshd, route="direct")
        with pytest.raises(BootstrapError, match=r"way back: .*TCP forwarding request denied"):
            start(sshd, route="tunnel")


@pytest.mark.parametrize("address", ["gw:80a", "gw:0", "a b", "", "me@gw", "gw*2", None, 5])
def test_an_address_that_cannot_be_one_is_refused_at_once(address):
    with pytest.raises(ValueError, match=r"^address must"):
        Master("testhost", address=[address])


# What is bound


def test_nothing_is_bound_for_this_machine_alone():
    with Master(2) as master:
        run_seven(master)
        assert listeners() == {}


@pytest.mark.parametrize("route", [None, "tunnel", "stdio"])
def test_a_host_on_loopback_has_loopback_bound_alone(ssh_host, route):
    with start(ssh_host(), route=route):
        assert set(listeners()) == {"127.0.0.1"}


@pytest.mark.parametrize("route", ["direct", "tunnel", "stdio"])
def test_a_host_may_have_an_ipv6_address(ssh_host, route):
    with start(ssh_host(address="::1"), route=route) as master:
        assert master.workers[0].route == route
        run_seven(master)


def test_the_address_that_leads_to_the_host_is_bound_and_no_other(tmp_path, home):
    need(namespaces_work())
    with (
        namespace() as net,
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        start(sshd),
    ):
        assert set(listeners()) == {net.master}


# Strangers


@pytest.fixture
def knocking() -> Iterator[Any]:
    """Connects strangers' DEALERs to the ROUTER and tells what becomes of them."""
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())

        def knock(identity: bytes, **keys: bytes) -> tuple[zmq.Socket[bytes], int]:
            dealer = stack.enter_context(context.socket(zmq.DEALER))
            dealer.linger = 0
            dealer.setsockopt(zmq.ROUTING_ID, identity)
            for name, key in keys.items():
                dealer.setsockopt(getattr(zmq, name), key)
            monitor = stack.enter_context(dealer.get_monitor_socket())
            dealer.connect(f"tcp://127.0.0.1:{listeners()['127.0.0.1']}")
            interesting = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            interesting |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED
            stack.callback(dealer.disable_monitor)
            while True:
                event = int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder)
                if event & interesting:
                    return dealer, event

        yield knock


def nonsense(identity: bytes) -> list[Any]:
    return frames.pack(Kind.BYE, {"reason": f"from {identity!r}"})


def test_strangers_get_nothing_and_disturb_nothing(ssh_host, knocking):
    with start(ssh_host()) as master:
        name = master._supervisor.node_names[0].encode()
        server = master._engine._router._public.encode()
        public, secret = zmq.curve_keypair()
        cases = {
            "no key": {},
            "a key of its own": {
                "CURVE_SERVERKEY": server,
                "CURVE_PUBLICKEY": public,
                "CURVE_SECRETKEY": secret,
            },
            "another master's key": {
                "CURVE_SERVERKEY": zmq.curve_keypair()[0],
                "CURVE_PUBLICKEY": public,
                "CURVE_SECRETKEY": secret,
            },
        }
        for keys in cases.values():
            dealer, event = knocking(name, **keys)
            assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
            with contextlib.suppress(zmq.Again):  # there may be nobody to take it, which is as well
                dealer.send_multipart(nonsense(name), zmq.NOBLOCK)
            run_seven(master)
            assert dealer.poll(0) == 0
        with socket.create_connection(("127.0.0.1", listeners()["127.0.0.1"])) as bare:
            bare.sendall(os.urandom(5000))
            run_seven(master)
        assert [worker.state for worker in master.workers] == ["ready", "ready"]


def test_a_node_cannot_speak_for_another(ssh_host, knocking):
    """Even with a key that is known: that of another node."""
    with start(ssh_host()) as master:
        victim = master._supervisor.node_names[0]
        keys = master._engine.admit("somebody else")
        dealer, event = knocking(
            b"unknown to dispatch",
            CURVE_SERVERKEY=keys.server.encode(),
            CURVE_PUBLICKEY=keys.public.encode(),
            CURVE_SECRETKEY=keys.secret.encode(),
        )
        assert event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        dealer.send_multipart(nonsense(b"x"))
        run_seven(master)
        impostor, event = knocking(
            victim.encode(),
            CURVE_SERVERKEY=keys.server.encode(),
            CURVE_PUBLICKEY=keys.public.encode(),
            CURVE_SECRETKEY=keys.secret.encode(),
        )
        assert event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        impostor.send_multipart(nonsense(b"z"))
        run_seven(master)  # goes to the victim alone
        assert impostor.poll(0) == 0
        router = master._engine._router
        router.admission._names[zmq.utils.z85.decode(keys.public.encode())] = (
            victim  # the user id is another name than it uses
        )
        dealer.send_multipart(nonsense(b"y"))
        run_seven(master)
        assert [worker.state for worker in master.workers] == ["ready", "ready"]


def test_each_node_and_each_session_has_a_key_pair_of_its_own(ssh_host):
    seen = set()
    for _ in range(2):
        with Master(1) as master:
            for name in ("a", "b"):
                seen.update(master._engine.admit(name))
    assert len(seen) == 2 + 2 * 4  # a server's key for each session, a pair for each node


# Secrets


@pytest.mark.parametrize("route", ["direct", "tunnel", "stdio"])
def test_secrets_show_up_in_no_command_line_environment_or_log(ssh_host, route, monkeypatch, caplog, capfd):
    sent = []
    from qjam.engine.engine import Engine

    admit = Engine.admit
    monkeypatch.setattr(Engine, "admit", lambda self, name: sent.append(admit(self, name)) or sent[-1])
    sshd = ssh_host(options={"LogLevel": "DEBUG2"})
    with start(sshd, route=route) as master:
        run_seven(master)
        (keys,) = sent
        processes = descendants(os.getpid()) | {sshd.pid} | sshd.sessions()
        shown = "".join(
            Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace")
            for pid in processes
            for file in ("cmdline", "environ")
        )
        assert len(processes) > 5
    shown += sshd.log_text() + caplog.text + "".join(capfd.readouterr())
    shown += "".join(path.read_text(errors="replace") for path in sshd.home.rglob("*.json"))
    assert keys.secret not in shown
    assert master._engine._router._secret not in shown


def test_what_the_host_keeps_is_for_its_user_alone(ssh_host):
    sshd = ssh_host()
    with start(sshd) as master:
        run_seven(master)
        kept = [sshd.home / ".cache" / "qjam", *sshd.temporary.iterdir()]
        assert len(kept) > 1
        for path in kept:
            assert path.stat().st_mode & 0o077 == 0, path
    assert list(sshd.temporary.iterdir()) == []


def test_the_port_of_a_tunnel_is_on_the_loopback_of_the_host(tmp_path, home):
    need(namespaces_work())
    with (
        namespace(incoming="reject") as net,
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
        start(sshd) as master,
    ):
        assert master.workers[0].route == "tunnel"
        table = subprocess.run(net.command("cat", "/proc/net/tcp"), capture_output=True, text=True, check=True).stdout
        bound = {line.split()[1].split(":")[0] for line in table.splitlines()[1:] if line.split()[3] == "0A"}
        port_22 = "".join(f"{int(part):02X}" for part in reversed(net.host.split(".")))
        assert bound == {"0100007F", port_22}


def test_the_end_of_a_tunnelled_master_closes_the_port_there(tmp_path, home):
    need(namespaces_work())
    with (
        namespace(incoming="reject") as net,
        private_sshd(tmp_path, address=net.host, namespace=net.name, home=home) as sshd,
    ):
        with start(sshd) as master:
            run_seven(master)
        assert all_end(sshd.sessions())
        table = subprocess.run(net.command("cat", "/proc/net/tcp"), capture_output=True, text=True, check=True).stdout
        assert not re.search(r"0100007F:\w+ \w+:\w+ 0A", table)
