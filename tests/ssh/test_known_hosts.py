"""The keys of hosts are judged by the known_hosts files as OpenSSH judges them."""

from __future__ import annotations

import base64
import errno
import os
import shlex
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjam.ssh.known_hosts import KnownHosts, Status, Verdict, fingerprint, lookup_name, record, refusal

SEVERAL_EXAMPLES_A_FOLDER = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def key(seed: int, key_type: str = "ssh-ed25519") -> bytes:
    """Gives a public key that OpenSSH reads: it knows no wrong ed25519 key of 32 bytes."""
    fields = (key_type.encode(), bytes([seed]) * 32)
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def text(blob: bytes, key_type: str = "ssh-ed25519") -> str:
    return f"{key_type} {base64.b64encode(blob).decode()}"


ONE, TWO, RSA = key(1), key(2), key(3, "ssh-rsa")
A = text(ONE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


def check(file: Path, lines: str, name: str = "node1", port: int = 22, blob: bytes = ONE) -> Verdict:
    file.write_text(lines)
    return KnownHosts.read([file]).check(name, port, "ssh-ed25519", blob)


def keygen(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ssh-keygen", *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def openssh_finds(file: Path, name: str, port: int) -> bool:
    return keygen("-F", lookup_name(name, port), "-f", file).returncode == 0


def test_a_key_that_is_there_is_known_by_its_line(file: Path) -> None:
    verdict = check(file, f"# ours\n\nnode1 {A} a comment\n")
    assert verdict == Verdict(Status.KNOWN, file, 3)
    assert verdict.known


def test_a_host_without_a_key_is_unknown(file: Path) -> None:
    verdict = check(file, f"node2 {A}\n")
    assert verdict == Verdict(Status.UNKNOWN)
    assert verdict.unknown


def test_another_key_of_the_host_is_a_change_told_with_its_line(file: Path) -> None:
    assert check(file, f"node2 {A}\nnode1 {text(TWO)}\n") == Verdict(Status.CHANGED, file, 2)


def test_a_key_of_another_type_alone_is_a_change(file: Path) -> None:
    assert check(file, f"node1 {text(RSA, 'ssh-rsa')}\n") == Verdict(Status.CHANGED, file, 1)


def test_the_line_that_conflicts_is_one_of_the_same_type_where_there_is_one(file: Path) -> None:
    assert check(file, f"node1 {text(RSA, 'ssh-rsa')}\nnode1 {text(TWO)}\n").line == 2


def test_one_right_key_among_others_is_known(file: Path) -> None:
    assert check(file, f"node1 {text(TWO)}\nnode1 {A}\n") == Verdict(Status.KNOWN, file, 2)


def test_revocation_wins_over_every_other_line_in_every_file(tmp_path: Path, file: Path) -> None:
    file.write_text(f"node1 {A}\n")
    other = tmp_path / "global"
    other.write_text(f"\n@revoked * {A}\n")
    verdict = KnownHosts.read([file, other]).check("node1", 22, "ssh-ed25519", ONE)
    assert verdict == Verdict(Status.REVOKED, other, 2)


def test_a_revoked_key_says_nothing_of_other_keys_and_other_hosts(file: Path) -> None:
    assert check(file, f"@revoked node1 {text(TWO)}\n") == Verdict(Status.UNKNOWN)
    assert check(file, f"@revoked node2 {A}\n") == Verdict(Status.UNKNOWN)


def test_a_certificate_authority_vouches_for_no_plain_key_and_conflicts_with_none(file: Path) -> None:
    assert check(file, f"@cert-authority * {A}\n") == Verdict(Status.UNKNOWN)
    assert check(file, f"@cert-authority * {text(TWO)}\nnode1 {A}\n").known


PATTERNS = [
    ("node1", "node1", 22),
    ("NODE1", "node1", 22),
    ("node1", "Node1", 22),
    ("other,node1", "node1", 22),
    ("node?", "node1", 22),
    ("node?", "node12", 22),
    ("n*1", "node1", 22),
    ("*", "node1", 22),
    ("*", "node1", 2222),
    ("*,!node1", "node1", 22),
    ("!node1,*", "node1", 22),
    ("!node1", "node2", 22),
    ("*.example,!bad.example", "good.example", 22),
    ("[node1]:2222", "node1", 2222),
    ("[node1]:22", "node1", 22),
    ("[node1]:2222", "node1", 22),
    ("[node1]:2222", "node1", 2223),
    ("node1", "node1", 2222),
    ("[node?]:*", "node1", 2222),
    ("[node1]", "n", 22),
    ("node[12]", "node1", 22),
    ("::1", "::1", 22),
    ("[::1]:2222", "::1", 2222),
    ("|1|AAAA|BBBB", "node1", 22),
    ("|1|node1", "node1", 22),
    ("a|b", "a|b", 22),
]


@pytest.mark.parametrize(("hosts", "name", "port"), PATTERNS)
def test_the_hosts_of_a_line_mean_what_they_mean_to_openssh(file: Path, hosts: str, name: str, port: int) -> None:
    found = check(file, f"{hosts} {A}\n", name, port).known
    assert found == (openssh_finds(file, name, port) or openssh_finds(file, name, 22))


def test_port_22_is_looked_up_by_the_bare_name(file: Path) -> None:
    assert check(file, f"node1 {A}\n", port=22).known
    assert check(file, f"[node1]:22 {A}\n", port=22).unknown
    assert check(file, f"[node1]:2222 {A}\n", port=2222).known
    assert check(file, f"[node1]:2222 {A}\n", port=22).unknown


def test_the_key_for_port_22_will_do_where_another_port_is_unknown(file: Path) -> None:
    assert check(file, f"node1 {A}\n", port=2222).known
    assert check(file, f"node1 {text(TWO)}\n", port=2222).unknown  # not changed: it is another server
    assert check(file, f"node1 {A}\n[node1]:2222 {text(TWO)}\n", port=2222).status is Status.CHANGED
    assert check(file, f"@revoked node1 {A}\n", port=2222).status is Status.REVOKED


def test_names_that_openssh_has_hashed_are_found(file: Path) -> None:
    file.write_text(f"node1 {A}\n[node2]:2222 {text(TWO)}\n")
    assert keygen("-H", "-f", file).returncode == 0
    assert "node" not in file.read_text()
    known = KnownHosts.read([file])
    assert known.check("Node1", 22, "ssh-ed25519", ONE).line == 1
    assert known.check("node2", 2222, "ssh-ed25519", TWO).line == 2
    assert known.check("node2", 22, "ssh-ed25519", TWO).unknown


@pytest.mark.parametrize(
    "line",
    [
        "node1",
        "node1 ssh-ed25519",
        "node1 ssh-ed25519 ????",
        "node1 ssh-ed25519 AAAA",
        f"node1 {text(RSA)}",
        f"@unheard-of node1 {A}",
        f"@revoked{A}",
        "@",
        "|1|",
    ],
)
def test_a_line_that_cannot_be_understood_is_skipped(file: Path, line: str) -> None:
    assert check(file, f"{line}\n") == Verdict(Status.UNKNOWN)
    assert check(file, f"{line}\nnode1 {A}\n") == Verdict(Status.KNOWN, file, 2)


def test_files_that_cannot_be_read_are_skipped(tmp_path: Path, file: Path) -> None:
    file.write_text(f"node1 {A}\n")
    assert KnownHosts.read([tmp_path / "none", tmp_path, file]).check("node1", 22, "ssh-ed25519", ONE).known


def test_bytes_that_are_no_text_are_skipped(file: Path) -> None:
    file.write_bytes(b"\xff\xfe \x80\0\n" + f"node1 {A}\r\n".encode())
    assert KnownHosts.read([file]).check("node1", 22, "ssh-ed25519", ONE) == Verdict(Status.KNOWN, file, 2)


FIELDS = st.one_of(
    st.text(), st.sampled_from(["@revoked", "@cert-authority", "|1|", "*", "!", "ssh-ed25519", "\t", A, "|1|YQ==|YQ=="])
)


@SEVERAL_EXAMPLES_A_FOLDER
@given(st.lists(st.lists(FIELDS, max_size=5).map(" ".join), max_size=5))
def test_no_file_makes_it_raise(file: Path, lines: list[str]) -> None:
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    known = KnownHosts.read([file])
    known.key_types("node1", 22)
    known.check("node1", 22, "ssh-ed25519", ONE)


def test_the_key_types_come_in_the_order_of_the_files_each_once(tmp_path: Path, file: Path) -> None:
    file.write_text(f"node1 {text(RSA, 'ssh-rsa')}\nnode1 {A}\n")
    other = tmp_path / "global"
    other.write_text(f"node1 {text(TWO)}\nnode2 {text(key(1, 'ssh-dss'), 'ssh-dss')}\n")
    assert KnownHosts.read([file, other]).key_types("node1", 22) == ["ssh-rsa", "ssh-ed25519"]


def test_the_key_types_leave_out_revoked_keys_and_authorities(file: Path) -> None:
    file.write_text(f"node1 {A}\n@revoked * {A}\n@cert-authority * {text(RSA, 'ssh-rsa')}\n")
    assert KnownHosts.read([file]).key_types("node1", 22) == []


def test_the_fingerprint_is_the_one_of_ssh_keygen(tmp_path: Path) -> None:
    assert keygen("-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id").returncode == 0
    public = tmp_path / "id.pub"
    blob = base64.b64decode(public.read_text().split()[1])
    assert keygen("-lf", public).stdout.split()[1] == fingerprint(blob)


NAMES = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}|[0-9a-f]{0,4}::[0-9a-f]{1,4}", fullmatch=True)


@SEVERAL_EXAMPLES_A_FOLDER
@given(NAMES, st.integers(1, 65535) | st.just(22), st.booleans(), st.integers(0, 255))
def test_what_is_recorded_is_known_here_and_to_openssh(
    file: Path, name: str, port: int, hashed: bool, seed: int
) -> None:
    file.unlink(missing_ok=True)
    record(file, name, port, "ssh-ed25519", key(seed), hashed)
    known = KnownHosts.read([file])
    assert known.check(name, port, "ssh-ed25519", key(seed)) == Verdict(Status.KNOWN, file, 1)
    assert known.check(f"{name}x", port, "ssh-ed25519", key(seed)).unknown
    assert openssh_finds(file, name, port)


def test_recording_makes_file_and_folder_for_the_user_alone(tmp_path: Path) -> None:
    file = tmp_path / ".ssh" / "known_hosts"
    record(file, "node1", 22, "ssh-ed25519", ONE)
    assert file.read_text() == f"node1 {A}\n"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_recording_begins_a_line_of_its_own(file: Path) -> None:
    file.write_text(f"node2 {A}")
    record(file, "node1", 2222, "ssh-ed25519", ONE)
    assert file.read_text() == f"node2 {A}\n[node1]:2222 {A}\n"


@pytest.mark.parametrize("hashed", [False, True])
def test_a_key_is_recorded_once(file: Path, hashed: bool) -> None:
    for _ in range(2):
        record(file, "node1", 22, "ssh-ed25519", ONE, hashed)
    assert len(file.read_text().splitlines()) == 1


def test_a_hashed_record_tells_no_name(file: Path) -> None:
    record(file, "node1", 22, "ssh-ed25519", ONE, hashed=True)
    assert file.read_text().startswith("|1|")
    assert "node1" not in file.read_text()


def test_lines_recorded_at_once_do_not_mix(file: Path) -> None:
    def append(number: int) -> None:
        for port in range(1000, 1010):
            record(file, f"node{number}", port, "ssh-ed25519", ONE)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"[node{number}]:{port} {A}" for number in range(8) for port in range(1000, 1010)}
    assert {line for line in file.read_text().splitlines() if line} == expected


