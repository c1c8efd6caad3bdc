"""What some tests need of the machine besides python, and what becomes of them where it is lacking.

pytest is imported by `need` alone: benchmarks use tests/support/sshd.py too, which looks for its programs here.
"""

from __future__ import annotations

import os
import shutil


def need(lacking: str) -> None:
    """Skips the test if something is lacking; with CI=true in the environment fails it. "" is nothing."""
    import pytest

    if not lacking:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, where every test has to run: {lacking}", pytrace=False)
    pytest.skip(lacking)


def program(name: str) -> str | None:
    """The absolute path of a program, also where the PATH of an ordinary user does not lead."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def lacking_programs(*names: str) -> str:
    """Gives "" or tells which of these programs are not here."""
    lacks = [name for name in names if program(name) is None]
    return f"not installed: {', '.join(lacks)} (scripts/system-parts sees to it)" if lacks else ""
