"""The master's side of its ssh hosts: starts one host process per host, and handles its messages until it ends."""

from __future__ import annotations

import contextlib
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
from qjam.log import say
from qjam.report import HostReport
from qjam_worker.ipc import at_fork

from .json_lines import JsonLines

# Hosts that start at the same time. Each takes a process of some MB and a few hundred ms of one core.
PARALLEL = 32
# If more than JITTER_FROM hosts start, each waits a random time, up to JITTER seconds per host: they may share a jump
# host, which refuses connections while ten others log in (MaxStartups).
JITTER_FROM, JITTER = 8, 0.02
# Seconds without a heartbeat after which a node considers its master gone: more than for a cable that is unplugged for
# 3 s, and the same time again for TCP to notice that it is back.
HEARTBEAT_TIMEOUT = 15.0
# Seconds without an answer after which a host is lost.
SILENCE = 30.0
# Seconds for each phase: paramiko sometimes waits without a limit, and a login may print for ever. `bundle` may take
# minutes on a slow link; it has a limit for each step instead.
PHASE_TIMEOUT = {"resolve": 90, "connect": 120, "host key": 90, "auth": 180, "python": 120, "way back": 150}
# Seconds for all host processes to end: a node gets 6 to end by itself (LEAVE_TIMEOUT), then 3 to be killed.
STOP_TIMEOUT = 10.0
END_TIMEOUT = 3.0  # seconds for the process that forks them to end after that

ROUTES = ("direct", "tunnel", "stdio")


class Options(NamedTuple):
    """How to reach all hosts. `addresses`: more addresses of this machine, which hosts try after that of the ssh
    connection.
    """

    ssh_config: Path | None = None
    accept_new: bool = False
    route: str | None = None
    addresses: Sequence[str] = ()
    memory_limit: int | None = None
    keep_data: int | None = None


class Events(Protocol):
    """What the fleet calls in the engine: in the fleet's thread, `lose_node` also in the thread that calls `start`."""

    def bind(self, address: str) -> str: ...
    def lose_node(self, name: str, why: str) -> None: ...


@dataclass(eq=False)
class _Host:
    name: str
    order: dict[str, Any]
    report: HostReport
    lines: JsonLines | None = None  # the link to its host process; None before and after that
    pid: int | None = None  # of the host process
    welcomed_at: float | None = None
    starting: bool = True
    unwanted: bool = False  # disconnect it, or do not start it at all
    forgotten: bool = False


