"""The host process: holds the ssh connection to one host, starts the node, relays for it if necessary, and exchanges
heartbeats with it.

It is a separate process, because a master in C code may hold the GIL for a minute, and because a relay in a busy
python is several times slower. It is forked from a process that has imported paramiko, and ends when its master does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import shlex
import signal
import socket
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from qjam.hosts import HASH_SEED
from qjam.report import PHASES
from qjam.ssh.connection import Connection, Refused, SSHException, connect, kill_proxies
from qjam_worker.wire.stdio_frames import HEARTBEAT, Frames, frame

from . import bundle, relay, wheels
from .json_lines import JsonLines
from .remote_command import RemoteCommand, run_beside

# Seconds
HEARTBEAT_INTERVAL = 2.0
PYTHON_TIMEOUT = 60.0  # for a login shell, its start files and python, perhaps on a slow network disk
BUNDLE_TIMEOUT = 120.0  # to unpack and import, after everything has arrived
PROBE_TIMEOUT = 1.5  # for a SYN and one repetition of it
TUNNEL_TIMEOUT = 10.0  # for a probe through the tunnel: if there is a tunnel, it answers
LEAVE_TIMEOUT = 6.0  # for a node to end after its stdin was closed, from the last time it sent something
KILL_TIMEOUT = 3.0  # for the command that kills a node

STDOUT_LINES = 5  # the last lines that a login printed, for the error if python did not start
PIECE = 1 << 20  # bytes read from a file at a time

# Kills a node. Arguments: its pid, and when that process began (field 22 of /proc/pid/stat, counted from the end of
# the name, which may contain spaces). Its children may be stopped too: continued, the fork server ends by itself.
# The text has no newline, apostrophe or exclamation mark, so that it passes through any login shell.
KILL = (
    'read -r stat <"/proc/$1/stat" && set -- "$1" "$2" ${stat##*) } && test "${22}" = "$2" || exit 1; '
    "node=$1; forked=; for file in /proc/[0-9]*/stat; do "
    'read -r stat <"$file" && set -- ${stat##*) } && test "$2" = "$node" && forked="$forked ${stat%% *}"; '
    "done 2>/dev/null; kill -KILL $node; kill -CONT $forked"
)


def _numbers(version: str, count: int) -> tuple[int, ...]:
    """Return the first `count` numbers of a version: (3, 1) for two of `3.1.0rc1`."""
    return tuple(int(number) if number.isdecimal() else 0 for number in version.split(".")[:count])


# The oldest versions that a node works with. A host with an older one gets ours, which comes first on its sys.path. An
# older cloudpickle may not read what this machine's version has pickled.
MIN_VERSIONS = {
    "numpy": (1, 21),
    "pyzmq": (22,),
    "msgpack": (1, 0),
    "msgpack-numpy": (0, 4, 8),
    "cloudpickle": _numbers(metadata.version("cloudpickle"), 2),
}
PURE_PYTHON = ("cloudpickle", "msgpack_numpy")  # without compiled libraries: may be unpacked where none can be loaded


def main(control_fd: int) -> NoReturn:
    """Fork a host process for each socket that arrives on the control socket. When that closes, wait for them all."""
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    payload = Payload()
    gc.freeze()  # else the garbage collector would write to the pages that the forked processes share
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            break
        if os.fork() == 0:
            control.close()
            os.setpgid(0, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            HostProcess(JsonLines(socket.socket(fileno=fds[0])), payload).run()
        os.close(fds[0])
    try:
        os.wait()
    except ChildProcessError:
        pass
    os._exit(0)


class Payload:
    """What is sent to every host. It is made once, before the forks."""

    def __init__(self) -> None:
        self.bundle = bundle.build()
        self.bootstrap = Path(__file__).with_name("bootstrap.py").read_bytes()


class HostProcess:
    """One host, from the first packet of the connection to the last."""

    def __init__(self, master: JsonLines, payload: Payload) -> None:
        self.master = master
        self.payload = payload
        self.answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()  # from the master
        self.connection: Connection | None = None
        self.command: RemoteCommand | None = None
        self.node: list[int] | None = None  # its pid, and when it began
        self.killing = threading.Lock()
        self.phase_began = self.last_heard = time.monotonic()
        self.watchdog: threading.Timer | None = None
        self.welcomed = False
        self.limits: dict[str, float] = {}

    def run(self) -> NoReturn:
        """Start the node and exchange heartbeats until it ends. Any failure is reported to the master."""
        try:
            self.master.send(process=os.getpid())
            while not (orders := self.master.receive()):
                pass  # a long message arrives in pieces
            (order,) = orders
            threading.Thread(target=self._listen, name="qjam-master", daemon=True).start()
            self._run(order)
        except Refused as error:
            self.master.send(failed=error.phase, why=str(error), stderr=[*error.stderr, *self._stderr()])
        except EOFError:
            pass
        except BaseException as error:  # noqa: BLE001  a defect of qjam, which the user must see
            import traceback

            self.master.send(failed="", why=f"{error!r}\n{traceback.format_exc()}", stderr=self._stderr())
        finally:
            try:
                self._kill_node()
                if self.connection is not None:
                    self.connection.close()
            finally:
                os._exit(0)

    def _run(self, order: dict[str, Any]) -> None:
        time.sleep(order["delay"])
        self.limits = order["limits"]
        self._begin_phase("resolve")
        config = Path(order["ssh_config"]) if order["ssh_config"] else None
        self.connection = connect(
            order["host"], order["user"], order["port"], config, order["accept_new"], self._end_phase
        )
        for note in self.connection.notes:
            self.master.send(note=note)
        facts = self._start_bootstrap(self.connection, order)
        assert self.command is not None
        workers = order["workers"] or facts["facts"]["cores"]
        self._send_parts(self.command, facts, workers)
        route, endpoint = self._find_route(self.connection, self.command, order["route"])
        welcome = {name: order[name] for name in ("node", "keys", "heartbeat_timeout", "memory_limit", "keep_data")}
        self._on_received()
        self.welcomed = True
        self.command.send_message(welcome={**welcome, "workers": workers, "endpoint": endpoint}, stdio=route == "stdio")
        uplink = None
        if route == "stdio":  # from here on both directions carry frames
            uplink = relay.StdioUplink(self.command.channel, self._bind("127.0.0.1"), self.command.sending)
        self.master.send(route=route)
        self._end_phase("way back")
        self._exchange_heartbeats(self.command, uplink, order["silence"])

    # The master

    def _listen(self) -> None:
        """Read what the master sends. When the master ends, end the node, then this process."""
        try:
            while True:
                for message in self.master.receive():
                    self.answers.put(message)
        except EOFError:
            pass
        if self.command is not None and self.welcomed:
            # In a thread: this blocks while the connection is full.
            threading.Thread(target=self.command.end_input, daemon=True).start()
            time.sleep(max(0.0, self.last_heard + LEAVE_TIMEOUT - time.monotonic()))
            self._kill_node()
        self._leave()

    def _end_phase(self, name: str) -> None:
        self.master.send(phase=name, seconds=time.monotonic() - self.phase_began)
        self._begin_phase(PHASES[PHASES.index(name) + 1])

    def _begin_phase(self, name: str) -> None:
        self.phase_began = time.monotonic()
        if self.watchdog is not None:
            self.watchdog.cancel()
            self.watchdog = None
        if limit := self.limits.get(name):
            self.watchdog = threading.Timer(limit, self._overdue, (name, limit))
            self.watchdog.daemon = True
            self.watchdog.start()

    def _overdue(self, name: str, limit: float) -> None:
        self.master.send(failed=name, why=f"it was not over after {limit:.0f} s", stderr=[])
        self._kill_node()
        self._leave()

    def _leave(self) -> NoReturn:
        kill_proxies()
        os.killpg(0, signal.SIGKILL)  # also a pip that may be running
        os._exit(0)

    def _kill_node(self) -> None:
        """Kill the node unless it has ended with status 0: a stopped process notices neither missing heartbeats nor a
        closed stdin. Its fork server then kills the workers and removes the files. Usually a host gets one exec; this
        is the only exception.
        """
        with self.killing:  # a second caller waits for the first
            node, self.node = self.node, None
            if node is None or self.connection is None or self.command is None or self.command.ended_well:
                return
            line = f"exec /bin/sh -c {shlex.quote(KILL)} qjam {node[0]} {node[1]}"
            run_beside(self.connection.transport, line, KILL_TIMEOUT)

    def _bind(self, address: str) -> str:
        """Ask the master to bind its ROUTER to `address`. Returns the endpoint. Raises OSError."""
        self.master.send(bind=address)
        answer = self.answers.get()
        if "endpoint" not in answer:
            raise OSError(answer["error"])
        return str(answer["endpoint"])

    def _stderr(self) -> list[str]:
        return [] if self.command is None else self.command.stderr()

    # The bootstrap

    def _start_bootstrap(self, connection: Connection, order: dict[str, Any]) -> dict[str, Any]:
        source, python = self.payload.bootstrap, order["python"]
        loader = f'import sys;s=sys.stdin.buffer;exec(compile(s.read({len(source)}),"bootstrap","exec"));main(s)'
        # eval, because the line may end with ; or a comment. The echo shows that the setup did not fail.
        set_up = f"qjam {os.urandom(12).hex()}"
        setup = f"eval {shlex.quote(order['setup'])} && echo {set_up} && " if order["setup"] else ""
        # The fork server of the workers is forked from this python.
        seed = order["env"].get(HASH_SEED)
        seeded = "" if seed is None else f"env {HASH_SEED}={shlex.quote(seed)} "
        line = f"{setup}exec {seeded}{python} -c {shlex.quote(loader)}"
        command = self.command = RemoteCommand(connection.transport, line, PYTHON_TIMEOUT)
        marker = f"qjam {os.urandom(12).hex()}"
        try:
            command.send(source)
            command.send_message(marker=marker, env=order["env"], ways=self._direct_ways(connection, order))
        except OSError:
            pass  # the command has ended; its output says why
        printed = command.skip_to(marker.encode() + b"\n", "python")
        if printed is not None and order["setup"] and set_up.encode() not in printed:
            why = f"the setup line `{order['setup']}` failed there ({command.ending()}){_last_lines(printed)}"
            raise Refused("python", why)
        if printed is not None:
            raise Refused("python", _why_no_python(command, python, printed.rpartition(set_up.encode())[2]))
        facts = command.receive_message("python")
        self.node = facts["process"]
        self._end_phase("python")
        return facts

    def _direct_ways(self, connection: Connection, order: dict[str, Any]) -> dict[str, Any]:
        """Return the addresses of this machine for the host to try: our end of the ssh connection, then `address=`."""
        addresses = []
        if order["route"] in (None, "direct"):
            if connection.local:
                with contextlib.suppress(OSError):  # not our address, if something redirects connections
                    addresses.append(_host_and_port(self._bind(connection.local)))
            for address in order["addresses"]:
                host, port = _host_and_port(address)
                try:
                    endpoint = self._bind(address if port else host)
                except OSError:  # an address of the router that forwards to this machine
                    if not port:
                        self.master.send(note=f"address {host!r} is not an address of this machine: it needs a port")
                        continue
                    endpoint = self._bind(f"0.0.0.0:{port}")
                addresses.append((host, _host_and_port(endpoint)[1]))
        return {"addresses": addresses, "seen": connection.direct, "timeout": PROBE_TIMEOUT}

    def _send_parts(self, command: RemoteCommand, facts: dict[str, Any], workers: int) -> None:
        """Send the bundle and the packages that the host lacks, and wait until it has imported them."""
        lacks = [
            name for name, oldest in MIN_VERSIONS.items() if not _new_enough(facts["facts"]["has"].get(name), oldest)
        ]
        own = self.payload.bundle
        descriptions = [{"name": "the worker bundle", "id": own.hash, "unpacked": 4 * len(own.data), "native": False}]
        content: list[bytes | Path] = [own.data]
        sums = [(len(own.data), own.hash)]
        if lacks:
            try:
                for part in wheels.provide(lacks, _host_facts(facts["facts"])):
                    native = not part.name.startswith(PURE_PYTHON)
                    descriptions.append({"name": part.name, "id": part.id, "unpacked": part.unpacked, "native": native})
                    content.append(part.path)
                    sums.append((part.size, part.sha256))
            except ValueError as error:
                raise Refused("bundle", str(error)) from error
        for description, (size, sha256) in zip(descriptions, sums, strict=True):
            description.update(size=size, sha256=sha256)
        try:
            command.send_message(parts=descriptions, workers=workers)
            for description, source in zip(descriptions, content, strict=True):
                if description["id"] not in facts["cached"]:
                    _send_part(command, source)
        except OSError:
            pass  # the bootstrap has failed; its message is read next
        command.channel.settimeout(BUNDLE_TIMEOUT)
        command.receive_message("bundle")
        self._end_phase("bundle")

    # The way back

    def _find_route(self, connection: Connection, command: RemoteCommand, wanted: str | None) -> tuple[str, str]:
        """Return the route and the endpoint that the node connects to (empty for stdio: the relay has its own)."""
        answer = command.receive_message("way back")
        tried = [*answer["tried"]]
        if answer["way"] is not None:
            return "direct", _endpoint(*answer["way"])
        if wanted in (None, "tunnel"):
            port, why = self._forward(connection)
            if port:
                command.send_message(
                    ways={"addresses": [["127.0.0.1", port]], "seen": False, "timeout": TUNNEL_TIMEOUT}
                )
                answer = command.receive_message("way back")
                if answer["way"] is not None:
                    return "tunnel", _endpoint(*answer["way"])
                why = "; ".join(answer["tried"])
            tried.append(f"a tunnel: {why}")
        if wanted in (None, "stdio"):
            return "stdio", ""
        raise Refused("way back", f"the host does not reach this machine: {'; '.join(tried) or 'nothing to try'}")

    def _forward(self, connection: Connection) -> tuple[int, str]:
        """Let ssh forward a port of the host's loopback to the ROUTER. Returns the port, or 0 and the reason."""
        endpoint = self._bind("127.0.0.1")

        def on_connection(channel: Any, origin: Any, server: Any) -> None:
            relay.join(channel, endpoint, self._on_received)

        try:
            return connection.transport.request_port_forward("127.0.0.1", 0, on_connection), ""
        except (SSHException, OSError, EOFError) as error:
            return 0, str(error)

    # Heartbeats

    def _exchange_heartbeats(
        self, command: RemoteCommand, uplink: relay.StdioUplink | None, silence: float
    ) -> NoReturn:
        """Send heartbeats, and read their echoes and the bytes to relay, until the node ends."""
        frames, why = Frames(), ""
        self._on_received()
        command.channel.settimeout(HEARTBEAT_INTERVAL)
        heartbeat = b"\n" if uplink is None else frame(HEARTBEAT, b"\n")
        threading.Thread(target=_send_heartbeats, args=(command, heartbeat), name="qjam-heartbeat", daemon=True).start()
        while True:
            command.stderr()
            if time.monotonic() - self.last_heard > silence:
                why = f"no sign of life for {silence:.0f} s"
                break
            try:
                data = command.channel.recv(relay.READ)
            except TimeoutError:
                continue
            except (OSError, EOFError):
                data = b""
            if not data:
                break
            self._on_received()
            if uplink is not None:
                try:
                    for stream, piece in frames.feed(data):
                        if stream != HEARTBEAT:
                            uplink.put(piece)
                except OSError:
                    why = "the master has closed the connection"
                    break
        why = why or f"it has ended: {command.ending()}"
        self.master.send(ended=why, stderr=command.stderr())
        raise EOFError

    def _on_received(self) -> None:
        """The host has sent something. Any byte counts, because an echo may wait behind megabytes of data."""
        self.last_heard = time.monotonic()


