"""Imports run in the one direction that DESIGN.md draws; this reads them from the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"qjam": ROOT / "qjam", "qjam_worker": ROOT / "worker_bundle" / "qjam_worker"}
STANDARD = sys.stdlib_module_names

# Each module of qjam (a package stands for all that is in it) and what of the two packages it may import:
#   bin, examples -> master -> members -> {launch | engine} -> dispatch -> {claims, giving, idle, silence}
#   -> roster -> {rounds, placement, alarms, transfers, states}
#   -> errors, qjam_worker.{wire, codec, reducing}
# source (a module, a function -> what is shipped) sits beside dispatch, output (what workers print) and notes apart.
GROUND = {
    "qjam.errors",
    "qjam.report",
    "qjam_worker.wire",
    "qjam_worker.codec",
    "qjam_worker.flat",
    "qjam_worker.reducing",
}
DATA = {"qjam.dataset", "qjam.hosts", "qjam.infile"}
DECISIONS = {
    "qjam.dispatch",
    "qjam.claims",
    "qjam.giving",
    "qjam.idle",
    "qjam.silence",
    "qjam.roster",
    "qjam.rounds",
    "qjam.placement",
    "qjam.alarms",
    "qjam.transfers",
    "qjam.states",
    "qjam.commands",
    "qjam.source",
}
ALLOWED = {
    "qjam.report": set[str](),
    "qjam.errors": {"qjam.report"},  # for the type checker
    "qjam.notes": set[str](),
    "qjam.calls": set[str](),
    "qjam.output": set[str](),
    "qjam.hosts": GROUND,
    "qjam.infile": GROUND | {"qjam_worker.infile"},
    "qjam.dataset": GROUND | {"qjam.infile", "qjam_worker.infile"},
    "qjam.source": GROUND | DATA,
    "qjam.states": GROUND,
    "qjam.commands": GROUND,
    "qjam.placement": set[str](),
    "qjam.rounds": {"qjam_worker.reducing", "qjam.states", "qjam.infile"},
    "qjam.transfers": GROUND | {"qjam.commands"},
    "qjam.alarms": set[str](),
    "qjam.roster": {"qjam.rounds", "qjam.states", "qjam.transfers"},
    "qjam.claims": GROUND | {"qjam.roster", "qjam.rounds", "qjam.transfers"},
    "qjam.giving": GROUND | {"qjam.commands", "qjam.placement", "qjam.roster", "qjam.rounds"},
    "qjam.idle": {"qjam.alarms", "qjam.roster", "qjam.rounds", "qjam.states"},
    "qjam.silence": GROUND | {"qjam.commands", "qjam.roster", "qjam.states"},
    "qjam.dispatch": GROUND | DECISIONS - {"qjam.source"},
    "qjam.pending": GROUND | {"qjam.commands", "qjam.rounds"},
    "qjam.loading": GROUND | {"qjam.pending"},
    "qjam.router": GROUND | {"qjam_worker.link"},
    "qjam.guests": GROUND | {"qjam_worker.link"},
    "qjam.signals": set[str](),
    "qjam.turns": set[str](),
    "qjam.engine": GROUND
    | DECISIONS
    | {"qjam.calls", "qjam.pending", "qjam.loading", "qjam.router", "qjam.guests", "qjam.signals", "qjam.turns"}
    | {"qjam_worker.link", "qjam_worker.waiting"},
    "qjam.launch": {"qjam.hosts", "qjam.report", "qjam.notes", "qjam_worker"},  # it starts the bundle
    "qjam.members": GROUND | {"qjam.hosts", "qjam.states", "qjam.engine", "qjam.launch", "qjam.notes"},
    "qjam.checks": GROUND | DATA | {"qjam.launch"},
    "qjam.master": GROUND
    | DATA
    | DECISIONS
    | {"qjam.pending", "qjam.checks", "qjam.engine", "qjam.launch", "qjam.members", "qjam.output"},
    "qjam": GROUND | DATA | {"qjam.pending", "qjam.master"},  # the face: names alone
    # The face, as any other program (FACE_USERS), and for `scale` what decides.
    "qjam.bench": GROUND | DECISIONS - {"qjam.source"} | {"qjam.hosts", "qjam.router"},
}
# One module of a package, which alone may import more: it plays the Master on a link that no Master gives.
BESIDES = {"qjam.bench.rivals.plain": {"qjam.engine", "qjam.pending", "qjam.source"}}
THIRD_PARTY = {
    "qjam": {"cloudpickle", "msgpack", "numpy", "paramiko", "xxhash", "zmq"},
    "qjam_worker": {
        "cloudpickle",
        "msgpack",
        "numpy",
        "zmq",
    },  # cloudpickle only where the host happens to have it
}
FACE_USERS = {"qjam.bench"}
# What the benchmarks are made of besides; two modules of qjam.bench.ends are found by its programs beside them.
RIVALS = {"dask", "distributed", "ipyparallel", "joblib", "mpi4py", "ray"}
BENCHMARKS = RIVALS | {"matplotlib", "scipy", "examples", "loops", "qjam_bench_work"}
# sshconfig reads ssh_config with it where there is no ssh to ask.
ONLY_USERS = {
    "zmq": {"qjam.engine", "qjam.router", "qjam.bench"},
    "paramiko": {"qjam.launch.ssh", "qjam.launch.keys", "qjam.launch.session"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """Yields the name and file of every module of both packages."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Yields (absolute name, is it for the type checker only) of each import, wherever it stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base, node in typing_only


