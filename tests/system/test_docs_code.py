"""The code of the pages in docs/ that show programs: each page runs as one program, and prints what its comments say.

A comment at the end of a line that prints is what it prints. The hosts node1 and node2 are reached by ssh.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import write_config

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["concurrent-futures.md", "joblib.md", "multiprocessing-pool.md"]


def code(page: str) -> str:
    """Gives the python of a page, at the lines where it stands there."""
    inside, lines = False, []
    for line in (DOCS / page).read_text().splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines) + "\n"


def expected(source: str) -> list[str]:
    """Gives what the comments of a program say that it prints."""
    return re.findall(r"print\b.*\)  # (.+)$", source, re.MULTILINE)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_prints_what_it_says(page, tmp_path, ssh_host):
    config = write_config(tmp_path / "config", [ssh_host(name) for name in ("node1", "node2")])
    source = code(page)
    (tmp_path / "page.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-W", "error", "page.py"],
        cwd=tmp_path,
        env=os.environ | {"QJAM_SSH_CONFIG": str(config), "QJAM_REMOTE_PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=140,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected(source)
    assert len(expected(source)) >= 3
