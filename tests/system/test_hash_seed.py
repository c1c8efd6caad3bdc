"""hash(text), and the order of a set of texts, on all workers of a master: one PYTHONHASHSEED."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import gather
import nodecode
import pyzmq_garbage  # noqa: F401
from qjam import HostSpec, Master
from ssh_hosts import home, ssh_host  # noqa: F401


@pytest.fixture(autouse=True)
def _none_is_set(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


def seen(master):
    """What a worker's hash of a text is, and the variable, of all workers."""
    return {found[:2] for found in master.run(gather, nodecode.hash_of_a_text)}


def expected(seed):
    """What the hash is in a python that is started with this seed."""
    variables = {**os.environ, "PYTHONHASHSEED": seed}
    return int(subprocess.check_output([sys.executable, "-c", "print(hash('qjam'))"], env=variables))


def test_all_workers_have_one_seed_here_and_on_hosts_and_after_a_restart(ssh_host):
    with Master(["local*2", "testhost*2"], ssh_config=ssh_host().config) as master:
        (one,) = seen(master)
        os.kill(
            master.run(gather, nodecode.hash_of_a_text)[0][2], signal.SIGKILL
        )  # the fork server of this machine's workers
        assert seen(master) == {one}
    with Master(1) as master:
        assert seen(master) != {one}


def test_the_users_own_seed_wins(ssh_host, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    hosts = ["local*2", HostSpec("testhost", workers=2)]
    with Master(hosts, ssh_config=ssh_host().config) as master:
        assert seen(master) == {(expected("5"), "5")}


def test_that_of_a_host_wins_over_both(ssh_host, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    with Master(HostSpec("testhost", env={"PYTHONHASHSEED": "6"}), ssh_config=ssh_host().config) as master:
        assert seen(master) == {(expected("6"), "6")}
