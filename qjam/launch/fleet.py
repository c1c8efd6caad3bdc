"""The master's side of its ssh hosts: has a process hold each one's connection, and hears from it until the end."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import qjam_worker
from qjam.hosts import HostSpec
from qjam.report import HostReport
from qjam_worker.ipc import at_fork

from .json_lines import JsonLines

logger = logging.getLogger("qjam")

# Hosts that are being started at the same time. Each costs a process of some MB and a few hundred ms of one core.
PARALLEL = 32
# With more hosts than this their connections are spread over this many seconds a host: they may share a jump host,
# which drops logins when ten of them are under way (MaxStartups).
JITTER_FROM, JITTER = 8, 0.02
# Seconds of silence after which a node takes its master for gone. A cable that is out for 3 s must not be enough, and
# TCP may take as long again to find out that it is back.
HEARTBEAT_TIMEOUT = 15.0
# Seconds without an answer after which the host counts as lost.
SILENCE = 30.0
# Seconds for each phase as a whole: paramiko waits without a limit in places, and a login may print for ever. Bringing
# parts may take minutes on a slow link, and has a limit for each step.
PHASE_TIMEOUT = {"resolve": 90, "connect": 120, "host key": 90, "auth": 180, "python": 120, "way back": 150}
# Seconds for the processes to let go of their hosts: a node has 6 to leave (`lease` LEAVE_TIMEOUT), to kill it takes 3.
STOP_TIMEOUT = 10.0
END_TIMEOUT = 3.0  # seconds for the process that forks them to end, once they have gone

ROUTES = ("direct", "tunnel", "stdio")


class Options(NamedTuple):
    """How to reach hosts, for all of them. `addresses`: of this machine, to be tried after those that ssh shows."""

    ssh_config: Path | None = None
    accept_new: bool = False
    route: str | None = None
    addresses: Sequence[str] = ()
    memory_limit: int | None = None
    keep_data: int | None = None


class Events(Protocol):
    """What the fleet needs of the engine; called in the fleet's thread, and `lose_node` in that of `start` as well."""

    def bind(self, address: str) -> str: ...
    def lose_node(self, name: str, why: str) -> None: ...


@dataclass(eq=False)
class _Host:
    name: str
    order: dict[str, Any]
    report: HostReport
    lines: JsonLines | None = None  # while its lease process lives
    pid: int | None = None  # of that process
    welcomed: float | None = None
    starting: bool = True
    unwanted: bool = False
    forgotten: bool = False


