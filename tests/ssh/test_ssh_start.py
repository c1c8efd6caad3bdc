"""A host is reached as `ssh host` would reach it: configuration, keys and agent, jump hosts, what is set for a host."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import gather
import pyzmq_garbage  # noqa: F401
from namespaces import inner_namespace, namespace, namespaces_work
from needs import lacking_programs, need, program
from processes import descendants
from qjam import BootstrapError, HostSpec, Master, RemoteWorker
from ssh_hosts import block, home, run_seven, ssh_host  # noqa: F401
from sshd import Sshd, bare_python, private_sshd, sshd_works, write_config

VERBOSE = {"LogLevel": "VERBOSE"}


@pytest.fixture(autouse=True)
def _needs() -> None:
    need(sshd_works())


@pytest.fixture
def config(tmp_path: Path):
    """Writes an ssh_config of these blocks."""

    def write(*blocks: str) -> Path:
        path = tmp_path / "config"
        path.write_text("".join(blocks))
        return path

    return write


def works(hosts: object, config: Path, **options: object) -> None:
    with Master(hosts, ssh_config=config, **options) as master:
        run_seven(master)


def refusal(hosts: object, config: Path, **options: object) -> str:
    with pytest.raises(BootstrapError) as caught:
        Master(hosts, ssh_config=config, **options)
    return str(caught.value)


def keygen(path: Path, *options: str) -> Path:
    command = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(path), *options]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def variables(name: str):
    """What each worker finds in an environment variable."""

    def work(params, part):
        import os

        return os.environ.get(name)

    return lambda part: work(None, part)


# Where


def test_a_host_is_an_alias_of_ssh_config(ssh_host, config):
    works("there", config(block(ssh_host(), "there")))


def test_user_and_port_in_the_text_win_over_ssh_config(ssh_host, config):
    sshd = ssh_host()
    works(f"{sshd.user}@there:{sshd.port}", config(block(sshd, "there", Port=9, User="stranger")))


def test_an_address_with_user_and_port_needs_no_alias(ssh_host, config):
    sshd = ssh_host()
    works(f"{sshd.user}@127.0.0.1:{sshd.port}", config(block(sshd, "*", HostName=None, Port=None, User=None)))


def test_an_included_file_and_a_match_block_count(ssh_host, config, tmp_path):
    sshd = ssh_host()
    (tmp_path / "more").write_text(block(sshd, "there", Port=None, User=None))
    match = f"Match originalhost there\n    Port {sshd.port}\n    User {sshd.user}\n"
    works("there", config(f"Include {tmp_path / 'more'}\n", match))


def test_qjam_user_is_the_user_where_the_text_names_none(ssh_host, config, monkeypatch):
    sshd = ssh_host(options=VERBOSE)
    path = config(block(sshd, User="stranger"))
    monkeypatch.setenv("QJAM_USER", "nobody")
    assert re.search("testhost: auth: .*lets nobody in", refusal("testhost", path))
    works(f"{sshd.user}@testhost", path)
    monkeypatch.setenv("QJAM_USER", sshd.user)
    works("testhost", path)


def test_qjam_ssh_config_is_the_configuration_where_none_is_named(ssh_host, monkeypatch):
    monkeypatch.setenv("QJAM_SSH_CONFIG", str(ssh_host().config))
    works("testhost", None)


# What is set for a host


@pytest.fixture
def marked_python(tmp_path: Path):
    """Writes a command that is python and says so in the environment."""

    def write(mark: str) -> str:
        path = tmp_path / mark
        path.write_text(f'#!/bin/sh\nMARK={mark} exec python3 "$@"\n')
        path.chmod(0o755)
        return str(path)

    return write


def test_qjam_remote_python_starts_python_and_the_python_of_a_host_wins(ssh_host, marked_python, monkeypatch):
    sshd = ssh_host()
    monkeypatch.setenv("QJAM_REMOTE_PYTHON", marked_python("everywhere"))
    with Master("testhost", ssh_config=sshd.config) as master:
        assert master.run(gather, variables("MARK")) == ["everywhere"]
    with Master(HostSpec("testhost", python=marked_python("here")), ssh_config=sshd.config) as master:
        assert master.run(gather, variables("MARK")) == ["here"]


def test_python_may_have_options(ssh_host):
    def work(part):
        import sys

        return sys.flags.isolated

    with Master(HostSpec("testhost", python=f"{bare_python()} -I"), ssh_config=ssh_host().config) as master:
        assert master.run(gather, work) == [1]


def test_env_reaches_the_workers_whatever_it_holds(ssh_host):
    value = "a 'quoted' \"text\" with $HOME,\nanother line and ü"
    spec = HostSpec("testhost", workers=2, env={"GIVEN": value, "EMPTY": ""})
    with Master(spec, ssh_config=ssh_host().config) as master:
        assert master.run(gather, variables("GIVEN")) == [value] * 2
        assert master.run(gather, variables("EMPTY")) == [""] * 2


def test_env_shows_up_in_no_command_line_and_no_log(ssh_host):
    secret = "s3cret-" + os.urandom(8).hex()
    sshd = ssh_host(options={"LogLevel": "DEBUG3"})
    with Master(HostSpec("testhost", env={"TOKEN": secret}), ssh_config=sshd.config) as master:
        assert master.run(gather, variables("TOKEN")) == [secret]
        shown = [
            Path("/proc", pid, "cmdline").read_text(errors="replace")
            for pid in map(str, {os.getpid(), *descendants(os.getpid()), *sshd.sessions()})
        ]
    assert any("exec(compile" in text for text in shown)
    assert not [text for text in [*shown, sshd.log_text()] if secret in text]


def test_modules_on_the_pythonpath_of_env_are_found(ssh_host, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "only_there.py").write_text("answer = 42\n")

    def work(part):
        import importlib

        return importlib.import_module("only_there").answer

    spec = HostSpec("testhost", env={"PYTHONPATH": str(tmp_path / "site")})
    with Master(spec, ssh_config=ssh_host().config) as master:
        assert master.run(gather, work) == [42]


def test_setup_is_run_before_python_starts(ssh_host, tmp_path):
    """As `. venv/bin/activate` does, it finds python elsewhere and sets a variable."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "my-python").symlink_to(bare_python())
    spec = HostSpec("testhost", python="my-python", setup=f"export MARK=set PATH={tmp_path}/bin:$PATH")
    with Master(spec, ssh_config=ssh_host().config) as master:
        assert master.run(gather, variables("MARK")) == ["set"]


