"""What it takes of the master to send a large data set: little memory, and each byte once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import Sshd, write_config

SIZE = 256 * 1024 * 1024
MOST = 64 * 1024 * 1024  # that the master's peak may grow by

PROGRAM = f"""
import sys
import numpy as np
from qjam import DataSet, Master

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def look(params, part):
    return float(part.sum())

with Master(sys.argv[1]) as master:
    workers = len(master.workers)
    master.run(look, 0, np.zeros(workers << 20))  # buffers are there
    data = np.arange({SIZE} // 8).astype(float)
    before = status("VmRSS")
    assert before > data.nbytes
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what there is now
    assert master.run(look, 0, DataSet(data)) == data.sum()
    grown = status("VmHWM") - before
    sent = master.stats().dataset_sent
    assert master.run(look, 1, DataSet(data)) == data.sum()
    print(grown, sent, master.stats().dataset_sent - sent)
"""


def figures(hosts: str, tmp_path: Path, **environment: str) -> tuple[int, ...]:
    """By how much the peak of a master's memory grows while it sends; bytes sent, and sent again."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), hosts],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.parametrize("workers", [1, 4])
def test_the_master_needs_little_memory_to_send_much_to_this_machine(tmp_path: Path, workers: int) -> None:
    grown, sent, again = figures(f"local*{workers}", tmp_path)
    assert grown < MOST
    assert sent >= SIZE
    assert again == 0


def test_the_master_needs_little_memory_to_send_much_to_another_host(
    tmp_path: Path,
    ssh_host: Callable[..., Sshd],
) -> None:
    config = write_config(tmp_path / "config", [ssh_host()])
    grown, sent, again = figures("testhost*4", tmp_path, QJAM_SSH_CONFIG=str(config))
    assert grown < MOST
    assert sent >= SIZE
    assert again == 0