def _send_heartbeats(command: RemoteCommand, heartbeat: bytes) -> None:
    """Runs in a thread: if the connection is full this blocks, and somebody must still read what arrives."""
    try:
        while True:
            command.send(heartbeat, patient=True)
            time.sleep(HEARTBEAT_INTERVAL)
    except OSError:
        pass  # the command has ended; whoever reads its output notices


def _why_no_python(command: RemoteCommand, python: str, printed: bytes) -> str:
    """Say why python did not start. The last lines that the login printed are the best explanation."""
    status, lines = command.exit_status(), _last_lines(printed)
    if status == 127 or "not found" in lines or any("not found" in line for line in command.stderr()):
        return (
            f"'{python}' was not found there (exit status {status}); install python3, or name another one with "
            f"python=... or QJAM_REMOTE_PYTHON{lines}"
        )
    return f"'{python}' did not start there ({command.ending()}){lines}"


def _last_lines(printed: bytes) -> str:
    last = printed.decode(errors="replace").strip().splitlines()[-STDOUT_LINES:]
    return "".join(f"\n    > {line}" for line in last)


def _send_part(command: RemoteCommand, source: bytes | Path) -> None:
    if isinstance(source, bytes):
        command.send(source)
        return
    with open(source, "rb") as file:
        while piece := file.read(PIECE):
            command.send(piece)


def _host_facts(facts: dict[str, Any]) -> wheels.HostFacts:
    major, minor = facts["python"]
    return wheels.HostFacts((major, minor), facts["implementation"], facts["soabi"], facts["machine"], facts["libc"])


def _new_enough(version: str | None, oldest: tuple[int, ...]) -> bool:
    """Whether the host has the package (None: no) and its version (empty: unknown) is not known to be too old."""
    return version is not None and (not version or _numbers(version, len(oldest)) >= oldest)


def _host_and_port(address: str) -> tuple[str, int]:
    """Split `tcp://1.2.3.4:5`, `name`, `1.2.3.4:5`, `::1` or `[::1]:5`. Without a port return 0 for it."""
    address = address.removeprefix("tcp://")
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        return address.strip("[]"), 0
    return host.strip("[]"), int(port)


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
