"""Map a function over data that stays cached on your machines, reduce the results, send only what changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qjam_worker.task import Task, current_task

from .data.datasets import BaseDataSet, DataSet, ListDataSet, NumpyMatrixDataSet, NumpyMatrixFileDataSet
from .errors import BootstrapError, MasterClosed, QjamError, RoundTimeout, TaskError, WorkerLost
from .hosts import HostSpec
from .master import Master
from .remote_worker import RemoteWorker
from .report import HostReport
from .stats import Stats

if TYPE_CHECKING:
    from .executor import Executor
    from .pool import Pool

__version__ = "0.1.0"

__all__ = [
    "BaseDataSet",
    "BootstrapError",
    "DataSet",
    "Executor",
    "HostReport",
    "HostSpec",
    "ListDataSet",
    "Master",
    "MasterClosed",
    "NumpyMatrixDataSet",
    "NumpyMatrixFileDataSet",
    "Pool",
    "QjamError",
    "RemoteWorker",
    "RoundTimeout",
    "Stats",
    "Task",
    "TaskError",
    "WorkerLost",
    "current_task",
]


def __getattr__(name: str) -> Any:
    """Executor and Pool import multiprocessing, which most programs do without."""
    if name not in ("Executor", "Pool"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{name.lower()}", __name__), name)
    return value
