"""The wheel and the sdist, built as a clean clone would build them, hold both packages and work elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import qjam

ROOT = Path(__file__).parents[2]
NOT_CLONED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Gives what a command prints; fails with all of it when the command fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def files(folder: Path, *below: str) -> set[str]:
    """Gives the files below some folders of `folder`, relative to it."""
    return {
        path.relative_to(folder).as_posix()
        for name in below
        for path in (folder / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the tree (clone/), its sdist, and a wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "clone", ignore=NOT_CLONED)
    # Without isolation nothing is downloaded: setuptools is among the requirements of the tests.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=folder / "clone")
    return folder


def test_the_wheel_holds_exactly_the_two_packages(built: Path) -> None:
    with zipfile.ZipFile(only(built, "qjam-*.whl")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name and ".data/" not in name}
    clone = built / "clone"
    assert names == files(clone, "qjam") | files(clone / "worker_bundle", "qjam_worker")


def test_the_wheel_installs_every_program_of_bin(built: Path) -> None:
    with zipfile.ZipFile(only(built, "qjam-*.whl")) as wheel:
        scripts = {Path(name).name for name in wheel.namelist() if ".data/scripts/" in name}
    programs = {path.name for path in (built / "clone" / "bin").glob("qjam*")}
    assert scripts == programs - {"qjam-bench"}  # which needs bench/ of a checkout


def test_the_sdist_holds_what_a_clone_holds(built: Path) -> None:
    with tarfile.open(only(built, "qjam-*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"LICENSE", "README.md", "noxfile.py", "pyproject.toml", "setup.cfg"}
    wanted |= files(built / "clone", "qjam", "worker_bundle", "bench", "bin", "examples", "scripts", "tests")
    assert wanted - names == set()


def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """Only qjam is installed anew; what it depends on is taken from the environment of the tests."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "install",
        "--quiet",
    )
    run(*pip, "--no-deps", "--no-index", only(built, "qjam-*.whl"), cwd=tmp_path)
    program = "import qjam, qjam_worker; print(qjam.__file__, qjam_worker.__file__)"
    dependencies = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    found = run(python, "-c", program, cwd=tmp_path, env=dependencies).split()
    assert [Path(name).is_relative_to(tmp_path) for name in found] == [True, True], found
    programs = python.parent
    assert run(programs / "qjam", "--version", cwd=tmp_path, env=dependencies) == f"{qjam.__version__}\n"
    for name in ("qjam-run", "qjam-doctor"):
        assert run(programs / name, "--help", cwd=tmp_path, env=dependencies).startswith(f"usage: {name} ")
