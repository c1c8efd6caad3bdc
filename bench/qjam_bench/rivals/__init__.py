"""The parties. Each module here has `party(function, workers, route)`, a context manager that yields a ready Party.

Those of callers/ have `party(workers)`, which yields a ready Caller; those of searchers/ yield a Searcher.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

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
        found: AbstractContextManager[Party] = self.open(function, workers, route)
        return found

    def open(self, *arguments: Any) -> AbstractContextManager[Any]:
        """Call `party` of its module."""
        found: AbstractContextManager[Any] = self.bring_in().party(*arguments)
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
BY_VALUE = "qjam by value"
PARTIES = {**RIVALS, OURS: Rival("qjam", ("qjam", "numpy", "msgpack")), BY_VALUE: Rival("qjam_by_value")}
CALLERS = {
    "ProcessPoolExecutor": Rival("callers.process_pool"),
    "Pool": Rival("callers.pool"),
    "loky": Rival("callers.loky", ("loky",), ("loky",)),
    "ray": Rival("callers.ray", ("ray",), ("ray",)),
    "dask": Rival("callers.dask", ("dask", "distributed"), ("dask", "distributed")),
    "ipyparallel": Rival("callers.ipyparallel", ("ipyparallel",), ("ipyparallel",)),
    "mpi4py": Rival("callers.mpi", ("mpi4py",), ("mpi4py",), ("mpiexec",)),
    OURS: Rival("callers.qjam"),
}
SEARCHERS = {
    "serial": Rival("searchers.serial", (), ("joblib", "sklearn")),
    "loky": Rival("searchers.loky", ("joblib", "scikit-learn"), ("joblib", "sklearn")),
    "dask": Rival("searchers.dask", ("dask", "distributed"), ("dask", "distributed", "sklearn")),
    OURS: Rival("searchers.qjam", (), ("joblib", "sklearn")),
}
KINDS = {"rounds": PARTIES, "calls": CALLERS, "searches": SEARCHERS}  # what a seat can run


def against(text: str, table: Mapping[str, Rival] | None = None) -> list[str]:
    """Give the rivals of `raw-zmq,ray`; [] for `none`. ArgumentTypeError if one is unknown or not installed."""
    known = {name: rival for name, rival in (table or RIVALS).items() if name != OURS}
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)} (or none, for qjam alone)")
        if lacks := known[name].lacking():
            raise argparse.ArgumentTypeError(
                f"{name} is not installed here ({', '.join(lacks)}); "
                "./scripts/bench makes an environment that has all rivals"
            )
    return list(dict.fromkeys(names))


def installed(table: Mapping[str, Rival] | None = None) -> list[str]:
    """Give the rivals that are installed."""
    return [name for name, rival in (table or RIVALS).items() if name != OURS and not rival.lacking()]


def absent(names: Sequence[str] | None, table: Mapping[str, Rival] | None = None) -> dict[str, str]:
    """Give why a rival is left out, for each that is not installed; none if --against has named the rivals."""
    if names is not None:
        return {}
    lacks = {name: rival.lacking() for name, rival in (table or RIVALS).items() if name != OURS}
    return {name: f"not installed ({', '.join(lacking)})" for name, lacking in lacks.items() if lacking}


def add_against(parser: argparse.ArgumentParser, table: Mapping[str, Rival] | None = None) -> None:
    """Declare --against."""
    names = [name for name in table or RIVALS if name != OURS]
    parser.add_argument(
        "--against",
        type=partial(against, table=table),
        default=None,
        metavar="NAME,NAME",
        help=f"rivals, from {', '.join(names)}; or none, for qjam alone (default: all that are installed)",
    )


def chosen(names: Sequence[str] | None, table: Mapping[str, Rival] | None = None) -> list[str]:
    """Give the parties to measure: those of --against (None: all that are installed), then qjam."""
    return [*(installed(table) if names is None else names), OURS]
