"""The parties: each module here gives `party(function, workers, route)`, a context manager that holds one, ready."""

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
    """A row of the table below: its module here, and what it cannot be without."""

    module: str
    distributions: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def lacking(self) -> list[str]:
        """Give the names of what is not installed."""
        lacks = [name for name in self.imports if importlib.util.find_spec(name) is None]
        return lacks + [name for name in self.programs if shutil.which(name) is None]

    def party(self, function: str, workers: int, route: str = "local") -> AbstractContextManager[Party]:
        """Hold this party, with so many workers that compute this function of qjam_bench_work."""
        found: AbstractContextManager[Party] = self.bring_in().party(function, workers, route)
        return found

    def bring_in(self) -> ModuleType:
        """Import what it is made of."""
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
    """Give the rivals of `raw-zmq,ray`, none for `none`; the error that argparse shows for one that is not here."""
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
    """Give the rivals that are here."""
    return [name for name, rival in RIVALS.items() if not rival.lacking()]


def add_against(parser: argparse.ArgumentParser) -> None:
    """Declare --against."""
    parser.add_argument(
        "--against",
        type=against,
        default=None,
        metavar="NAME,NAME",
        help=f"of {', '.join(RIVALS)}, or none (default: those that are installed)",
    )


def chosen(names: Sequence[str] | None) -> list[str]:
    """Give the parties to measure, qjam last, for what --against gave."""
    return [*(installed() if names is None else names), OURS]