def commands(message: str) -> list[str]:
    return [line.strip() for line in message.splitlines() if line.startswith("    ") and "host_keys" not in line]


def refused(file: Path, port: int = 22, blob: bytes = ONE) -> str:
    verdict = KnownHosts.read([file]).check("node1", port, "ssh-ed25519", blob)
    return refusal("me@n1", "node1", port, "ssh-ed25519", blob, verdict, [file])


def test_the_refusal_of_an_unknown_key_tells_both_ways_to_accept_it(file: Path) -> None:
    message = refused(file)
    assert message.startswith("me@n1: its host key is not known")
    assert fingerprint(ONE) in message
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in message
    assert 'host_keys="accept-new"' in message


@pytest.mark.parametrize("folder", ["there", "it's not/there yet"])
@pytest.mark.parametrize("port", [22, 2222])
def test_the_command_told_for_an_unknown_key_adds_it(tmp_path: Path, folder: str, port: int) -> None:
    (tmp_path / "there").mkdir()
    file = tmp_path / folder / "known hosts"
    subprocess.run(["sh", "-c", commands(refused(file, port))[-1]], check=True)
    assert KnownHosts.read([file]).check("node1", port, "ssh-ed25519", ONE).known


@pytest.mark.parametrize("port", [22, 2222])
def test_the_commands_told_for_a_changed_key_replace_it(file: Path, port: int) -> None:
    record(file, "node1", port, "ssh-ed25519", TWO)
    message = refused(file, port)
    assert f"not the one in {file}, line 1" in message
    assert "WARNING: this may be an attack" in message
    remove, add = commands(message)[-2:]
    assert shlex.split(remove)[:2] == ["ssh-keygen", "-f"]
    for command in (remove, add):
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    known = KnownHosts.read([file])
    assert known.check("node1", port, "ssh-ed25519", ONE).known
    assert not known.check("node1", port, "ssh-ed25519", TWO).known


def test_the_refusal_of_a_revoked_key_tells_no_way_to_accept_it(file: Path) -> None:
    file.write_text(f"node1 {A}\n@revoked node1 {A}\n")
    message = refused(file)
    assert f"revoked ({file}, line 2)" in message
    assert commands(message) == [fingerprint(ONE)]
    assert "accept-new" not in message


def test_where_there_is_no_known_hosts_file_the_refusal_says_so() -> None:
    message = refusal("n1", "node1", 22, "ssh-rsa", RSA, Verdict(Status.UNKNOWN), [])
    assert "names no UserKnownHostsFile" in message
    assert "ssh_host_rsa_key.pub" in message


def test_a_file_that_may_not_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EISDIR)):
        record(tmp_path, "node1", 22, "ssh-ed25519", ONE)
