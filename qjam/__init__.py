"""Map a function over data that stays cached on your machines, reduce the results, send only what changes."""

from .dataset import BaseDataSet, DataSet, ListDataSet, NumpyMatrixDataSet, NumpyMatrixFileDataSet
from .errors import (
    BootstrapError,
    MasterClosed,
    ProtocolError,
    QjamError,
    RoundTimeout,
    TaskError,
    WorkerLost,
)
from .hosts import HostSpec
from .master import Master, RemoteWorker
from .pending import Stats
from .report import HostReport

__all__ = [
    "BaseDataSet",
    "BootstrapError",
    "DataSet",
    "HostReport",
    "HostSpec",
    "ListDataSet",
    "Master",
    "MasterClosed",
    "NumpyMatrixDataSet",
    "NumpyMatrixFileDataSet",
    "ProtocolError",
    "QjamError",
    "RemoteWorker",
    "RoundTimeout",
    "Stats",
    "TaskError",
    "WorkerLost",
]
