"""The settings of a host are those of OpenSSH, also where the configuration is read without it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjam.ssh import config as ssh_config
from qjam.ssh.config import SshConfigError, SshSettings, resolve, split
from qjam.ssh.connection import Refused, connect

READERS = [pytest.param("ssh", id="openssh"), pytest.param(None, id="our own reader")]
both_readers = pytest.mark.parametrize("ssh", READERS)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives the home that our own reader takes for the user's; OpenSSH cannot be told one."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setattr(ssh_config, "_account", lambda: ("me", str(home)))
    monkeypatch.setattr(ssh_config, "_SYSTEM", tmp_path / "etc")
    return home


def of(config: Path, text: str, ssh: str | None, host: str = "node1", **given: object) -> SshSettings:
    config.write_text(text)
    return resolve(host, config=config, ssh=ssh, **given)


def differences(one: SshSettings, other: SshSettings) -> dict[str, tuple[object, object]]:
    pairs = ((field.name, getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return {name: (a, b) for name, a, b in pairs if a != b}


def test_openssh_is_there_to_compare_with() -> None:
    assert shutil.which("ssh") is not None


@both_readers
def test_without_a_configuration_the_defaults_hold(config: Path, ssh: str | None) -> None:
    found = of(config, "", ssh)
    assert (found.name, found.hostname, found.port, found.user) == ("node1", "node1", 22, ssh_config._account()[0])
    own = Path(ssh_config._account()[1], ".ssh")
    assert found.known_hosts == (own / "known_hosts", own / "known_hosts2")
    assert found.global_known_hosts == (Path("/etc/ssh/ssh_known_hosts"), Path("/etc/ssh/ssh_known_hosts2"))
    kinds = ("rsa", "ecdsa", "ecdsa_sk", "ed25519", "ed25519_sk")
    assert found.identity_files[:5] == tuple(own / f"id_{kind}" for kind in kinds)
    assert (found.certificate_files, found.proxy_jump, found.proxy_command) == ((), (), None)
    assert (found.identities_only, found.hash_known_hosts) == (False, False)
    assert (found.host_key_alias, found.connect_timeout) == (None, None)


@both_readers
def test_user_and_port_given_win_over_the_file(config: Path, ssh: str | None) -> None:
    found = of(config, "User bob\nPort 1\nIdentityFile /keys/%r-%p\n", ssh, user="alice", port=2222)
    assert (found.user, found.port) == ("alice", 2222)
    assert found.identity_files == (Path("/keys/alice-2222"),)


def test_a_user_given_decides_match_user(config: Path) -> None:
    assert of(config, "Match user alice\n HostName real\nHost *\n User bob\n", "ssh", user="alice").hostname == "real"


@both_readers
def test_tokens_variables_and_homes_are_expanded(
    config: Path, ssh: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYS", "/keys")
    text = "HostName %h.example\nUser bob\nIdentityFile ${KEYS}/%n-%h-%p-%r-%%h\nCertificateFile ~/%i.pub\n"
    found = of(config, text + "UserKnownHostsFile ~/%k /tmp/%%x\nHostKeyAlias Cluster\n", ssh)
    home = Path(ssh_config._account()[1])
    assert found.hostname == "node1.example"
    assert found.identity_files == (Path("/keys/node1-node1.example-22-bob-%h"),)
    assert found.certificate_files == (home / f"{os.getuid()}.pub",)
    assert found.known_hosts == (home / "cluster", Path("/tmp/%x"))


@both_readers
def test_a_percent_sign_of_an_address_is_no_token(config: Path, ssh: str | None) -> None:
    found = of(config, "ProxyCommand nc %h %p\n", ssh, host="fe80::1%h0")
    assert (found.hostname, found.proxy_command) == ("fe80::1%h0", "nc fe80::1%h0 22")


@both_readers
def test_paths_may_have_spaces(config: Path, ssh: str | None) -> None:
    found = of(config, 'IdentityFile "/my keys/id"\nUserKnownHostsFile "/a b/c d" /e "/f /g"\n', ssh)
    assert found.identity_files == (Path("/my keys/id"),)
    assert found.known_hosts[:2] == (Path("/a b/c d"), Path("/e"))


@both_readers
def test_none_is_nothing(config: Path, ssh: str | None) -> None:
    keywords = ("IdentityFile", "CertificateFile", "UserKnownHostsFile", "GlobalKnownHostsFile", "IdentityAgent")
    keywords += ("ProxyJump", "ConnectTimeout")
    found = of(config, "".join(f"{keyword} none\n" for keyword in keywords), ssh)
    assert found.identity_files == found.certificate_files == found.known_hosts == found.global_known_hosts == ()
    assert (found.agent, found.proxy_jump, found.connect_timeout) == (None, (), None)
    assert of(config, "ProxyCommand none\nProxyJump gate\n", ssh).proxy_command is None


@both_readers
@pytest.mark.parametrize(
    ("line", "agent"),
    [
        ("", "/run/agent"),
        ("IdentityAgent SSH_AUTH_SOCK", "/run/agent"),
        ("IdentityAgent $OTHER", "/run/other"),
        ("IdentityAgent ${OTHER}/%r", "/run/other/bob"),
        ("IdentityAgent $NOT_SET", None),
        ('IdentityAgent "/my agent"', "/my agent"),
        ("IdentityAgent none", None),
    ],
)
def test_the_agent(
    config: Path, ssh: str | None, line: str, agent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    monkeypatch.setenv("OTHER", "/run/other")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert of(config, f"User bob\n{line}\n", ssh).agent == agent


@both_readers
def test_without_the_variable_there_is_no_agent(config: Path, ssh: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    assert of(config, "", ssh).agent is None


@both_readers
def test_the_hops_of_proxy_jump_come_in_order(config: Path, ssh: str | None) -> None:
    found = of(config, "ProxyJump u@gate:2222,ssh://v@second:22,[::1]:23,%h-gate\n", ssh)
    assert found.proxy_jump == ("u@gate:2222", "v@second:22", "[::1]:23", "node1-gate")


@both_readers
def test_of_proxy_jump_and_proxy_command_the_first_counts(config: Path, ssh: str | None) -> None:
    first = of(config, "ProxyJump gate\nProxyCommand nc\n", ssh)
    assert (first.proxy_jump, first.proxy_command) == (("gate",), None)
    second = of(config, "ProxyCommand nc\nProxyJump gate\n", ssh)
    assert (second.proxy_jump, second.proxy_command) == ((), "nc")


@both_readers
def test_no_proxy_jump_leaves_room_for_a_proxy_command(config: Path, ssh: str | None) -> None:
    found = of(config, "ProxyJump none\nProxyJump gate\nProxyCommand nc\n", ssh)
    assert (found.proxy_jump, found.proxy_command) == ((), "nc")


@both_readers
def test_a_proxy_command_keeps_its_quotes(config: Path, ssh: str | None) -> None:
    found = of(config, 'ProxyCommand = "a b" -W %h:%p %r@%n %% # x\n', ssh, user="bob")
    assert found.proxy_command == '"a b" -W node1:22 bob@node1 % # x'


@both_readers
@pytest.mark.parametrize(("written", "seconds"), [("7", 7), ("5m", 300), ("1h30", 3630), ("0", None), ("1D", 86400)])
def test_the_connect_timeout_is_in_seconds(config: Path, ssh: str | None, written: str, seconds: int | None) -> None:
    assert of(config, f"ConnectTimeout {written}\n", ssh).connect_timeout == seconds


@both_readers
def test_known_hosts_are_looked_up_by_the_alias_without_the_port(config: Path, ssh: str | None) -> None:
    plain = of(config, "HostName real\nPort 2222\n", ssh)
    assert (plain.known_hosts_name, plain.known_hosts_port) == ("real", 2222)
    alias = of(config, "HostName real\nPort 2222\nHostKeyAlias cluster\n", ssh)
    assert (alias.known_hosts_name, alias.known_hosts_port) == ("cluster", 22)


FILES = {
    "the first value counts": "Host node*\n Port 1\nHost *\n Port 2\n User all\n",
    "identity files add up": "IdentityFile /b\nHost node1\n IdentityFile /a\n IdentityFile /b\nHost n?de2\n",
    "negated hosts": "Host * !node1\n Port 1\nHost node2 node1\n User some\n",
    "capitals": "Host Node1\n Port 1\nHost NODE1\n User some\nHost node2\n HostName REAL\n",
    "equals signs and comments": 'host=node1 # isn\'t it\n PORT = 7 # "no\n  User="x y"\n#\n\tIdentityFile /a#b\n',
    "match all": "Match all\n Port 1\nHost x\n User no\nMatch all\n User yes\n",
    "include": "Include {tmp}/inc/* {tmp}/none\nPort 9\n",
    "include within a host": "Host node1\n Include {tmp}/inc/*\n IdentityFile /end\n",
    "include before match all": "Host node2\n Include {tmp}/inc/1\n Port 9\nMatch all\n User bob\n",
    "include of includes": "Host node*\n Include {tmp}/inc/deep {tmp}/inc/none\n ConnectTimeout 2\n",
    "include at the end": "Host node2\nInclude {tmp}/inc/*\nHost *\nInclude {tmp}/inc/2\n",
    "switches": "IdentitiesOnly yes\nHashKnownHosts true\n",
    "unknown but right": "ForwardX11 no\nSendEnv LANG LC_*\nLocalForward 1 a:2\n",
}


@pytest.mark.parametrize("host", ["node1", "node2", "NODE1", "::1"])
@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_our_own_reader_agrees_with_openssh(tmp_path: Path, config: Path, text: str, host: str) -> None:
    folder = tmp_path / "inc"
    folder.mkdir()
    (folder / "1").write_text("ConnectTimeout 1\nHost node1\n IdentityFile /one\nHost *\n HostKeyAlias all\n")
    (folder / "2").write_text("IdentityFile /two\nHost node2\n HostName second\n Port 22222\n")
    (folder / "deep").write_text(f"Host node2\n Include {folder}/1\n User deep\nHost *\n Include {folder}/2\n")
    text = f"{text.replace('{tmp}', str(tmp_path))}\nMatch all\n IdentityFile /last\n"
    assert differences(of(config, text, "ssh", host), of(config, text, None, host)) == {}


PATTERN = st.sampled_from(["node1", "node2", "!node2", "node?", "*", "n*2", "real"])
VALUE = st.sampled_from(
    [
        *("Port 1", "Port 2", "User a", "HostName real", "HostName %h", "IdentityFile /%h/%r", "IdentityFile /b"),
        *("ProxyJump gate", "ProxyCommand nc %h", "ProxyJump none", "HostKeyAlias K", "UserKnownHostsFile /%k /%C"),
    ]
)
BLOCK = st.one_of(
    st.lists(PATTERN, min_size=1, max_size=3).map(lambda patterns: f"Host {' '.join(patterns)}"),
    st.sampled_from(["Match all", "Include {other}"]),
)
LINES = st.lists(BLOCK | VALUE, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, LINES)
def test_our_own_reader_agrees_with_openssh_on_any_blocks(config: Path, lines: list[str], included: list[str]) -> None:
    other = config.with_name("other")
    other.write_text("\n".join(line for line in included if "Include" not in line))
    text = "\n".join(["IdentityFile /first", *lines]).replace("{other}", str(other))
    assert differences(of(config, text, "ssh"), of(config, text, None)) == {}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text() | st.sampled_from(["Host", "Match", "Port", "include", '"', "host", "="]), max_size=9))
def test_no_file_makes_our_own_reader_raise_anything_else(config: Path, words: list[str]) -> None:
    config.write_bytes(" ".join(words).encode("utf-8", "surrogatepass"))
    try:
        resolve("node1", config=config, ssh=None)
    except SshConfigError:
        pass


@pytest.mark.parametrize(
    "line", ["Match host node1", "match exec true", "Match user bob", "Match final all", "Match tagged x", "Match !all"]
)
def test_our_own_reader_refuses_a_match_and_says_where(config: Path, line: str) -> None:
    said = f"config line 2: qjam cannot read `{line}` itself: install an OpenSSH client"
    with pytest.raises(SshConfigError, match=said):
        of(config, f"Port 1\n  {line}\n Port 2\n", None)


def test_a_match_in_a_file_that_is_not_included_is_not_refused(config: Path) -> None:
    other = config.with_name("other")
    other.write_text("Match exec true\n")
    assert of(config, f"Host node2\n Include {other}\nHost node1\n Port 1\n", None).port == 1


def test_the_users_file_comes_before_the_systems(home: Path, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (home / ".ssh" / "config").write_text("Port 1\n")
    (tmp_path / "etc" / "ssh_config").write_text("Port 2\nUser bob\n")
    found = resolve("node1", ssh=None)
    assert (found.port, found.user) == (1, "bob")


def test_relative_includes_start_where_openssh_starts(home: Path, tmp_path: Path) -> None:
    for folder, keyword in ((home / ".ssh", "Port 1"), (tmp_path / "etc", "User bob")):
        (folder / "conf.d").mkdir(parents=True)
        (folder / "conf.d" / "one.conf").write_text(keyword)
    (home / ".ssh" / "config").write_text("Include conf.d/*.conf ~/more\n")
    (home / "more").write_text("ConnectTimeout 3\n")
    (tmp_path / "etc" / "ssh_config").write_text("Include conf.d/*.conf\n")
    found = resolve("node1", ssh=None)
    assert (found.port, found.user, found.connect_timeout) == (1, "bob", 3)


@both_readers
def test_includes_that_go_round_are_an_error(config: Path, ssh: str | None) -> None:
    with pytest.raises(SshConfigError, match=r"(?i)include"):
        of(config, f"Include {config}\n", ssh)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('User "x\n', "config line 1: No closing quotation"),
        ("\nPort\n", "config line 2: 'Port' is not a keyword and a value"),
        ("Port ssh!\n", "port ssh!, which is not a number from 1 to 65535"),
        ("ConnectTimeout soon\n", "ConnectTimeout soon, which is not a time"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(config: Path, text: str, said: str) -> None:
    with pytest.raises(SshConfigError, match=said):
        of(config, text, None)


def test_what_openssh_says_of_a_bad_file_is_told(config: Path) -> None:
    with pytest.raises(SshConfigError, match=r"node1: .*: line 2: Bad configuration option: nonsense"):
        of(config, "Port 1\nNonsense yes\n", "ssh")


@both_readers
def test_a_configuration_that_is_not_there_is_an_error(config: Path, ssh: str | None) -> None:
    with pytest.raises(SshConfigError, match=str(config)):
        resolve("node1", config=config, ssh=ssh)


def test_an_ssh_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_config, "TIMEOUT_S", 0.2)
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    ssh.chmod(0o755)
    with pytest.raises(SshConfigError, match=r"ssh -G -T -- node1` did not end within"):
        resolve("node1", ssh=str(ssh))


def test_where_there_is_no_ssh_the_files_are_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ssh" / "config").write_text("Port 4\n")
    monkeypatch.setenv("PATH", str(home))
    assert resolve("node1").port == 4


def test_reading_the_files_needs_no_paramiko(config: Path) -> None:
    config.write_text("Port 1\n")
    program = "import sys; from pathlib import Path; from qjam.ssh import config\n"
    program += f"config.resolve('node1', config=Path({str(config)!r}), ssh=None)\n"
    program += "sys.exit('paramiko' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_jump_host_that_cannot_be_resolved_is_a_failure_to_resolve(
    config: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(home))  # without ssh, which refuses such a file itself
    config.write_text("ProxyJump gate:port\n")
    with pytest.raises(Refused, match=r"ProxyJump gate:port, which is not \[user@\]host\[:port\]") as raised:
        connect("node1", None, None, config, False, lambda phase: None)
    assert raised.value.phase == "resolve"


@pytest.mark.parametrize(
    ("hop", "parts"),
    [
        ("gate", ("gate", None, None)),
        ("u@gate:2222", ("gate", "u", 2222)),
        ("me@corp@gate", ("gate", "me@corp", None)),
        ("[::1]:22", ("::1", None, 22)),
        ("u@[fe80::1%eth0]", ("fe80::1%eth0", "u", None)),
    ],
)
def test_a_hop_is_user_host_and_port(hop: str, parts: tuple[str, str | None, int | None]) -> None:
    assert split(hop) == parts


@pytest.mark.parametrize("hop", ["", "u@", ":22", "a:b", "a:0", "-oProxyCommand=x", "::1"])
def test_what_is_no_hop_is_an_error(hop: str) -> None:
    with pytest.raises(SshConfigError):
        split(hop)
