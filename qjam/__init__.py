"""Map a function over data that stays cached on your machines, reduce the results, send only what changes."""

from qjam_worker.task import Task, current_task

from .data.datasets import BaseDataSet, DataSet, ListDataSet, NumpyMatrixDataSet, NumpyMatrixFileDataSet
from .errors import BootstrapError, MasterClosed, QjamError, RoundTimeout, TaskError, WorkerLost
from .executor import Executor
from .hosts import HostSpec
from .master import Master
from .pool import Pool
from .remote_worker import RemoteWorker
from .report import HostReport
from .stats import Stats

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
