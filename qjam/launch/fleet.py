"""The master's side of its ssh hosts: has a process hold each one's connection, and hears from it until the end."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import qjam_worker
from qjam.hosts import HostSpec
from qjam.report import HostReport
from qjam_worker import forks

from .lines import Lines

logger = logging.getLogger("qjam")

# Hosts that are being started at the same time. Each costs a process of some MB and a few hundred ms of one core.
PARALLEL = 32
# With more hosts than this their connections are spread over this many seconds a host: they may share a jump host,
# which drops logins when ten of them are under way (MaxStartups).
JITTER_FROM, JITTER = 8, 0.02
# Seconds of silence after which a node takes its master for gone. A cable that is out for 3 s must not be enough, and
# TCP may take as long again to find out that it is back.
LEASE = 15.0
# Seconds for each phase as a whole: paramiko waits without a limit in places, and a login may print for ever. Bringing
# parts may take minutes on a slow link, and has a limit for each step.
PHASE_TIMEOUT = {"resolve": 90, "connect": 120, "host key": 90, "auth": 180, "python": 120, "way back": 150}
STOP_TIMEOUT = 5.0  # seconds for the processes to end, once their hosts have been told

ROUTES = ("direct", "tunnel", "stdio")


class Options(NamedTuple):
    """How to reach hosts, for all of them. `addresses`: of this machine, to be tried after those that ssh shows."""

    ssh_config: Path | None = None
    accept_new: bool = False
    route: str | None = None
    addresses: Sequence[str] = ()
    memory_limit: int | None = None


class Events(Protocol):
    """What the fleet needs of the engine; called in the fleet's thread."""

    def bind(self, address: str) -> str: ...
    def lose_node(self, name: str, why: str) -> None: ...


@dataclass
class _Host:
    order: dict[str, Any]
    report: HostReport
    lines: Lines | None = None
    welcomed: float | None = None
    starting: bool = True


