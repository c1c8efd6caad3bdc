"""The program qjam, however it is called: bin/qjam, `python -m qjam`, bin/qjam-run, bin/qjam-doctor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qjam

ROOT = Path(__file__).resolve().parents[2]
DOORS = {"bin/qjam": [str(ROOT / "bin" / "qjam")], "python -m qjam": ["-m", "qjam"]}
PROGRAMS = ["qjam", "qjam-run", "qjam-doctor"]

doors = pytest.mark.parametrize("door", DOORS.values(), ids=list(DOORS))


def run(*command: str, folder: Path, status: int = 0) -> tuple[str, str]:
    """Gives what a program writes to stdout and stderr; it runs in `folder`."""
    program = [sys.executable, "-W", "error", *command]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with a module and a data set."""
    (tmp_path / "mine.py").write_text("numbers = [1, 2, 3]\ndef mapfunc(params, part):\n    return sum(part)\n")
    return tmp_path


@doors
def test_qjam_run_prints_the_result(door, folder):
    assert run(*door, "run", "-w", "local", "mine", "mine.numbers", folder=folder) == ("6\n", "")


@doors
def test_qjam_doctor_prints_a_table(door, folder):
    stdout, stderr = run(*door, "doctor", "local", folder=folder)
    assert [line.split()[0] for line in stdout.splitlines()] == ["host", "local"]
    assert stderr == ""


@doors
def test_qjam_tells_its_version(door, folder):
    assert run(*door, "--version", folder=folder) == (f"{qjam.__version__}\n", "")


@doors
def test_qjam_lists_its_subcommands(door, folder):
    stdout, _ = run(*door, "--help", folder=folder)
    assert "run         Map MODULE's mapfunc" in stdout
    assert "doctor      Start qjam on hosts" in stdout


@doors
@pytest.mark.parametrize("words", [[], ["fly"], ["Run", "mine"]])
def test_without_a_subcommand_that_it_knows_qjam_lists_them_and_fails(door, words, folder):
    stdout, stderr = run(*door, *words, folder=folder, status=2)
    assert stdout == ""
    assert stderr.startswith("usage: qjam [-h] [--version] {run,doctor} ...\nqjam: error: ")
    assert all(repr(word) in stderr for word in words[:1])


@pytest.mark.parametrize("name", ["run", "doctor"])
def test_a_subcommand_names_itself_as_it_was_called(name, folder):
    for program, called in ((["bin/qjam", name], f"qjam {name}"), ([f"bin/qjam-{name}"], f"qjam-{name}")):
        command = [str(ROOT / program[0]), *program[1:]]
        stdout, _ = run(*command, "--help", folder=folder)
        assert stdout.startswith(f"usage: {called} [-h]")
        assert f"\n  {called} " in stdout.partition("options:")[2]  # the examples
        _, stderr = run(*command, "no-such.module", "*", folder=folder, status=2)
        assert stderr.startswith(f"{called}: ")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_may_be_called_through_a_link(program, folder):
    (folder / "link").symlink_to(ROOT / "bin" / program)
    stdout, _ = run("link", "--help", folder=folder)
    assert stdout.startswith(f"usage: {program} [-h]")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_what_to_do_where_packages_are_missing(program, folder):
    base = Path(sys.base_prefix, "bin", "python3")
    command = [str(base), "-S", "-I", str(ROOT / "bin" / program), "--help"]  # -S: nothing that is installed
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("No module named ")
    assert done.stderr.endswith(": run ./scripts/setup in the checkout, then . .venv/bin/activate\n")
    assert len(done.stderr.splitlines()) == 1
