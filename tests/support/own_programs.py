"""Fixtures of programs that a user writes: each is run with workers on this machine and on a host that ssh reaches."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from sshd import write_config


class Place(NamedTuple):
    """Where workers are: what Master takes, and the environment of the program that makes it."""

    hosts: str
    environment: Mapping[str, str]


@pytest.fixture(params=["local", "ssh"])
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Two workers, on this machine or on a host that ssh reaches."""
    if request.param == "local":
        return Place("local*2", os.environ)
    host = request.getfixturevalue("ssh_host")("away")
    return Place("away*2", os.environ | {"QJAM_SSH_CONFIG": str(write_config(tmp_path / "config", [host]))})


@pytest.fixture
def script(hosts: Place, tmp_path: Path) -> Callable[[str], list[str]]:
    """Runs a script that may make Master(HOSTS); gives the lines that it prints."""

    def run(source: str) -> list[str]:
        (tmp_path / "script.py").write_text(f"HOSTS = {hosts.hosts!r}\n{textwrap.dedent(source)}")
        done = subprocess.run(
            [sys.executable, "-W", "error", "script.py"],
            cwd=tmp_path,
            env=hosts.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout.splitlines()

    return run
