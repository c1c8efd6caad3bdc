"""The programs of bin/ and the demo on hosts that are reached by ssh, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import Sshd, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, ssh_host):
    """Runs a program of the checkout that may name the hosts a, b and c; gives what it prints."""
    hosts: list[Sshd] = [ssh_host(name) for name in "abc"]
    config = write_config(tmp_path / "config", hosts)

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, ROOT / program, *arguments],
            cwd=tmp_path,
            env=os.environ | {"QJAM_SSH_CONFIG": str(config), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_sum_matrix_example_on_three_hosts(run):
    printed = run("bin/sum-matrix-example.py", "a", "b", "c")
    for host in "abc":
        assert f"Started worker 0 on {host}\n" in printed
    assert printed.endswith("Computed element sum of X = 5050\n")


def test_sum_matrix_example_on_one_host_named_three_times(run):
    printed = run("bin/sum-matrix-example.py", "a", "a", "a")
    assert "Started worker 2 on a\n" in printed
    assert printed.endswith("Computed element sum of X = 5050\n")


def test_qjam_run_on_hosts(run):
    arguments = ("examples.multiply_sum", "examples.sequences.onetoten", "examples.sequences.three")
    assert run("bin/qjam-run", "-w", "a*2 b c", *arguments) == "165\n"


@pytest.mark.timeout(180)  # seconds; it takes 15 where nothing else runs
def test_the_demo_on_hosts(run, tmp_path):
    printed = run("examples/sparse_autoencoder.py", "a*2", "b", "--patches", "2000", "--iterations", "5")
    assert "learning with 3 workers" in printed
    assert (tmp_path / "filters.png").read_bytes().startswith(b"\x89PNG")
