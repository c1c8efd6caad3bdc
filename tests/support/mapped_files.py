"""Fixtures of mapped files: import those that a test uses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qjam_worker.ipc.files import Files


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    made = Files.make([str(tmp_path)])
    yield made
    made.remove()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(where)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mount: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def names(files: Files) -> list[str]:
    return sorted(name for directory in files.directories for name in os.listdir(directory))
