"""A host is who known_hosts says: unknown, changed and revoked keys are refused, and the error tells what to do."""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path

import pytest

import pyzmq_garbage  # noqa: F401
from needs import need, program
from qjam import BootstrapError, Master
from ssh_hosts import block, home, run_seven, ssh_host  # noqa: F401
from sshd import Sshd, sshd_works


@pytest.fixture(autouse=True)
def _needs() -> None:
    need(sshd_works())


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A known_hosts file that is still to be written."""
    return tmp_path / "my known_hosts"


@pytest.fixture
def start(tmp_path: Path, known: Path):
    """Starts a master on a host whose key is looked up in `known` alone."""

    def master(sshd: Sshd, host_keys: str = "known", **lines: object) -> Master:
        config = tmp_path / "config"
        config.write_text(block(sshd, **({"UserKnownHostsFile": f'"{known}"'} | lines)))
        return Master(sshd.name, ssh_config=config, host_keys=host_keys)

    return master


@pytest.fixture
def works(start):
    def run(sshd: Sshd, host_keys: str = "known", **lines: object) -> None:
        with start(sshd, host_keys, **lines) as master:
            run_seven(master)

    return run


@pytest.fixture
def refusal(start):
    def why(sshd: Sshd, host_keys: str = "known", **lines: object) -> str:
        with pytest.raises(BootstrapError, match=r"^testhost: host key: ") as caught:
            start(sshd, host_keys, **lines)
        (report,) = caught.value.hosts
        assert list(report.phases) == ["resolve", "connect"]
        return str(caught.value)

    return why


def fingerprint(public: Path) -> str:
    command = [program("ssh-keygen"), "-lf", str(public)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def other_key(folder: Path, kind: str = "ed25519") -> Path:
    """The public half of a new key."""
    path = folder / f"other_{kind}"
    command = [program("ssh-keygen"), "-q", "-t", kind, "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path.with_suffix(".pub")


def entry(sshd: Sshd, public: Path | None = None, *, marker: str = "") -> str:
    kind, blob = (public or sshd.host_key).read_text().split()[:2]
    return f"{marker}[{sshd.address}]:{sshd.port} {kind} {blob}\n"


def run_commands(text: str) -> None:
    """What the error tells to type, as who reads it would: each line that is further in and begins with a program."""
    commands = [line.strip() for line in text.splitlines() if re.match(r"\s{4,}(mkdir|echo|ssh-keygen -f) ", line)]
    assert commands
    subprocess.run("\n".join(commands), shell=True, check=True, capture_output=True)


# Unknown


def test_an_unknown_key_is_refused_with_fingerprint_and_file(ssh_host, known, refusal):
    sshd = ssh_host()
    text = refusal(sshd)
    assert fingerprint(sshd.host_key) in text
    assert str(known) in text
    assert not known.exists()


def test_the_command_in_the_error_makes_the_next_start_work(ssh_host, refusal, works):
    sshd = ssh_host()
    run_commands(refusal(sshd))
    works(sshd)


def test_the_command_makes_the_folder_too(ssh_host, tmp_path, refusal, works):
    sshd = ssh_host()
    file = tmp_path / "new" / "known_hosts"
    run_commands(refusal(sshd, UserKnownHostsFile=file))
    assert file.parent.stat().st_mode & 0o777 == 0o700
    works(sshd, UserKnownHostsFile=file)


def test_a_key_of_another_port_or_host_is_no_known_key(ssh_host, known, refusal):
    sshd = ssh_host()
    kind, blob = sshd.host_key.read_text().split()[:2]
    known.write_text(f"[127.0.0.1]:{sshd.port + 1} {kind} {blob}\n[::1]:{sshd.port} {kind} {blob}\n::1 {kind} {blob}\n")
    assert "is not known" in refusal(sshd)


def test_the_key_of_the_bare_name_will_do_for_another_port_as_it_does_for_ssh(ssh_host, known, works):
    sshd = ssh_host()
    kind, blob = sshd.host_key.read_text().split()[:2]
    known.write_text(f"127.0.0.1 {kind} {blob}\n")
    options = ["-o", f'UserKnownHostsFile="{known}"', "-o", "StrictHostKeyChecking=yes"]
    command = sshd.command("true")
    subprocess.run([command[0], *options, *command[1:]], check=True, capture_output=True)
    works(sshd)


# Known, however it is written


def test_a_hashed_entry_is_found(ssh_host, known, works):
    sshd = ssh_host()
    known.write_text(entry(sshd))
    subprocess.run([program("ssh-keygen"), "-H", "-f", str(known)], check=True, capture_output=True)
    known.with_name(known.name + ".old").unlink()
    assert known.read_text().startswith("|1|")
    works(sshd)


def test_lines_of_other_kinds_and_malformed_ones_do_not_disturb(ssh_host, known, tmp_path, works):
    sshd = ssh_host()
    authority = entry(sshd, other_key(tmp_path), marker="@cert-authority ")
    known.write_bytes(
        b"# a comment\n\n@cert-authority\nnothing\n127.0.0.1 ssh-ed25519\n127.0.0.1 ssh-ed25519 !!!\n"
        b"@unheard-of * ssh-ed25519 AAAA\n|1|broken|hash ssh-ed25519 AAAA\n\xff\xfe\x00 x y\n"
        + authority.encode()
        + entry(sshd).encode().rstrip(b"\n")
    )
    works(sshd)


def test_patterns_and_lists_of_names_are_understood(ssh_host, known, works):
    sshd = ssh_host()
    kind, blob = sshd.host_key.read_text().split()[:2]
    known.write_text(f"elsewhere,[127.0.0.?]:* {kind} {blob}\n")
    works(sshd)


def test_the_second_file_and_the_global_one_count(ssh_host, known, tmp_path, works):
    sshd = ssh_host()
    (tmp_path / "second").write_text(entry(sshd))
    works(sshd, UserKnownHostsFile=f'"{known}" {tmp_path / "second"}')
    works(sshd, GlobalKnownHostsFile=tmp_path / "second")


def test_host_key_alias_names_the_entry(ssh_host, known, works):
    sshd = ssh_host()
    kind, blob = sshd.host_key.read_text().split()[:2]
    known.write_text(f"cluster {kind} {blob}\n")
    works(sshd, HostKeyAlias="cluster")


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_of_several_key_types_the_known_one_is_asked_for(ssh_host, known, tmp_path, works, kind):
    other = other_key(tmp_path, kind)
    own = tmp_path / "testhost" / "host_key"
    sshd = ssh_host(options={"HostKey": f"{own}\nHostKey {other.with_suffix('')}"})
    known.write_text(entry(sshd, other))
    works(sshd)


# Changed and revoked


@pytest.mark.parametrize("host_keys", ["known", "accept-new"])
def test_a_changed_key_is_refused(ssh_host, known, tmp_path, refusal, host_keys):
    sshd = ssh_host()
    known.write_text("# first line\n" + entry(sshd, other_key(tmp_path)))
    before = known.read_bytes()
    text = refusal(sshd, host_keys)
    assert "attack" in text
    assert f"{known}, line 2" in text
    assert fingerprint(sshd.host_key) in text
    assert known.read_bytes() == before


def test_a_key_of_another_type_than_the_known_one_is_a_changed_key(ssh_host, known, tmp_path, refusal):
    sshd = ssh_host()
    known.write_text(entry(sshd, other_key(tmp_path, "rsa")))
    assert "attack" in refusal(sshd, "accept-new")


def test_the_commands_for_a_changed_key_make_the_next_start_work(ssh_host, known, tmp_path, refusal, works):
    sshd = ssh_host()
    known.write_text("elsewhere ssh-ed25519 AAAA\n" + entry(sshd, other_key(tmp_path)))
    run_commands(refusal(sshd))
    works(sshd)
    assert "elsewhere" in known.read_text()


@pytest.mark.parametrize("host_keys", ["known", "accept-new"])
def test_a_revoked_key_is_refused_even_where_it_is_known_too(ssh_host, known, refusal, host_keys):
    sshd = ssh_host()
    known.write_text(entry(sshd) + entry(sshd, marker="@revoked "))
    text = refusal(sshd, host_keys)
    assert "revoked" in text
    assert f"{known}, line 2" in text
    assert "echo" not in text


# accept-new


@pytest.mark.parametrize("hashed", ["no", "yes"])
def test_accept_new_records_the_key_so_that_openssh_takes_it(ssh_host, known, works, hashed, tmp_path):
    sshd = ssh_host()
    works(sshd, "accept-new", HashKnownHosts=hashed)
    assert known.read_text().startswith("|1|") == (hashed == "yes")
    assert known.stat().st_mode & 0o777 == 0o600
    strict = ["-o", "StrictHostKeyChecking=yes", "-o", f'UserKnownHostsFile="{known}"']
    subprocess.run([program("ssh"), *strict, "-F", str(tmp_path / "config"), "testhost", "true"], check=True)
    works(sshd)
    assert len(known.read_text().splitlines()) == 1


def test_accept_new_takes_what_openssh_has_recorded(ssh_host, known, works, tmp_path):
    sshd = ssh_host()
    (tmp_path / "config").write_text(block(sshd, UserKnownHostsFile=f'"{known}"'))
    accept = ["-o", "StrictHostKeyChecking=accept-new", "-F", str(tmp_path / "config")]
    subprocess.run([program("ssh"), *accept, "testhost", "true"], check=True, capture_output=True)
    before = known.read_bytes()
    works(sshd, "accept-new")
    assert known.read_bytes() == before


def test_accept_new_says_what_it_has_recorded(ssh_host, known, works, caplog):
    sshd = ssh_host()
    with caplog.at_level(logging.WARNING, "qjam"):
        works(sshd, "accept-new")
        (record,) = caplog.records
        works(sshd, "accept-new")  # known by now
    assert caplog.records == [record]
    assert (record.name, record.levelname) == ("qjam", "WARNING")
    text = record.getMessage()
    assert "testhost" in text
    assert fingerprint(sshd.host_key) in text
    assert str(known) in text


def test_several_new_hosts_are_recorded_at_once(ssh_host, known, tmp_path):
    sshds = [ssh_host(f"host{number}") for number in range(4)]
    config = tmp_path / "config"
    config.write_text("".join(block(sshd, UserKnownHostsFile=f'"{known}"') for sshd in sshds))
    with Master([sshd.name for sshd in sshds], ssh_config=config, host_keys="accept-new") as master:
        run_seven(master)
    assert sorted(known.read_text().splitlines(True)) == sorted(map(entry, sshds))


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(ssh_host, tmp_path, refusal):
    """Root may write everywhere, but not below a file."""
    (tmp_path / "file").touch()
    text = refusal(ssh_host(), "accept-new", UserKnownHostsFile=tmp_path / "file" / "known_hosts")
    assert str(tmp_path / "file" / "known_hosts") in text
    assert "Traceback" not in text
