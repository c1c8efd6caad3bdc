"""Run the tests on each python that qjam supports: `nox`, or `nox -p 3.13 -- -k codec`."""

from __future__ import annotations

import os
import shutil
import subprocess

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

nox.needs_version = ">=2024.3.2"
nox.options.default_venv_backend = "venv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # a python that is not here is skipped, and nox says so

# pyenv puts a python3.x on PATH for each version that it has, but starts only those that this variable names.
if "PYENV_VERSION" not in os.environ and shutil.which("pyenv"):
    listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True)
    os.environ["PYENV_VERSION"] = ":".join(reversed(listed.stdout.split()))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests as ./scripts/test does; arguments after -- go to pytest."""
    session.run("./scripts/system-parts", external=True)
    session.install("--editable", ".[examples,dev]")
    everyday = {"PYENV_VERSION": None}  # in the tests python3 is the one that a user gets
    session.run("python", "-m", "pytest", "-n", "3", "--dist", "loadfile", *session.posargs, env=everyday)