class Fleet:
    """All ssh hosts of one master: one host process per host, a process that forks them, a thread that serves them.

    Thread and process start with the first host. Public methods may be called in any thread.
    """

    def __init__(self, options: Options, engine: Events) -> None:
        self._options = options
        self._engine = engine
        self._hosts: dict[str, _Host] = {}
        self._waiting: deque[str] = deque()
        self._queued = False  # hosts that had to wait start one by one, so without jitter
        self._lock = threading.Lock()  # for `_hosts`, and for what other threads change in a host
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)  # the engine's loop, which must not block, wakes the fleet too
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closed_why = ""  # why no host can be started any more; empty while one can
        at_fork.add(self)

    def start(self, hosts: Mapping[str, tuple[HostSpec, Mapping[str, str]]]) -> None:
        """Start a node on each host, {node name: (host, CURVE keys)}, without waiting. After `close` all of them are
        lost at once: `Events.lose_node` is called.
        """
        with self._lock:
            for name, (spec, keys) in hosts.items():
                self._hosts[name] = _Host(name, self._order(name, spec, keys), HostReport(spec.address))
            closed_why = self._closed_why
            if not closed_why:
                self._waiting.extend(hosts)
            if not closed_why and self._thread is None:
                thread = threading.Thread(target=self._run, name="qjam-fleet", daemon=True)
                thread.start()
                self._thread = thread
        if closed_why:
            for name in hosts:
                self._lose(self._hosts[name], closed_why)
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

    def disconnect(self, name: str) -> None:
        """End a node and its ssh connection. Names of other nodes, such as the local one, are ignored."""
        with self._lock:
            if name in self._hosts:
                self._disconnect(self._hosts[name])

    def forget(self, name: str) -> None:
        """Disconnect a node, and drop its record when its host process ends. The engine hears no more of this node."""
        with self._lock:
            host = self._hosts.get(name)
            if host is None:
                return
            self._disconnect(host)
            host.forgotten = True
            if host.lines is None:
                del self._hosts[name]

    @staticmethod
    def _disconnect(host: _Host) -> None:
        host.unwanted = True
        if host.lines is not None:
            with contextlib.suppress(OSError):  # the host process has ended first
                host.lines.sock.shutdown(socket.SHUT_WR)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"!")
        except OSError:
            pass  # it is closed, or already full of wake-ups

    def report(self, name: str) -> HostReport:
        """The report of a node's start so far. Raises KeyError for an unknown or forgotten node."""
        return self._hosts[name].report

    def welcomed_at(self, name: str) -> float | None:
        """When (time.monotonic()) the node got its welcome and began to start its workers; None before that."""
        host = self._hosts.get(name)
        return None if host is None else host.welcomed_at

    def close(self) -> None:
        """Disconnect all hosts, and wait until their nodes and all processes here have ended."""
        with self._lock:
            self._closed_why = self._closed_why or "the master is closed"
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
        """In a fork of the program: close the copies of sockets, because host processes end when these are closed. The
        lock is not taken: a thread that is missing in the fork may hold it.
        """
        for host in list(self._hosts.values()):
            if host.lines is not None:
                host.lines.sock.close()
        if self._control is not None:
            self._control.close()

    def _start_process(self) -> None:
        """Start the process that forks the host processes, or start it again if somebody has killed it.

        It skips `qjam/__init__`, which would import all of qjam, and `invoke`, which paramiko imports for a part of
        ssh_config that `qjam.ssh.config` reads: 30 ms of 110.
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

    # The fleet's thread

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a defect of qjam: nobody must wait for these hosts
            why = f"the fleet has failed ({type(error).__name__}: {error}); this is a defect of qjam"
            with self._lock:
                self._closed_why = self._closed_why or why
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
            if self._closed_why and stop is None:
                stop = time.monotonic() + STOP_TIMEOUT
                for host in self._all():
                    self.disconnect(host.name)
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
        while not self._closed_why and (batch := self._next()):
            for host in batch:
                self._launch(host)

    def _next(self) -> list[_Host]:
        """Return the hosts to start now, each with its delay."""
        starting = sum(host.starting and host.lines is not None for host in self._all())
        batch: list[_Host] = []
        while self._waiting and starting + len(batch) < PARALLEL:
            host = self._hosts.get(self._waiting.popleft())
            if host is not None and not host.unwanted:
                batch.append(host)
        count = starting + len(batch)
        spread = JITTER * count if count > JITTER_FROM and not self._queued else 0.0
        self._queued = bool(self._waiting)
        for host in batch:
            host.order["delay"] = random.uniform(0.0, spread)
        return batch

    def _launch(self, host: _Host) -> None:
        try:
            self._start_process()
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._lose(host, f"this machine cannot start one more host process: {error.strerror} (ulimit -n)")
            return
        with theirs:
            with self._lock:
                if host.unwanted:
                    ours.close()
                    return
                host.lines = JsonLines(ours)
            self._selector.register(host.lines, selectors.EVENT_READ, host)
            assert self._control is not None
            with contextlib.suppress(OSError):  # it has ended: `host.lines` will be closed
                socket.send_fds(self._control, [b"h"], [theirs.fileno()])
        host.lines.send(**host.order)

    def _on_readable(self, host: _Host) -> None:
        assert host.lines is not None
        try:
            messages = host.lines.receive()
        except EOFError:
            self._lose(host, "its host process, which held the ssh connection, has ended")
            self._close(host)
            return
        for message in messages:
            self._handlers[next(iter(message))](self, host, message)

    def _on_process(self, host: _Host, message: dict[str, Any]) -> None:
        host.pid = message["process"]

    def _on_phase(self, host: _Host, message: dict[str, Any]) -> None:
        host.report.phases[message["phase"]] = message["seconds"]
        if message["phase"] == "way back":
            host.welcomed_at = time.monotonic()
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
        say(message["note"])

    def _on_failed(self, host: _Host, message: dict[str, Any]) -> None:
        report = host.report
        report.stderr = message["stderr"]
        report.failed, report.why = message["failed"], message["why"]
        self._lose(host, str(report).partition(": ")[2])

    def _on_ended(self, host: _Host, message: dict[str, Any]) -> None:
        host.report.stderr = message["stderr"]
        tail = "".join(f"\n    | {line}" for line in message["stderr"])
        self._lose(host, message["ended"] + tail)

    # A message is of the kind that its first key names.
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
            host.report.failed, host.report.why = "ready" if host.welcomed_at else "", why
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
    """Kill host processes that do not end, because somebody stopped them perhaps. Each leads a process group."""
    for host in hosts:
        if host.pid is not None:
            with contextlib.suppress(OSError):  # it has ended first
                os.killpg(host.pid, signal.SIGKILL)