def test_setup_may_print_what_it_likes(ssh_host):
    noise = "echo loading; echo loading >&2; head -c 300000 /dev/urandom; printf 'no end of line'"
    works(HostSpec("testhost", setup=noise), ssh_host().config)


@pytest.mark.parametrize("setup", ["export A=1;", "export A=1 # for numpy", "true &"])
def test_setup_is_a_line_as_a_shell_takes_it(ssh_host, setup):
    works(HostSpec("testhost", setup=setup), ssh_host().config)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ("echo there is no module numpy >&2; false", "there is no module numpy"),
        ("no-such-command load numpy", "no-such-command: command not found"),
        (". /no/such/venv/bin/activate", "No such file or directory"),
    ],
)
def test_a_setup_that_fails_is_named_with_its_words(ssh_host, setup, words):
    text = refusal(HostSpec("testhost", setup=setup), ssh_host().config)
    first, *stderr = text.splitlines()
    assert re.search(r"^testhost: python: .*setup", first)
    assert setup in first
    assert "install python3" not in first
    assert any(words in line for line in stderr)


# Jump hosts and commands


@pytest.mark.parametrize("hops", ["listed", "each has its own"])
def test_two_jump_hosts_lead_to_a_host_that_only_the_second_reaches(tmp_path, home, hops):
    need(namespaces_work())
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(namespace())
        middle = stack.enter_context(inner_namespace(outer))
        inner = stack.enter_context(inner_namespace(middle))

        def start(name, net, **more):
            return stack.enter_context(
                private_sshd(tmp_path, name=name, address=net.host, namespace=net.name, options=VERBOSE, **more)
            )

        first = start("first", outer)
        second = start("second", middle, jump=first)
        far = start("far", inner, jump=second, home=home)
        path = write_config(tmp_path / "config", [far])  # there each has its own
        if hops == "listed":
            by = f"first,{second.user}@{second.address}:{second.port}"
            plain = block(second, second.address, HostName=None, Port=None, User=None)
            path.write_text(block(far, ProxyJump=by) + plain + block(first))
        works("far*2", path)
        for sshd in (first, second, far):
            assert sshd.log_text().count("Accepted publickey") == 1


