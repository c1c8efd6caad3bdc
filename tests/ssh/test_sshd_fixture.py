"""The hosts that tests log in to: private sshds, and networks of their own for them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_interface
from pathlib import Path

import pytest

from namespaces import Namespace, inner_namespace, namespace, namespaces_work
from needs import need
from processes import all_end
from sshd import Sshd, private_sshd, sshd_works, write_config

SILENCE_S = 0.3  # how long nothing comes through a link that loses everything; without loss it takes 1 ms
LONG_S = 10.0  # for what does come

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
except OSError as error:
    print(type(error).__name__, error.errno or "")
else:
    print("connected")
"""


@pytest.fixture(autouse=True)
def _ssh_is_here() -> None:
    need(sshd_works())


@pytest.fixture
def networks() -> None:
    need(namespaces_work())


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Sshd]:
    with private_sshd(tmp_path) as sshd:
        yield sshd


def output(command: list[str]) -> str:
    """What a program prints that ends well and complains of nothing."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def connecting(source: Namespace, address: str, port: int, within_s: float = LONG_S) -> str:
    """What becomes of a connection from inside a namespace."""
    python = [sys.executable, "-I", "-S", "-c", CONNECT]
    return output(source.command(*python, address, str(port), str(within_s))).strip()


class Echo:
    """A login that sends back what it is sent."""

    def __init__(self, host: Sshd) -> None:
        self._ssh = subprocess.Popen(host.command("cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def send(self, text: bytes) -> None:
        assert self._ssh.stdin
        self._ssh.stdin.write(text)

    def answer(self, within_s: float | None = None) -> bytes:
        assert self._ssh.stdout
        ready, _, _ = select.select([self._ssh.stdout], [], [], within_s)
        return os.read(self._ssh.stdout.fileno(), 100) if ready else b""

    def close(self) -> int:
        self._ssh.communicate()
        return self._ssh.returncode


@contextmanager
def echo(host: Sshd) -> Iterator[Echo]:
    """Logs in, and goes on when the shell there has started."""
    login = Echo(host)
    try:
        login.send(b"hello")
        assert login.answer() == b"hello"
        yield login
    finally:
        login.close()


class TestLogin:
    def test_ssh_logs_in(self, host: Sshd) -> None:
        assert output(["ssh", "-F", str(host.config), "testhost", "echo", "here"]) == "here\n"

    def test_paramiko_logs_in(self, host: Sshd) -> None:
        try:
            import paramiko
        except ImportError:
            need("not installed: paramiko")
        found = paramiko.SSHConfig.from_path(str(host.config)).lookup("testhost")
        with paramiko.SSHClient() as client:
            client.load_host_keys(found["userknownhostsfile"].strip('"'))
            client.connect(
                found["hostname"],
                int(found["port"]),
                username=found["user"],
                key_filename=[name.strip('"') for name in found["identityfile"]],
                allow_agent=False,
                look_for_keys=False,
            )
            _, printed, _ = client.exec_command("echo $HOME")
            assert printed.read().decode() == f"{host.home}\n"

    def test_a_session_has_a_home_and_a_temporary_folder_of_its_own(self, host: Sshd) -> None:
        printed = output(host.command("echo $HOME $TMPDIR $QJAM_TEST_SESSION; ls -A $HOME $TMPDIR"))
        session = os.environ["QJAM_TEST_SESSION"]
        assert printed.splitlines()[0] == f"{host.home} {host.temporary} {session}"
        assert not any(host.home.iterdir())
        assert not any(host.temporary.iterdir())

    def test_its_path_leaves_room_for_the_name_of_a_socket(self, host: Sshd) -> None:
        assert len(str(host.temporary)) < len(tempfile.gettempdir()) + 20

    def test_environment_is_what_the_test_wants(self, tmp_path: Path) -> None:
        odd = "a 'b' \"c\" \\d #e $f"
        with private_sshd(tmp_path, environment={"ODD": odd, "TMPDIR": "/nowhere"}) as host:
            assert output(host.command('echo "$TMPDIR"; printenv ODD')) == f"/nowhere\n{odd}\n"

    def test_a_home_can_be_given(self, tmp_path: Path) -> None:
        home = tmp_path / "home with a profile"
        home.mkdir()
        (home / "greeting").write_text("good day")
        with private_sshd(tmp_path, home=home) as host:
            assert output(host.command('cat "$HOME/greeting"')) == "good day"

    def test_options_are_added_to_its_configuration_or_replace_what_is_there(self, tmp_path: Path) -> None:
        options = {"ForceCommand": "echo forced", "subsystem": "sftp /bin/false"}
        with private_sshd(tmp_path, options=options) as host:
            assert output(host.command("echo wanted")) == "forced\n"

    def test_several_hosts_share_one_configuration(self, tmp_path: Path) -> None:
        with private_sshd(tmp_path, name="left") as left, private_sshd(tmp_path, name="right") as right:
            config = write_config(tmp_path / "both", [left, right])
            homes = [output(["ssh", "-F", str(config), name, "echo $HOME"]).strip() for name in ("left", "right")]
            assert homes == [str(left.home), str(right.home)]

    def test_a_known_host_with_another_key_is_refused(self, host: Sshd) -> None:
        another = host.config.with_name("authorized_keys").read_text()
        host.known_hosts.write_text(f"[{host.address}]:{host.port} {another}")
        done = subprocess.run(host.command("true"), capture_output=True, text=True, check=False)
        assert done.returncode == 255
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in done.stderr


class TestStart:
    def test_a_port_that_is_taken_is_left_to_its_owner(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as owner:
            taken = owner.getsockname()[1]
            ports = iter([taken, taken])
            choice = sys.modules["secrets"].choice
            monkeypatch.setattr("secrets.choice", lambda among: next(ports, None) or choice(among))
            with private_sshd(tmp_path) as host:
                assert host.port != taken
                assert output(host.command("echo here")) == "here\n"

    def test_a_configuration_that_sshd_refuses_is_told(self, tmp_path: Path) -> None:
        with (
            pytest.raises(RuntimeError, match="Bad configuration option: NoSuchOption"),
            private_sshd(tmp_path, options={"NoSuchOption": "yes"}),
        ):
            pass


class TestEnd:
    def test_sessions_end_with_it(self, tmp_path: Path) -> None:
        with private_sshd(tmp_path) as host:
            assert not host.sessions()
            ssh = subprocess.Popen(host.command("sleep 1000 & echo $!; exec sleep 1000"), stdout=subprocess.PIPE)
            assert ssh.stdout
            background = int(ssh.stdout.readline())
            ours = host.sessions() | {host.pid}
            assert background in ours
            assert host.temporary.is_dir()
        assert all_end(ours, deadline=0)
        assert not host.temporary.exists()
        ssh.communicate()
        assert ssh.returncode == 255

    def test_a_daemon_does_not_end_with_it(self, tmp_path: Path) -> None:
        with private_sshd(tmp_path) as host:
            daemon = int(output(host.command("setsid -f sh -c 'echo $$; exec sleep 1000 >/dev/null 2>&1'")))
        try:
            assert not all_end([daemon], deadline=0)
        finally:
            os.kill(daemon, signal.SIGKILL)
        assert all_end([daemon])


@pytest.mark.usefixtures("networks")
class TestNamespace:
    @pytest.mark.parametrize("incoming", ["open", "drop", "reject"])
    def test_it_is_reached_by_ssh(self, tmp_path: Path, incoming: str) -> None:
        with (
            namespace(incoming=incoming) as net,
            private_sshd(tmp_path, address=net.host, namespace=net.name) as host,
        ):
            seen = output(host.command("echo $SSH_CONNECTION")).split()
            assert (seen[0], seen[2]) == (net.master, net.host)

    @pytest.mark.parametrize(
        ("incoming", "outcome", "within_s"),
        [
            ("open", "connected", LONG_S),
            ("drop", "TimeoutError", SILENCE_S),
            ("reject", "ConnectionRefusedError 111", LONG_S),
        ],
    )
    def test_connections_to_the_master(self, incoming: str, outcome: str, within_s: float) -> None:
        with namespace(incoming=incoming) as net, socket.create_server((net.master, 0)) as master:
            assert connecting(net, net.master, master.getsockname()[1], within_s) == outcome

    @pytest.mark.parametrize("incoming", ["drop", "reject"])
    def test_a_firewalled_host_still_speaks_with_itself(self, tmp_path: Path, incoming: str) -> None:
        with (
            namespace(incoming=incoming) as net,
            private_sshd(tmp_path, address=net.host, namespace=net.name) as host,
        ):
            assert connecting(net, net.host, host.port) == "connected"

    def test_it_has_no_way_to_anywhere_else(self) -> None:
        with namespace() as net, namespace() as other:
            assert net.host != other.host
            assert connecting(net, other.host, 22) == "OSError 101"  # ENETUNREACH

    @pytest.mark.parametrize(("lose", "find"), [("cut", "mend"), ("blackhole", "unblackhole")])
    def test_a_lost_link_loses_packets_and_no_connection(self, tmp_path: Path, lose: str, find: str) -> None:
        with (
            namespace() as net,
            private_sshd(tmp_path, address=net.host, namespace=net.name) as host,
            echo(host) as login,
        ):
            getattr(net, lose)()
            try:
                login.send(b"lost")
                assert login.answer(within_s=SILENCE_S) == b""
            finally:
                getattr(net, find)()
            assert login.answer() == b"lost"  # TCP has sent it again
            assert login.close() == 0

    def test_a_blackhole_takes_new_connections_too(self) -> None:
        with namespace() as net, socket.create_server((net.master, 0)) as master:
            net.blackhole()
            assert connecting(net, net.master, master.getsockname()[1], SILENCE_S) == "TimeoutError"
            net.unblackhole()
            assert connecting(net, net.master, master.getsockname()[1]) == "connected"

    def test_a_host_behind_it_is_reached_by_a_jump(self, tmp_path: Path) -> None:
        with (
            namespace() as outer,
            inner_namespace(outer) as inner,
            private_sshd(tmp_path, address=outer.host, namespace=outer.name, name="gate") as gate,
            private_sshd(tmp_path, address=inner.host, namespace=inner.name, jump=gate) as host,
        ):
            seen = output(host.command("echo $SSH_CONNECTION")).split()
            assert (seen[0], seen[2]) == (inner.master, inner.host)
            with pytest.raises(OSError, match="No route to host"):
                socket.create_connection((host.address, host.port))

    def test_a_host_behind_it_does_not_reach_the_master(self) -> None:
        with namespace() as outer, inner_namespace(outer) as inner:
            assert connecting(inner, outer.master, 22) == "OSError 101"

    def test_nothing_is_left(self) -> None:
        def known() -> set[str]:
            routes = subprocess.check_output(["ip", "route"], text=True)
            # The names not by ip: it complains when a namespace goes meanwhile, such as another session's.
            return {*os.listdir("/run/netns"), *os.listdir("/sys/class/net"), *routes.split()}

        with namespace(incoming="drop") as outer, inner_namespace(outer) as inner:
            ours = {outer.name, inner.name, str(ip_interface(f"{inner.host}/30").network)}
            assert ours <= known()
            outer.blackhole()
            inner.cut()
        assert not ours & known()


class TestNeed:
    def test_nothing_lacks(self) -> None:
        need("")

    def test_what_lacks_skips_the_test(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match="no bananas"):
            need("no bananas")

    def test_with_ci_it_fails_the_test(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="no bananas"):
            need("no bananas")