class Fleet:
    """All ssh hosts of one master. One thread, and a process that is started with the first host."""

    def __init__(self, options: Options, engine: Events) -> None:
        self._options = options
        self._engine = engine
        self._hosts: dict[str, _Host] = {}
        self._waiting: deque[str] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)  # the engine's loop wakes us too
        self._unwanted: deque[tuple[str, str]] = deque()  # and why
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        forks.add(self)

    def start(self, hosts: Mapping[str, tuple[HostSpec, Mapping[str, str]]]) -> None:
        """Start a node on each host, once: {node name: (host, keys)}. `report` and `welcomed` tell how that goes."""
        spread = JITTER * min(len(hosts), PARALLEL) if len(hosts) > JITTER_FROM else 0.0
        for number, (name, (spec, keys)) in enumerate(hosts.items()):
            delay = random.uniform(0.0, spread) if number < PARALLEL else 0.0  # the others come one by one anyway
            self._hosts[name] = _Host(self._order(name, spec, keys, delay), HostReport(spec.address))
        self._waiting.extend(hosts)
        self._start_process()
        self._thread = threading.Thread(target=self._run, name="qjam-fleet", daemon=True)
        self._thread.start()

    def _order(self, name: str, spec: HostSpec, keys: Mapping[str, str], delay: float) -> dict[str, Any]:
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
            "lease": LEASE,
            "memory_limit": self._options.memory_limit,
            "delay": delay,
            "limits": PHASE_TIMEOUT,
            "ssh_config": str(self._options.ssh_config or os.environ.get("QJAM_SSH_CONFIG") or ""),
            "accept_new": self._options.accept_new,
            "route": self._options.route,
            "addresses": list(self._options.addresses),
        }

    def let_go(self, name: str, why: str) -> None:
        """The node is lost: end its ssh connection and what is left there; from any thread. Hosts without ssh are
        passed over.
        """
        if name in self._hosts:
            self._unwanted.append((name, why))
            self._wake()

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
        return self._hosts[name].welcomed

    def close(self) -> None:
        """Let go of all hosts: their nodes end, if they have not, and so do the processes here."""
        self._closing.set()
        if self._thread is not None:
            self._wake()
            self._thread.join()
        if self._process is not None and self._control is not None:
            self._control.close()
            try:
                self._process.wait(STOP_TIMEOUT + 3.0)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        forks.discard(self)

    def abandon(self) -> None:
        """In a fork of the program: close the copies of sockets whose end is to tell of the program's end."""
        for host in self._hosts.values():
            if host.lines is not None:
                host.lines.sock.close()
        if self._control is not None:
            self._control.close()

    def _start_process(self) -> None:
        """It imports the few modules that it needs, past `qjam/__init__`, which would bring all of qjam with it, and
        without `invoke`, which paramiko takes for a part of ssh_config that we read ourselves: 30 ms of 110.
        """
        package = Path(__file__).parent.parent
        stubs = {"qjam": [str(package)], "qjam_worker": list(qjam_worker.__path__)}
        self._control, theirs = socket.socketpair()
        program = (
            f"import sys, types; sys.path[:] = {[os.fspath(path) for path in sys.path if path]!r}\n"
            "sys.modules['invoke'] = None\n"
            f"for name, path in {stubs!r}.items():\n"
            "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = path\n"
            f"from qjam.launch.lease import main; main({theirs.fileno()})"
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
            for name in self._hosts:
                self._lose(name, f"the fleet has failed ({type(error).__name__}: {error}); this is a defect of qjam")
            raise
        finally:
            for name in list(self._hosts):
                self._close(name)

    def _serve(self) -> None:
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        stop: float | None = None
        while True:
            self._start_waiting()
            left = None if stop is None else stop - time.monotonic()
            if self._closing.is_set() and stop is None:
                stop = time.monotonic() + STOP_TIMEOUT
                self._unwanted.extend((name, "") for name in self._hosts)
                self._end_unwanted()
                continue
            if left is not None and (left <= 0 or not any(host.lines for host in self._hosts.values())):
                return
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._wake_read.recv(4096)
                else:
                    self._on_readable(key.data)
            self._end_unwanted()

    def _end_unwanted(self) -> None:
        while self._unwanted:
            name, why = self._unwanted.popleft()
            host = self._hosts[name]
            if why and host.report.ready:
                _say(f"{host.report.host} is lost: {why}; its work goes to the others, and it does not come back")
            if host.lines is not None:
                with contextlib.suppress(OSError):  # it has gone first
                    host.lines.sock.shutdown(socket.SHUT_WR)

    def _start_waiting(self) -> None:
        while self._waiting and not self._closing.is_set():
            if sum(host.starting and host.lines is not None for host in self._hosts.values()) >= PARALLEL:
                return
            name = self._waiting.popleft()
            host = self._hosts[name]
            try:
                ours, theirs = socket.socketpair()
            except OSError as error:
                self._lose(name, f"this machine cannot start one more: {error.strerror} (ulimit -n)")
                continue
            host.lines = Lines(ours)
            self._selector.register(host.lines, selectors.EVENT_READ, name)
            with theirs:
                try:
                    assert self._control is not None
                    socket.send_fds(self._control, [b"h"], [theirs.fileno()])
                except OSError:
                    pass  # the end of its socket tells
            host.lines.send(**host.order)

    def _on_readable(self, name: str) -> None:
        host = self._hosts[name]
        assert host.lines is not None
        try:
            messages = host.lines.receive()
        except EOFError:
            self._close(name)
            self._lose(name, "the process that held its ssh connection has ended")
            return
        for message in messages:
            self._on_message(name, host, message)

    def _on_message(self, name: str, host: _Host, message: dict[str, Any]) -> None:
        report = host.report
        if "phase" in message:
            report.phases[message["phase"]] = message["seconds"]
            if message["phase"] == "way back":
                host.welcomed = time.monotonic()
                host.starting = False
        elif "bind" in message:
            assert host.lines is not None
            try:
                endpoint = self._engine.bind(message["bind"])
            except OSError as error:
                host.lines.send(error=str(error))
            else:
                host.lines.send(endpoint=endpoint)
        elif "route" in message:
            report.route = message["route"]
        elif "note" in message:
            _say(message["note"])
        elif "failed" in message:
            report.stderr = message["stderr"]
            report.failed, report.why = message["failed"], message["why"]
            self._lose(name, str(report).partition(": ")[2])
        elif "ended" in message:
            report.stderr = message["stderr"]
            tail = "".join(f"\n    | {line}" for line in message["stderr"])
            self._lose(name, message["ended"] + tail)

    def _lose(self, name: str, why: str) -> None:
        host = self._hosts[name]
        host.starting = False
        if not host.report.ready and host.report.failed is None:
            host.report.failed, host.report.why = "ready" if host.welcomed else "", why
        self._engine.lose_node(name, why)

    def _close(self, name: str) -> None:
        host = self._hosts[name]
        if host.lines is not None:
            self._selector.unregister(host.lines)
            host.lines.sock.close()
            host.lines = None


def _say(text: str) -> None:
    """Log a warning; a filter or a handler of the user's that raises is not the end of the fleet."""
    with contextlib.suppress(Exception):
        logger.warning(text)