def test_a_jump_host_in_loops_is_an_error(config, ssh_host):
    sshd = ssh_host()
    path = config(block(sshd, "a", ProxyJump="b"), block(sshd, "b", ProxyJump="a"))
    assert re.search("a: resolve: .*jump hosts", refusal("a", path))


def test_a_proxy_command_leads_to_a_host(tmp_path, config, ssh_host):
    jump, sshd = ssh_host("jump", options=VERBOSE), ssh_host(options=VERBOSE)
    command = f"{program('ssh')} -F {tmp_path / 'config'} -W %h:%p jump"
    works("testhost*2", config(block(sshd, ProxyCommand=command), block(jump)))
    assert jump.log_text().count("Accepted publickey") == sshd.log_text().count("Accepted publickey") == 1


# Keys


@contextlib.contextmanager
def agent(*keys: Path) -> Iterator[Path]:
    """A real one that holds these keys."""
    need(lacking_programs("ssh-agent", "ssh-add"))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "agent")
        process = subprocess.Popen(
            [program("ssh-agent"), "-D", "-a", str(place)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        try:
            process.stdout.readline()  # it listens
            subprocess.run(
                [program("ssh-add"), "-q", *map(str, keys)],
                env=os.environ | {"SSH_AUTH_SOCK": str(place)},
                check=True,
                stdin=subprocess.DEVNULL,
            )
            yield place
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            process.stdout.close()


@pytest.fixture
def many_keys(tmp_path: Path) -> list[Path]:
    """More than a server lets a login try."""
    return [keygen(tmp_path / f"other{number}") for number in range(8)]


def test_the_agent_has_the_only_key(ssh_host, config, monkeypatch):
    sshd = ssh_host()
    with agent(sshd.identity) as place:
        sshd.identity.unlink()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
        works("testhost", config(block(sshd, IdentityFile=None, IdentitiesOnly=None, IdentityAgent=None)))


def test_ssh_config_names_the_agent(ssh_host, config, monkeypatch):
    sshd = ssh_host()
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with agent(sshd.identity) as place:
        works("testhost", config(block(sshd, IdentityFile="none", IdentitiesOnly=None, IdentityAgent=place)))


@pytest.mark.parametrize("only", ["yes", "no"])
def test_of_an_agent_with_many_keys_the_one_of_the_identity_file_is_tried_first(
    ssh_host, config, many_keys, only, monkeypatch
):
    sshd = ssh_host()
    public = subprocess.run([program("ssh-keygen"), "-y", "-f", str(sshd.identity)], capture_output=True, check=True)
    sshd.identity.with_name("identity.pub").write_bytes(public.stdout)
    with agent(*many_keys, sshd.identity) as place:
        sshd.identity.unlink()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
        works("testhost", config(block(sshd, IdentitiesOnly=only, IdentityAgent=None)))


def test_an_agent_with_too_many_keys_is_told(ssh_host, config, many_keys, monkeypatch):
    sshd = ssh_host()
    with agent(*many_keys, sshd.identity) as place:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
        text = refusal("testhost", config(block(sshd, IdentityFile="none", IdentitiesOnly="no", IdentityAgent=None)))
    assert re.search(r"testhost: auth: the server hung up after \d keys, .*MaxAuthTries.*IdentitiesOnly yes", text)


def test_an_agent_that_is_gone_does_not_keep_a_file_from_being_used(ssh_host, config, monkeypatch):
    monkeypatch.setenv("SSH_AUTH_SOCK", "/no/such/agent")
    works("testhost", config(block(ssh_host(), IdentityAgent=None)))


@pytest.mark.parametrize(
    "kind", [("-t", "rsa", "-b", "2048"), ("-t", "ecdsa"), ("-t", "rsa", "-b", "2048", "-m", "PEM")]
)
def test_keys_of_other_types_are_taken(tmp_path, ssh_host, config, kind):
    sshd = ssh_host()
    key = keygen(tmp_path / "key", *kind)
    with (tmp_path / "testhost" / "authorized_keys").open("a") as file:
        file.write(key.with_suffix(".pub").read_text())
    works("testhost", config(block(sshd, IdentityFile=key)))


def test_a_key_with_a_passphrase_is_used_where_the_agent_holds_it(ssh_host, config, tmp_path, monkeypatch):
    sshd = ssh_host()
    with agent(sshd.identity) as place:
        change = [program("ssh-keygen"), "-q", "-p", "-P", "", "-N", "a passphrase", "-f", str(sshd.identity)]
        subprocess.run(change, check=True, stdout=subprocess.DEVNULL)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
        works("testhost", config(block(sshd, IdentitiesOnly="yes", IdentityAgent=None)))


# Many workers, many hosts


def connections(sshd: Sshd) -> int:
    return len(re.findall(r"^Connection from ", sshd.log_text(), re.MULTILINE))


def sessions(sshd: Sshd) -> int:
    return len(re.findall(r"^Starting session: ", sshd.log_text(), re.MULTILINE))


@pytest.mark.parametrize("hosts", ["testhost*32", [RemoteWorker("testhost")] * 32], ids=["text", "RemoteWorkers"])
def test_32_workers_take_one_connection_and_one_session(ssh_host, hosts):
    """MaxSessions is 10."""
    sshd = ssh_host(options=VERBOSE)
    with Master(hosts, ssh_config=sshd.config) as master:
        assert len(set(master.run(gather, lambda part: os.getpid()))) == 32
        run_seven(master)
    assert (connections(sshd), sessions(sshd)) == (1, 1)


def test_a_host_is_connected_once_by_each_way_back(ssh_host):
    for route in ("direct", "tunnel", "stdio"):
        sshd = ssh_host(route, options=VERBOSE)
        with Master(f"{route}*2", ssh_config=sshd.config, route=route) as master:
            run_seven(master)
        assert (connections(sshd), sessions(sshd)) == (1, 1)


def test_12_hosts_start_where_the_server_drops_logins(ssh_host, config):
    sshd = ssh_host(options=VERBOSE | {"MaxStartups": "2:50:6"})
    names = [f"host{number}" for number in range(12)]
    with Master(names, ssh_config=config(*(block(sshd, name) for name in names))) as master:
        run_seven(master)
        assert [worker.host for worker in master.workers] == names
    assert sessions(sshd) == 12


def test_the_cipher_is_one_that_the_processor_does(ssh_host):
    sshd = ssh_host(options={"LogLevel": "DEBUG1"})
    works("testhost", sshd.config)
    ciphers = re.findall(r"kex: \S+ cipher: (\S+)", sshd.log_text())
    assert ciphers == ["aes128-gcm@openssh.com"] * 2


def test_a_server_without_that_cipher_gets_another(ssh_host):
    works("testhost", ssh_host(options={"Ciphers": "aes256-ctr"}).config)


@pytest.mark.parametrize("how", ["beside", "CertificateFile"])
def test_a_certificate_lets_in(tmp_path, ssh_host, how):
    def keygen(*arguments):
        subprocess.run(["ssh-keygen", "-q", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)

    keygen("-t", "ed25519", "-N", "", "-f", tmp_path / "ca")
    keygen("-t", "ed25519", "-N", "", "-f", tmp_path / "mine")
    user = pwd.getpwuid(os.getuid()).pw_name
    keygen("-s", tmp_path / "ca", "-I", "me", "-n", user, tmp_path / "mine.pub")
    options = {"TrustedUserCAKeys": str(tmp_path / "ca.pub"), "AuthorizedKeysFile": "none"}
    sshd = ssh_host(options=options)
    more = {}
    if how == "CertificateFile":
        (tmp_path / "mine-cert.pub").rename(tmp_path / "elsewhere")
        more = {"CertificateFile": str(tmp_path / "elsewhere")}
    path = tmp_path / "config"
    path.write_text(block(sshd, IdentityFile=str(tmp_path / "mine"), **more))
    with Master("testhost", ssh_config=path) as master:
        run_seven(master)
