"""The exceptions of the public face; bad arguments get Python's own TypeError and ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import HostReport


class QjamError(Exception):
    """The base of all of qjam's own exceptions."""


class BootstrapError(QjamError):
    """A host could not be made into a node, or no host is left to run on; the text says why for each host.

    Attributes:
        hosts: a HostReport for each host where it was raised while the master started; else empty.
    """

    def __init__(self, text: str, hosts: Sequence[HostReport] = ()) -> None:
        super().__init__(text, hosts)
        self.text = text
        self.hosts = list(hosts)

    def __str__(self) -> str:
        return self.text


class MasterClosed(QjamError):
    """The master was closed, before the call or while its round was running."""


class RoundTimeout(QjamError, TimeoutError):
    """A round did not end within the `timeout` (seconds) of its call; its slices have been cancelled."""


class TaskError(QjamError):
    """User code raised an exception in a worker; where that could be sent, it is the `__cause__`.

    Attributes:
        host: the name of the worker's host, as it was given to the master.
        worker: the index of the worker on that host; -1 where the results were being added up.
        slice: the index of the slice it was mapping; None where there was none.
        remote_traceback: the worker's own traceback as text; may be empty.
        what: the exception in one line, as `ZeroDivisionError: division by zero`.
    """

    def __init__(
        self, host: str, worker: int, slice: int | None, remote_traceback: str, what: str = "the task failed"
    ) -> None:
        # The arguments as they came are what pickle and copy build the exception from again.
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
    """A worker process ended, or could no longer be reached, and its work could not be given to another.

    Attributes:
        host: the name of the worker's host, as it was given to the master.
        worker: the index of the worker on that host.
        slice: the index of the slice it was mapping; None where there was none.
        how: how it ended, as `killed by signal 11 (SIGSEGV)`.
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