def room(name: str) -> str:
    """Gives the row of ALLOWED that a module of qjam belongs to."""
    return ".".join(name.split(".")[:2])


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def wrong_arrows(name: str, path: Path) -> list[str]:
    """Gives a line for each import that points the wrong way."""
    package = name.partition(".")[0]
    wrong = []
    for target, typing_only in imports(name, path):
        top = target.partition(".")[0]
        if top in STANDARD:
            continue
        if top in FOLDERS:
            fine = (
                top == package
                if package == "qjam_worker"
                else room(target) == room(name) != "qjam"
                or within(target, (ALLOWED[room(name)] | BESIDES.get(name, set())) - {"qjam"})
                or (target == "qjam" and room(name) in FACE_USERS)
            )
        else:
            fine = top in THIRD_PARTY[package] or (room(name) == "qjam.bench" and top in BENCHMARKS)
            if package == "qjam" and top in ONLY_USERS and not typing_only:
                fine = within(name, ONLY_USERS[top])
        if not fine:
            wrong.append(f"{name} imports {target}")
    return wrong


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_in_one_direction(name: str) -> None:
    assert name.startswith("qjam_worker") or room(name) in ALLOWED, f"{name} has no place in the order of imports"
    assert wrong_arrows(name, MODULES[name]) == []


def test_the_bundle_imports_without_qjam_and_does_not_load_it() -> None:
    bundle = [name for name in MODULES if name.startswith("qjam_worker") and not name.endswith("__main__")]
    program = f"import importlib, sys\nfor name in {bundle}: importlib.import_module(name)\n"
    program += "sys.exit('qjam' in sys.modules)"
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(FOLDERS["qjam_worker"].parent)})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("qjam.dispatch", "import zmq"),
        ("qjam.dispatch", "from . import engine"),
        ("qjam.dispatch", "from .source import ship"),
        ("qjam.rounds", "from .dispatch import Dispatch"),
        ("qjam.placement", "from .rounds import Job"),
        ("qjam.roster", "from .giving import shares"),
        ("qjam.idle", "from .dispatch import Dispatch"),
        ("qjam.alarms", "from .roster import Roster"),
        ("qjam.notes", "from . import errors"),
        ("qjam.dataset", "from . import hosts"),
        ("qjam.dataset", "from qjam.hosts import parse"),
        ("qjam.dataset", "import qjam"),
        ("qjam.errors", "from qjam_worker import wire"),
        ("qjam.engine", "from .launch import local"),
        ("qjam.engine", "from .members import Members"),
        ("qjam.members", "from .dispatch import Dispatch"),
        ("qjam.members", "from .master import Master"),
        ("qjam.engine", "def f():\n    from qjam.launch.local import start"),
        ("qjam.launch.local", "import zmq"),
        ("qjam.launch.local", "import paramiko"),
        ("qjam.launch.local", "from ..engine import Engine"),
        ("qjam.launch.local", "from .. import master"),
        ("qjam.launch.fleet", "from ..members import Members"),
        ("qjam.launch.fleet", "from ..dispatch import Dispatch"),
        ("qjam.master", "from qjam_worker.node import Node"),
        ("qjam.master", "import pandas"),
        ("qjam.master", "from .bench import cli"),
        ("qjam.master", "import ray"),
        ("qjam.bench.rounds", "import pandas"),
        ("qjam.bench.rounds", "from qjam.engine import Engine"),
        ("qjam.bench.rivals.qjam", "from qjam.engine import Engine"),
        ("qjam_worker.codec", "import qjam.errors"),
        ("qjam_worker.node", "import paramiko"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, name: str, line: str) -> None:
    source = tmp_path / "module.py"
    source.write_text(line)
    assert len(wrong_arrows(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("qjam.engine", "import zmq, time\nfrom .dispatch import Dispatcher"),
        ("qjam.launch.local", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zmq"),
        (
            "qjam.launch.local",
            "from . import bundle\nfrom ..hosts import HostSpec\nfrom qjam_worker import node",
        ),
        ("qjam.launch.ssh", "import paramiko.transport"),
        ("qjam.members", "from .engine import Engine\nfrom .launch import local\nfrom .notes import say"),
        ("qjam.master", "from .engine import Engine\nfrom .launch.local import start\nfrom .members import Members"),
        (
            "qjam.dispatch",
            "from qjam_worker.reducing import Tree\nfrom .errors import QjamError\nfrom .rounds import Job",
        ),
        ("qjam.bench.rounds", "from qjam import Master\nfrom . import turns\nimport ray, zmq"),
        ("qjam_worker.node", "from . import wire\nfrom .codec import decode\nimport zmq"),
    ],
)
def test_a_right_arrow_is_let_through(tmp_path: Path, name: str, line: str) -> None:
    source = tmp_path / "module.py"
    source.write_text(line)
    assert wrong_arrows(name, source) == []
