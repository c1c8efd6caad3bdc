"""RemoteWorker: a request for one worker on a host, or a handle for a worker that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .hosts import resolve


class WorkerStatus(NamedTuple):
    """What `RemoteWorker` shows: the state of the node, the process id of the worker, the route."""

    state: str = "starting"
    pid: int | None = None
    route: str = ""


class RemoteWorker:
    """One worker. `Master([RemoteWorker("alice@node1")])` starts it; `master.workers` lists the workers that run.

    Attributes:
        host: the host as the user wrote it.
        index: its number among the workers of that host, from 0.
        state: the state of its host's node: starting, joining, ready, suspect (silent), lost or closed.
        pid: the process id on its host; None before it runs. It changes when the worker is replaced.
        route: how its host reaches the master: local (no ssh), direct (TCP), tunnel (a port that ssh forwards) or stdio
            (stdin and stdout of the ssh command); empty before it runs.
    """

    def __init__(
        self,
        host: str,
        index: int = 0,
        status: Callable[[], WorkerStatus] = WorkerStatus,
        ping: Callable[[], float] | None = None,
    ) -> None:
        specs = resolve(host)
        if len(specs) != 1 or specs[0].workers != 1:
            raise ValueError(f"host: {host!r} must name one host, without *workers: a RemoteWorker is one worker")
        self.spec = specs[0]
        self.host = self.spec.address
        self.index = index
        self._status = status
        self._ping = ping

    @property
    def state(self) -> str:
        """The state of its host's node now."""
        return self._status().state

    @property
    def pid(self) -> int | None:
        """The process id on its host now."""
        return self._status().pid

    @property
    def route(self) -> str:
        """How its host reaches the master."""
        return self._status().route

    def ping(self) -> float:
        """Return the seconds that a small message takes to its host's node and back. Raises TimeoutError after 5 s, and
        ValueError if this worker was not taken from `Master.workers`.
        """
        if self._ping is None:
            raise ValueError("this RemoteWorker is a request for a worker; ping those in Master.workers")
        return self._ping()

    def __repr__(self) -> str:
        status = self._status()
        route = f", {status.route}" if status.route else ""
        return f"<RemoteWorker {self.index} on {self.host}: {status.state}, pid {status.pid}{route}>"
