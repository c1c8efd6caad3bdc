"""RemoteWorker: the handle for one worker, asked for by name or running."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .hosts import resolve


class WorkerStatus(NamedTuple):
    """What a RemoteWorker tells of itself."""

    state: str = "starting"
    pid: int | None = None
    route: str = ""


class RemoteWorker:
    """One worker: `RemoteWorker("alice@node1")` asks for it in `Master([...])`; `master.workers` gives those that run.

    Attributes:
        host: the host as the user wrote it.
        index: its place among the workers of that host, from 0.
        state: starting, joining, ready, suspect, lost or closed: the state of its host's node.
        pid: the process id on its host; another one after the worker has been replaced; None before it runs.
        route: how its host reaches the master: local (no ssh), direct, tunnel (a port that ssh forwards) or stdio (the
            stdin and stdout of the ssh session); empty before it runs.
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
        """Seconds for a small message to its host's node and back. Raises TimeoutError after 5 s."""
        if self._ping is None:
            raise ValueError("this RemoteWorker asks for a worker; only those of Master.workers run")
        return self._ping()

    def __repr__(self) -> str:
        status = self._status()
        route = f", {status.route}" if status.route else ""
        return f"<RemoteWorker {self.index} on {self.host}: {status.state}, pid {status.pid}{route}>"
