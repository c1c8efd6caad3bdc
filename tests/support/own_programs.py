"""A fixture of programs that a user writes: each is run with workers on this machine and on a host that ssh reaches."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from sshd import write_config


@pytest.fixture(params=["local", "ssh"])
def script(request, tmp_path):
    """Runs a script that may make Master(HOSTS), which has two workers; gives the lines that it prints."""
    hosts, environment = "local*2", os.environ
    if request.param == "ssh":
        host = request.getfixturevalue("ssh_host")("away")
        environment = environment | {"QJAM_SSH_CONFIG": str(write_config(tmp_path / "config", [host]))}
        hosts = "away*2"

    def run(source: str) -> list[str]:
        (tmp_path / "script.py").write_text(f"HOSTS = {hosts!r}\n{textwrap.dedent(source)}")
        done = subprocess.run(
            [sys.executable, "-W", "error", "script.py"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout.splitlines()

    return run
