"""The exceptions that qjam raises. Wrong arguments raise Python's own TypeError or ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import HostReport


class QjamError(Exception):
    """Base class of all qjam exceptions."""


class BootstrapError(QjamError):
    """The node of a host did not start, or no host is left to run on. The text gives the reason for each host.

    Attributes:
        hosts: one HostReport per host if a start failed; empty if no host is left.
    """

    def __init__(self, text: str, hosts: Sequence[HostReport] = ()) -> None:
        super().__init__(text, hosts)
        self.text = text
        self.hosts = list(hosts)

    def __str__(self) -> str:
        return self.text


class MasterClosed(QjamError):
    """The master was closed before the call, or while the round was running."""


class RoundTimeout(QjamError, TimeoutError):
    """A round did not end within `timeout` seconds; its slices were cancelled."""


class TaskError(QjamError):
    """User code raised an exception in a worker. `__cause__` is that exception if it could be pickled, else None.

    Attributes:
        host: the worker's host, as the user wrote it.
        worker: the index of the worker on that host; -1 if the results were being reduced.
        slice: the index of the slice that the worker was mapping; None if it was mapping none.
        remote_traceback: the traceback in the worker, as text; may be empty.
        what: the exception in one line, such as `ZeroDivisionError: division by zero`.
    """

    def __init__(
        self, host: str, worker: int, slice: int | None, remote_traceback: str, what: str = "the task failed"
    ) -> None:
        # pickle and copy create the exception anew from these arguments.
        super().__init__(host, worker, slice, remote_traceback, what)
        self.host = host
        self.worker = worker
        self.slice = slice
        self.remote_traceback = remote_traceback
        self.what = what

    def __str__(self) -> str:
        text = f"{self.what} (in {_place(self.host, self.worker, self.slice)})"
        trace = self.remote_traceback.rstrip()
        return f"{text}\n\nTraceback in the worker:\n{trace}" if trace else text


class WorkerLost(QjamError):
    """A worker process ended or became unreachable, and no other worker could do its work.

    Attributes:
        host: the worker's host, as the user wrote it.
        worker: the index of the worker on that host.
        slice: the index of the slice that the worker was mapping; None if it was mapping none.
        how: how the process ended, such as `killed by signal 11 (SIGSEGV)`.
    """

    def __init__(self, host: str, worker: int, slice: int | None, how: str) -> None:
        super().__init__(host, worker, slice, how)
        self.host = host
        self.worker = worker
        self.slice = slice
        self.how = how

    def __str__(self) -> str:
        return f"{_place(self.host, self.worker, self.slice)}: {self.how}"


def _place(host: str, worker: int, slice: int | None) -> str:
    place = f"worker {worker} on {host}" if worker >= 0 else f"the reduction on {host}"
    return place if slice is None else f"{place}, slice {slice}"