class Fleet:
    """All ssh hosts of one master. A thread and a process that are started with the first host, and a process a host.

    What the master asks for may be asked in any thread.
    """

    def __init__(self, options: Options, engine: Events) -> None:
        self._options = options
        self._engine = engine
        self._hosts: dict[str, _Host] = {}
        self._waiting: deque[str] = deque()
        self._queued = False  # some had to wait for a place: they come one by one, without delay
        self._lock = threading.Lock()  # of `_hosts`, and of what other threads than ours change in them
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)  # the engine's loop wakes us too
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._over = ""  # why no host can be started any more
        at_fork.add(self)

    def start(self, hosts: Mapping[str, tuple[HostSpec, Mapping[str, str]]]) -> None:
        """Start a node on each host: {node name: (host, keys)}. `report` and `welcomed` tell how that goes. After
        `close` they are lost at once.
        """
        with self._lock:
            for name, (spec, keys) in hosts.items():
                self._hosts[name] = _Host(name, self._order(name, spec, keys), HostReport(spec.address))
            over = self._over
            if not over:
                self._waiting.extend(hosts)
            if not over and self._thread is None:
                thread = threading.Thread(target=self._run, name="qjam-fleet", daemon=True)
                thread.start()
                self._thread = thread
        if over:
            for name in hosts:
                self._lose(self._hosts[name], over)
        self._wake()

    def _order(self, name: str, spec: HostSpec, keys: Mapping[str, str]) -> dict[str, Any]:
        return {
            "host": spec.host,
            "user": spec.user or os.environ.get("QJAM_USER") or None,
            "port": spec.port,
            "workers": spec.workers,
            "python": spec.python or os.environ.get("QJAM_REMOTE_PYTHON") or "python3",
            "env": dict(spec.env or {}),
            "setup": spec.setup,
            "node": name,
            "keys": dict(keys),
            "heartbeat_timeout": HEARTBEAT_TIMEOUT,
            "silence": SILENCE,
            "memory_limit": self._options.memory_limit,
            "keep_data": self._options.keep_data,
            "limits": PHASE_TIMEOUT,
            "ssh_config": str(self._options.ssh_config or os.environ.get("QJAM_SSH_CONFIG") or ""),
            "accept_new": self._options.accept_new,
            "route": self._options.route,
            "addresses": list(self._options.addresses),
        }

    def let_go(self, name: str, why: str = "") -> None:
        """The node is lost: end its ssh connection and what is left there. Hosts without ssh are passed over."""
        with self._lock:
            if name in self._hosts:
                self._release(self._hosts[name])

    def forget(self, name: str) -> None:
        """Let go of a host and drop what is kept of it as soon as its connection has ended. The engine hears nothing
        of it from now on.
        """
        with self._lock:
            host = self._hosts.get(name)
            if host is None:
                return
            self._release(host)
            host.forgotten = True
            if host.lines is None:
                del self._hosts[name]

    @staticmethod
    def _release(host: _Host) -> None:
        host.unwanted = True
        if host.lines is not None:
            with contextlib.suppress(OSError):  # it has gone first
                host.lines.sock.shutdown(socket.SHUT_WR)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"!")
        except OSError:
            pass  # it is closed already, or full of wake-ups

    def report(self, name: str) -> HostReport:
        """How its start went, or goes."""
        return self._hosts[name].report

    def welcomed(self, name: str) -> float | None:
        """When (time.monotonic()) the node was told to begin; None before that."""
        host = self._hosts.get(name)
        return None if host is None else host.welcomed

    def close(self) -> None:
        """Let go of all hosts: their nodes end, if they have not, and so do the processes here."""
        with self._lock:
            self._over = self._over or "the master is closed"
            thread = self._thread
        if thread is not None:
            self._wake()
            thread.join()
        if self._process is not None and self._control is not None:
            self._control.close()
            try:
                self._process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        at_fork.discard(self)

    def abandon(self) -> None:
        """In a fork of the program: close the copies of sockets whose end is to tell of the program's end. Without the
        lock, which a thread may have held that is not in the fork.
        """
        for host in list(self._hosts.values()):
            if host.lines is not None:
                host.lines.sock.close()
        if self._control is not None:
            self._control.close()

    def _start_process(self) -> None:
        """The one that forks a process for each host; anew where somebody has killed it, which those do not mind.

        It imports the few modules that it needs, past `qjam/__init__`, which would bring all of qjam with it, and
        without `invoke`, which paramiko takes for a part of ssh_config that we read ourselves: 30 ms of 110.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if self._control is not None:
            self._control.close()
        package = Path(__file__).parent.parent
        stubs = {"qjam": [str(package)], "qjam_worker": list(qjam_worker.__path__)}
        self._control, theirs = socket.socketpair()
        program = (
            f"import sys, types; sys.path[:] = {[os.fspath(path) for path in sys.path if path]!r}\n"
            "sys.modules['invoke'] = None\n"
            f"for name, path in {stubs!r}.items():\n"
            "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = path\n"
            f"from qjam.launch.host_process import main; main({theirs.fileno()})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    # The thread

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a defect of ours: nobody may wait for hosts that nobody hears
            why = f"the fleet has failed ({type(error).__name__}: {error}); this is a defect of qjam"
            with self._lock:
                self._over = self._over or why
            for host in self._all():
                self._lose(host, why)
            raise
        finally:
            for host in self._all():
                self._close(host)

    def _all(self) -> list[_Host]:
        with self._lock:
            return list(self._hosts.values())

    def _serve(self) -> None:
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        stop: float | None = None
        while True:
            self._start_waiting()
            if self._over and stop is None:
                stop = time.monotonic() + STOP_TIMEOUT
                for host in self._all():
                    self.let_go(host.name)
            left = None if stop is None else stop - time.monotonic()
            if left is not None:
                living = [host for host in self._all() if host.lines is not None]
                if not living:
                    return
                if left <= 0:
                    _kill(living)
                    return
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._wake_read.recv(4096)
                else:
                    self._on_readable(key.data)

    def _start_waiting(self) -> None:
        while not self._over and (batch := self._next()):
            for host in batch:
                self._launch(host)

    def _next(self) -> list[_Host]:
        """Those that are to be started now, each with its delay."""
        under_way = sum(host.starting and host.lines is not None for host in self._all())
        batch: list[_Host] = []
        while self._waiting and under_way + len(batch) < PARALLEL:
            host = self._hosts.get(self._waiting.popleft())
            if host is not None and not host.unwanted:
                batch.append(host)
        crowd = under_way + len(batch)
        spread = JITTER * crowd if crowd > JITTER_FROM and not self._queued else 0.0
        self._queued = bool(self._waiting)
        for host in batch:
            host.order["delay"] = random.uniform(0.0, spread)
        return batch

    def _launch(self, host: _Host) -> None:
        try:
            self._start_process()
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._lose(host, f"this machine cannot start one more: {error.strerror} (ulimit -n)")
            return
        with theirs:
            with self._lock:
                if host.unwanted:
                    ours.close()
                    return
                host.lines = JsonLines(ours)
            self._selector.register(host.lines, selectors.EVENT_READ, host)
            assert self._control is not None
            with contextlib.suppress(OSError):  # the end of its socket tells
                socket.send_fds(self._control, [b"h"], [theirs.fileno()])
        host.lines.send(**host.order)

    def _on_readable(self, host: _Host) -> None:
        assert host.lines is not None
        try:
            messages = host.lines.receive()
        except EOFError:
            self._lose(host, "the process that held its ssh connection has ended")
            self._close(host)
            return
        for message in messages:
            self._handlers[next(iter(message))](self, host, message)

    def _on_process(self, host: _Host, message: dict[str, Any]) -> None:
        host.pid = message["process"]

    def _on_phase(self, host: _Host, message: dict[str, Any]) -> None:
        host.report.phases[message["phase"]] = message["seconds"]
        if message["phase"] == "way back":
            host.welcomed = time.monotonic()
            host.starting = False

    def _on_bind(self, host: _Host, message: dict[str, Any]) -> None:
        assert host.lines is not None
        try:
            endpoint = self._engine.bind(message["bind"])
        except OSError as error:
            host.lines.send(error=str(error))
        else:
            host.lines.send(endpoint=endpoint)

    def _on_route(self, host: _Host, message: dict[str, Any]) -> None:
        host.report.route = message["route"]

    def _on_note(self, host: _Host, message: dict[str, Any]) -> None:
        _say(message["note"])

    def _on_failed(self, host: _Host, message: dict[str, Any]) -> None:
        report = host.report
        report.stderr = message["stderr"]
        report.failed, report.why = message["failed"], message["why"]
        self._lose(host, str(report).partition(": ")[2])

    def _on_ended(self, host: _Host, message: dict[str, Any]) -> None:
        host.report.stderr = message["stderr"]
        tail = "".join(f"\n    | {line}" for line in message["stderr"])
        self._lose(host, message["ended"] + tail)

    # What a message is about is its first name.
    _handlers: ClassVar[Mapping[str, Callable[[Fleet, _Host, dict[str, Any]], None]]] = {
        "process": _on_process,
        "phase": _on_phase,
        "bind": _on_bind,
        "route": _on_route,
        "note": _on_note,
        "failed": _on_failed,
        "ended": _on_ended,
    }

    def _lose(self, host: _Host, why: str) -> None:
        host.starting = False
        if not host.report.ready and host.report.failed is None:
            host.report.failed, host.report.why = "ready" if host.welcomed else "", why
        with self._lock:
            if not host.forgotten:
                self._engine.lose_node(host.name, why)

    def _close(self, host: _Host) -> None:
        if host.lines is None:
            return
        self._selector.unregister(host.lines)
        with self._lock:
            host.lines.sock.close()
            host.lines = None
            if host.forgotten:
                del self._hosts[host.name]


def _kill(hosts: Sequence[_Host]) -> None:
    """End processes that do not end when they are told: they are stopped, perhaps. Each has a group to itself."""
    for host in hosts:
        if host.pid is not None:
            with contextlib.suppress(OSError):  # it has gone first
                os.killpg(host.pid, signal.SIGKILL)


def _say(text: str) -> None:
    """Log a warning; a filter or a handler of the user's that raises is not the end of the fleet."""
    with contextlib.suppress(Exception):
        logger.warning(text)
