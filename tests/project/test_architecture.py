"""Imports run in the one direction that docs/architecture.md draws; this reads them from the source."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from source_tree import FOLDERS, MAX_LINES, MODULES, circle, imports, long_files, module_imports

# Each room (a folder, or a file at the root of its package) and the rooms whose modules it may import besides its own.
# A package alone (`qjam`) stands for its `__init__`: the public face.
LAYERS = {
    "qjam": "qjam.executor qjam.pool qjam.master qjam.remote_worker qjam.data qjam.errors qjam.hosts qjam.report "
    "qjam.stats qjam_worker.task",
    "qjam.__main__": "qjam qjam.cli",
    "qjam.cli": "qjam qjam.hosts qjam.report",
    "qjam.calls": "qjam.outcome qjam.engine qjam.dispatch qjam.code qjam.errors qjam_worker.values",
    "qjam.joblib": "qjam.executor qjam.master qjam.arguments qjam_worker.adapters",
    "qjam.pool": "qjam.executor qjam.master qjam_worker.adapters",
    "qjam.executor": "qjam.master qjam.serial qjam.calls qjam_worker.adapters",
    "qjam.closing": "qjam.calls qjam.outcome qjam.launch qjam.engine",
    "qjam.master": "qjam.closing qjam.calls qjam.remote_worker qjam.arguments qjam.launch qjam.outcome qjam.serial "
    "qjam.engine qjam.dispatch qjam.data qjam.code qjam.hosts qjam.errors qjam.report qjam.stats qjam.log "
    "qjam_worker.importing qjam_worker.ipc qjam_worker.values qjam_worker.wire qjam_worker.worker",
    "qjam.outcome": "qjam.launch qjam.engine qjam.dispatch qjam.code qjam.hosts qjam.errors qjam.log "
    "qjam_worker.values",
    "qjam.serial": "qjam.engine qjam.dispatch qjam.hosts qjam.stats qjam_worker.task qjam_worker.values "
    "qjam_worker.worker",
    "qjam.arguments": "qjam.launch qjam.data qjam.hosts qjam.remote_worker qjam_worker.ipc",
    "qjam.remote_worker": "qjam.hosts",
    "qjam.launch": "qjam.engine qjam.dispatch qjam.ssh qjam.hosts qjam.errors qjam.report qjam.log "
    "qjam_worker qjam_worker.node qjam_worker.ipc qjam_worker.wire",
    "qjam.engine": "qjam.dispatch qjam.data qjam.errors qjam.stats qjam_worker.ipc qjam_worker.values qjam_worker.wire "
    "qjam_worker.worker",
    "qjam.dispatch": "qjam.data qjam_worker.values qjam_worker.wire",
    "qjam.data": "qjam_worker.ipc qjam_worker.values",
    "qjam.code": "qjam.log qjam_worker.importing qjam_worker.values",
    "qjam.ssh": "",
    "qjam.errors": "qjam.report",
    "qjam.hosts": "",
    "qjam.report": "",
    "qjam.stats": "",
    "qjam.log": "",
    "qjam_worker": "",
    "qjam_worker.stdio_node": "qjam_worker.__main__ qjam_worker.node qjam_worker.wire",
    "qjam_worker.__main__": "qjam_worker.node qjam_worker.ipc qjam_worker.wire",
    "qjam_worker.node": "qjam_worker.worker qjam_worker.ipc qjam_worker.values qjam_worker.wire",
    "qjam_worker.worker": "qjam_worker.task qjam_worker.importing qjam_worker.ipc qjam_worker.values",
    "qjam_worker.adapters": "qjam_worker.ipc",
    "qjam_worker.task": "",
    "qjam_worker.importing": "",
    "qjam_worker.ipc": "qjam_worker.values",
    "qjam_worker.values": "",
    "qjam_worker.wire": "",
    "qjam_bench": "",
    "qjam_bench.cli": "qjam_bench.experiments qjam_bench.harness qjam_bench.ends qjam",
    "qjam_bench.experiments": "qjam_bench.rivals qjam_bench.harness qjam_bench.ends qjam",
    "qjam_bench.rivals": "qjam_bench.harness qjam_bench.ends qjam qjam.joblib",
    "qjam_bench.harness": "qjam_bench.ends qjam qjam.hosts",
    "qjam_bench.ends": "",
}
# One part of the benchmark plays a part of qjam: `scale` (with its swarm and links) plays nodes around the dispatcher.
PLAYERS = {
    "qjam_bench.experiments.scale": "qjam.data qjam.dispatch qjam_worker.values qjam_worker.wire",
    "qjam_bench.experiments.swarm": "qjam.dispatch qjam_worker.values qjam_worker.wire",
    "qjam_bench.experiments.links": "qjam.engine qjam_worker.values qjam_worker.wire",
}
# Which modules may import a package that is not python's own. cloudpickle is used on a host only where it is installed.
USERS = {
    "zmq": "qjam.engine.router qjam_worker.__main__ qjam_worker.node.node qjam_worker.wire.sockets qjam_bench",
    "paramiko": "qjam.ssh.connection qjam.ssh.identities qjam.launch.remote_command",
    "xxhash": "qjam",
    "cloudpickle": "qjam qjam_worker.values",
    "msgpack": "qjam qjam_worker",
    "msgpack_numpy": "qjam_worker.values.numpy_payload",
    "numpy": "qjam qjam_worker qjam_bench",
    "joblib": "qjam.joblib",
    "threadpoolctl": "qjam_worker.adapters",
}
RIVALS = {"dask", "distributed", "ipyparallel", "joblib", "loky", "mpi4py", "ray"}
# What the benchmarks are made of besides; two modules of qjam_bench.ends are found by its programs beside them.
BENCHMARKS = RIVALS | {"matplotlib", "scipy", "sklearn", "examples", "loops", "qjam_bench_work"}


def room(name: str) -> str:
    """Gives the row of LAYERS that a module belongs to."""
    return ".".join(name.split(".")[:2])


def within(name: str, allowed: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed.split())


def is_right(name: str, target: str, typing_only: bool) -> bool:
    """Tells whether a module may import another one."""
    top = target.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if top in FOLDERS:
        rooms = f"{LAYERS[room(name)]} {PLAYERS.get(name, '')}".split()
        return room(target) in rooms or (room(target) == room(name) and "." in name)
    if name.startswith("qjam_bench") and top in BENCHMARKS:
        return True
    return top in USERS and (typing_only or within(name, USERS[top]))


def wrong_arrows(name: str, path: Path) -> list[str]:
    """Gives a line for each import that points the wrong way."""
    return [f"{name} imports {target}" for target, typing in imports(name, path) if not is_right(name, target, typing)]


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_in_one_direction(name: str) -> None:
    assert room(name) in LAYERS, f"{name} has no place in the order of imports"
    assert wrong_arrows(name, MODULES[name]) == []


def test_the_layers_have_no_circle() -> None:
    assert circle({name: below.split() for name, below in LAYERS.items()}) == []


def test_the_modules_of_a_room_have_no_circle() -> None:
    assert circle(module_imports()) == []


def test_a_circle_is_told_in_the_direction_of_its_imports() -> None:
    found = circle({"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": [], "user": ["a"]})
    assert set(itertools.pairwise(found)) == {("a", "b"), ("b", "c"), ("c", "a")}
    assert circle({"a": ["a"]}) == ["a", "a"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_a_file_is_long_beyond_the_limit(tmp_path: Path) -> None:
    fits, long = tmp_path / "fits.py", tmp_path / "long.py"
    fits.write_text("1\n" * MAX_LINES)
    long.write_text("1\n" * (MAX_LINES + 1))
    assert list(long_files([fits, long])) == [(long, MAX_LINES + 1)]


def test_every_row_is_in_use() -> None:
    assert {room(name) for name in MODULES} == set(LAYERS)
    assert set(PLAYERS) <= set(MODULES)


def test_the_bundle_imports_without_qjam_and_does_not_load_it() -> None:
    bundle = [name for name in MODULES if name.startswith("qjam_worker") and not name.endswith("__main__")]
    program = f"import importlib, sys\nfor name in {bundle}: importlib.import_module(name)\n"
    program += "sys.exit('qjam' in sys.modules)"
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(FOLDERS["qjam_worker"].parent)})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("qjam.dispatch.dispatcher", "import zmq"),
        ("qjam.dispatch.dispatcher", "from ..engine import engine"),
        ("qjam.dispatch.dispatcher", "from ..code.user_code import Sources"),
        ("qjam.dispatch.liveness", "from .. import log"),
        ("qjam.log", "from . import errors"),
        ("qjam.data.datasets", "from .. import hosts"),
        ("qjam.data.datasets", "from qjam.hosts import parse"),
        ("qjam.data.datasets", "import qjam"),
        ("qjam.data.datasets", "from qjam_worker.wire import frames"),
        ("qjam.errors", "from qjam_worker.wire import frames"),
        ("qjam.engine.engine", "from ..launch import fleet"),
        ("qjam.engine.engine", "from ..launch.supervisor import Supervisor"),
        ("qjam.engine.engine", "def f():\n    from qjam.launch.fleet import Fleet"),
        ("qjam.engine.pending", "import zmq"),
        ("qjam.launch.supervisor", "from ..master import Master"),
        ("qjam.launch.supervisor", "import zmq"),
        ("qjam.launch.supervisor", "import paramiko"),
        ("qjam.ssh.config", "import paramiko"),
        ("qjam.ssh.connection", "from ..launch.relay import send"),
        ("qjam.master", "from qjam_worker.node.node import Node"),
        ("qjam.master", "import pandas"),
        ("qjam.master", "from qjam_bench import cli"),
        ("qjam.master", "from .cli import run"),
        ("qjam.cli.run", "from qjam.engine.engine import Engine"),
        ("qjam.master", "import ray"),
        ("qjam.executor", "import joblib"),
        ("qjam.master", "from .executor import Executor"),
        ("qjam_bench.experiments.rounds", "import pandas"),
        ("qjam_bench.experiments.rounds", "from qjam.engine.engine import Engine"),
        ("qjam_bench.rivals.qjam", "from qjam.engine.engine import Engine"),
        ("qjam_bench.harness.plots", "from ..experiments.autoencoder import measure"),
        ("qjam_worker.values.codec", "import qjam.errors"),
        ("qjam_worker.values.codec", "from ..wire.frames import pack"),
        ("qjam_worker.values.flat", "from ..ipc.files import Files"),
        ("qjam_worker.ipc.mailbox", "from ..wire import frames"),
        ("qjam_worker.worker.worker", "import zmq"),
        ("qjam_worker.worker.worker", "from ..wire import sockets"),
        ("qjam_worker.worker.worker", "from ..node.store import Store"),
        ("qjam_worker.node.scheduler", "import zmq"),
        ("qjam_worker.node.node", "import paramiko"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, name: str, line: str) -> None:
    source = tmp_path / "module.py"
    source.write_text(line)
    assert len(wrong_arrows(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("qjam.engine.router", "import zmq, time\nfrom ..dispatch.dispatcher import Dispatch"),
        ("qjam.launch.fleet", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zmq"),
        ("qjam.launch.fleet", "from . import bundle\nfrom ..hosts import HostSpec\nfrom qjam_worker.node import node"),
        ("qjam.ssh.connection", "import paramiko.transport"),
        ("qjam.launch.supervisor", "from ..engine.engine import Engine\nfrom . import fleet\nfrom ..log import say"),
        ("qjam.__main__", "import qjam\nfrom .cli import doctor, run"),
        ("qjam.cli.doctor", "import qjam\nfrom qjam.hosts import resolve\nimport numpy"),
        ("qjam.master", "from .engine.engine import Engine\nfrom .launch.supervisor import Supervisor"),
        ("qjam.joblib", "import joblib\nfrom .executor import Executor"),
        ("qjam.dispatch.dispatcher", "from qjam_worker.values.reduction import Tree\nfrom .rounds import Job"),
        ("qjam_bench.experiments.rounds", "from qjam import Master\nfrom ..rivals import turns\nimport ray, zmq"),
        ("qjam_worker.node.node", "from ..wire import frames\nfrom ..values.codec import decode\nimport zmq"),
    ],
)
def test_a_right_arrow_is_let_through(tmp_path: Path, name: str, line: str) -> None:
    source = tmp_path / "module.py"
    source.write_text(line)
    assert wrong_arrows(name, source) == []
