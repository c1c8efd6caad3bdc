"""The parties. Each module here has `party(function, workers, route)`, a context manager that yields a ready Party."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import NamedTuple

from qjam_bench.harness.party import Party


class Rival(NamedTuple):
    """A row of RIVALS: its module here, and the packages, imports and programs that it needs."""

    module: str
    distributions: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def lacking(self) -> list[str]:
        """Give the names of what is not installed."""
        lacks = [name for name in self.imports if importlib.util.find_spec(name) is None]
        return lacks + [name for name in self.programs if shutil.which(name) is None]

    def party(self, function: str, workers: int, route: str = "local") -> AbstractContextManager[Party]:
        """A context manager that yields this party with `workers` workers. `function`: a name of qjam_bench_work."""
        found: AbstractContextManager[Party] = self.bring_in().party(function, workers, route)
        return found

    def bring_in(self) -> ModuleType:
        """Import its module, and with it the rival itself."""
        return importlib.import_module(f"{__name__}.{self.module}")


OURS = "qjam"
RIVALS = {
    "raw-zmq": Rival("raw_zmq", ("pyzmq",)),
    "mpi4py": Rival("mpi", ("mpi4py",), ("mpi4py",), ("mpiexec",)),
    "ray": Rival("ray", ("ray",), ("ray",)),
    "dask": Rival("dask", ("dask", "distributed"), ("dask", "distributed")),
    "ipyparallel": Rival("ipyparallel", ("ipyparallel",), ("ipyparallel",)),
    "joblib": Rival("joblib", ("joblib",), ("joblib",)),
    "pool": Rival("pool"),
}
PARTIES = {**RIVALS, OURS: Rival("qjam", ("qjam", "numpy", "msgpack"))}


def against(text: str) -> list[str]:
    """Give the rivals of `raw-zmq,ray`; [] for `none`. ArgumentTypeError if one is unknown or not installed."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in RIVALS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(RIVALS)} (or none, for qjam alone)")
        if lacks := RIVALS[name].lacking():
            raise argparse.ArgumentTypeError(
                f"{name} is not installed here ({', '.join(lacks)}); "
                "./scripts/bench makes an environment that has all rivals"
            )
    return list(dict.fromkeys(names))


def installed() -> list[str]:
    """Give the rivals that are installed."""
    return [name for name, rival in RIVALS.items() if not rival.lacking()]


def add_against(parser: argparse.ArgumentParser) -> None:
    """Declare --against."""
    parser.add_argument(
        "--against",
        type=against,
        default=None,
        metavar="NAME,NAME",
        help=f"rivals, from {', '.join(RIVALS)}; or none, for qjam alone (default: all that are installed)",
    )


def chosen(names: Sequence[str] | None) -> list[str]:
    """Give the parties to measure: those of --against (None: all that are installed), then qjam."""
    return [*(installed() if names is None else names), OURS]
