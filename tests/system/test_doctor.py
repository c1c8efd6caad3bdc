"""bin/qjam-doctor: hosts that work and hosts that do not, as a user would look at them."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from needs import need
from ssh_hosts import home  # noqa: F401
from sshd import Sshd, private_sshd, sshd_works

DOCTOR = Path(__file__).resolve().parents[2] / "bin" / "qjam-doctor"
HEADINGS = ["host", "resolve", "connect", "host key", "auth", "python", "bundle", "way back", "ready"]
HEADINGS += ["route", "workers", "version", "ping ms", "MB/s"]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Sshd]:
    """A host that works, and in its ssh_config names for others that do not."""
    need(sshd_works())
    folder = tmp_path_factory.mktemp("sshd")
    with private_sshd(folder, home=home) as sshd:
        works = sshd.config.read_text()
        with sshd.config.open("a") as config:
            config.write(works.replace("testhost", "refused", 1).replace(f"Port {sshd.port}", "Port 1"))
            config.write(works.replace("testhost", "stranger", 1).replace(str(sshd.known_hosts), str(folder / "new")))
            host_key = str(sshd.host_key.with_suffix(""))  # a key, but of nobody whom the host lets in
            config.write(works.replace("testhost", "locked", 1).replace(str(sshd.identity), host_key))
        yield sshd


def doctor(*arguments: str, config: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(DOCTOR), *arguments]
    if config is not None:
        command += ["--ssh-config", str(config)]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)


def rows(text: str) -> dict[str, dict[str, str]]:
    """The cells of each host by heading."""
    lines = text.split("\n\n")[0].splitlines()
    assert re.split(r" {2,}", lines[0]) == HEADINGS
    return {line.split()[0]: dict(zip(HEADINGS, line.split(), strict=True)) for line in lines[1:]}


def test_a_host_that_works(sshd):
    done = doctor("testhost*2", config=sshd.config)
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = rows(done.stdout).values()
    assert row["host"] == "testhost"
    assert all(float(row[phase]) >= 0 for phase in HEADINGS[1:9])
    assert (row["route"], row["workers"]) == ("direct", "2")
    assert re.fullmatch(r"3\.\d+\.\d+", row["version"])
    assert 0 <= float(row["ping ms"]) < 5000
    assert float(row["MB/s"]) > 0


@pytest.mark.parametrize("route", ["direct", "tunnel", "stdio"])
def test_the_route_can_be_chosen(sshd, route):
    done = doctor("testhost", "--route", route, config=sshd.config)
    assert done.returncode == 0
    assert rows(done.stdout)["testhost"]["route"] == route


def test_hosts_that_fail_are_told_apart_and_do_not_keep_the_others_from_being_measured(sshd):
    done = doctor("refused", "stranger", "testhost", "nowhere.invalid", "locked", "local*2", config=sshd.config)
    assert (done.returncode, done.stderr) == (1, "")
    table = rows(done.stdout)
    failed = {
        host: [heading for heading, cell in row.items() if cell == "failed"]
        for host, row in table.items()
        if row["MB/s"] == "-"
    }
    assert failed == {
        "refused": ["connect"],
        "stranger": ["host key"],
        "nowhere.invalid": ["resolve"],
        "locked": ["auth"],
    }
    assert table["testhost"]["route"] == "direct"
    assert (table["local"]["route"], table["local"]["workers"]) == ("local", "2")
    reasons = done.stdout.partition("\n\n")[2]
    assert "refused: connect: 127.0.0.1 port 1: Connection refused" in reasons
    assert "stranger: host key: its host key is not known" in reasons
    assert ">> " + str(sshd.known_hosts.parent.parent / "new") in reasons
    assert "locked: auth: no key lets" in reasons
    assert "host_key is not accepted" in reasons


def test_a_host_without_the_python_that_is_asked_for(sshd):
    done = doctor("testhost", config=sshd.config, QJAM_REMOTE_PYTHON="python4")
    assert done.returncode == 1
    assert rows(done.stdout)["testhost"]["python"] == "failed"
    assert "testhost: python: 'python4' was not found there" in done.stdout
    assert "    | " in done.stdout.splitlines()[-1]


def test_a_new_host_key_is_accepted_if_that_is_wanted(sshd, tmp_path):
    known, config = tmp_path / "known_hosts", tmp_path / "ssh_config"
    config.write_text(sshd.config.read_text().replace(str(sshd.known_hosts), str(known)))
    done = doctor("testhost", "--accept-new", config=config)
    assert done.returncode == 0
    assert "its key was not known and has been accepted" in done.stderr
    assert len(known.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "wrong",
    [[], ["testhost*none"], ["local", "--route", "pigeon"], ["local", "--ssh-config", "/nowhere/config"], ["local*0"]],
)
def test_wrong_arguments(wrong):
    done = doctor(*wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert wrong[-1:] == [] or wrong[-1] in done.stderr


# On a terminal


def on_a_terminal(*arguments: str, stderr: bool, **variables: str) -> str:
    """What the doctor writes to a terminal, as stdout or as stderr."""
    ours, theirs = pty.openpty()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {"stderr" if stderr else "stdout": theirs}
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm"} | variables
    command = [sys.executable, str(DOCTOR), *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, **streams) as process:
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 65536):
                said += data
        except OSError:  # so a terminal tells that nobody has it open any more
            pass
    os.close(ours)
    assert process.returncode == 0
    return said.decode()


def test_the_table_is_coloured_on_a_terminal():
    assert "\033[32mlocal\033[0m" in on_a_terminal("local", stderr=False)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_may_refuse_colour(variables):
    text = on_a_terminal("local", stderr=False, **variables)
    assert "local" in text
    assert "\033" not in text


def test_there_is_no_colour_and_no_progress_where_there_is_no_terminal():
    done = doctor("local")
    assert "\033" not in done.stdout
    assert done.stderr == ""


def test_a_terminal_shows_what_is_awaited_and_is_left_clean():
    text = on_a_terminal("local", stderr=True)
    assert "starting 1 host" in text
    assert "measuring local (1 of 1 host" in text
    assert text.endswith("\r\033[K")
