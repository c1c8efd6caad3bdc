"""The process that holds one host's ssh connection: it starts the node, relays for it where need be, keeps its lease.

A process of its own, because a master may be in C code for a minute with the GIL held, and because a relay in a busy
python is several times slower. It is forked from a warm one that has paramiko imported, and ends with its master.
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

from qjam.report import PHASES
from qjam.ssh.connection import Connection, Refused, SSHException, connect, kill_proxies
from qjam_worker.wire.stdio_frames import HEARTBEAT, Frames, frame

from . import bundle, relay, wheels
from .json_lines import JsonLines
from .remote_command import RemoteCommand, run_beside

BEAT = 2.0  # seconds between the signs of life that a node gets, and answers
PYTHON_TIMEOUT = 60.0  # seconds for a login shell, its start files and python; the disk may be a sleepy network one
BUNDLE_TIMEOUT = 120.0  # to unpack and import, once everything is there
PROBE_TIMEOUT = 1.5  # for a SYN and one repetition of it
TUNNEL_TIMEOUT = 10.0  # for a probe through the tunnel, which answers or does not exist
LEAVE_TIMEOUT = 6.0  # from its last sign of life on, for a node to stop everything once its stdin has ended
KILL_TIMEOUT = 3.0  # for the command that kills it
STDOUT_LINES = 5  # of what a login printed that did not come to python
PIECE = 1 << 20

# Passes through any login shell: no newline, apostrophe or exclamation mark. Its arguments are the pid of the node and
# when that process began: field 22 of its stat, counted from the end of its name, in which there may be spaces. What
# the node has forked, its warm parent above all, may be stopped with it: once it goes on, it ends by itself.
KILL = (
    'read -r stat <"/proc/$1/stat" && set -- "$1" "$2" ${stat##*) } && test "${22}" = "$2" || exit 1; '
    "node=$1; forked=; for file in /proc/[0-9]*/stat; do "
    'read -r stat <"$file" && set -- ${stat##*) } && test "$2" = "$node" && forked="$forked ${stat%% *}"; '
    "done 2>/dev/null; kill -KILL $node; kill -CONT $forked"
)


def _numbers(version: str, count: int) -> tuple[int, ...]:
    """The first `count` of them: two of `3.1.0rc1` are (3, 1)."""
    return tuple(int(number) if number.isdecimal() else 0 for number in version.split(".")[:count])


# The least versions that the node works with. What is older on a host is there twice: ours comes first. What this
# machine's cloudpickle makes is not for older ones.
MIN_VERSIONS = {
    "numpy": (1, 21),
    "pyzmq": (22,),
    "msgpack": (1, 0),
    "msgpack-numpy": (0, 4, 8),
    "cloudpickle": _numbers(metadata.version("cloudpickle"), 2),
}
PURE_PYTHON = ("cloudpickle", "msgpack_numpy")  # a part without libraries may lie where none can be loaded from


def main(control_fd: int) -> NoReturn:
    """Fork a process for each socket that comes, until the control socket closes; then wait for all of them."""
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for one by one
    common = Common()
    gc.freeze()  # keeps the collector from touching, and so copying, the pages that the processes share
    while True:
        word, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            break
        if os.fork() == 0:
            control.close()
            os.setpgid(0, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            HostProcess(JsonLines(socket.socket(fileno=fds[0])), common).run()
        os.close(fds[0])
    try:
        os.wait()
    except ChildProcessError:
        pass
    os._exit(0)


class Common:
    """What is the same for all hosts, made before the fork."""

    def __init__(self) -> None:
        self.bundle = bundle.build()
        self.bootstrap = Path(__file__).with_name("bootstrap.py").read_bytes()


class HostProcess:
    """One host, from the first packet to the last."""

    def __init__(self, master: JsonLines, common: Common) -> None:
        self.master = master
        self.common = common
        self.answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.connection: Connection | None = None
        self.session: RemoteCommand | None = None
        self.node: list[int] | None = None  # its pid, and when it began
        self.killing = threading.Lock()
        self.phase_began = self.heard = time.monotonic()
        self.watchdog: threading.Timer | None = None
        self.welcomed = False
        self.limits: dict[str, float] = {}

    def run(self) -> NoReturn:
        """Start the node and hold the lease; whatever happens, the master hears of it."""
        try:
            self.master.send(process=os.getpid())
            while not (orders := self.master.receive()):
                pass  # a long one comes in pieces
            (order,) = orders
            threading.Thread(target=self._listen, name="qjam-master", daemon=True).start()
            self._run(order)
        except Refused as error:
            self.master.send(failed=error.phase, why=str(error), stderr=[*error.stderr, *self._stderr()])
        except EOFError:
            pass
        except BaseException as error:  # noqa: BLE001  a defect of ours, which the user must hear of
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
        self.connection = connect(order["host"], order["user"], order["port"], config, order["accept_new"], self._phase)
        for note in self.connection.notes:
            self.master.send(note=note)
        facts = self._start_bootstrap(self.connection, order)
        assert self.session is not None
        workers = order["workers"] or facts["facts"]["cores"]
        self._bring_parts(self.session, facts, workers)
        route, endpoint = self._find_way(self.connection, self.session, order["route"])
        welcome = {name: order[name] for name in ("node", "keys", "heartbeat_timeout", "memory_limit", "keep_data")}
        self._on_heard()
        self.welcomed = True
        self.session.tell(welcome={**welcome, "workers": workers, "endpoint": endpoint}, stdio=route == "stdio")
        uplink = None
        if route == "stdio":  # from here on both ways are frames
            uplink = relay.StdioUplink(self.session.channel, self._bind("127.0.0.1"), self.session.sending)
        self.master.send(route=route)
        self._phase("way back")
        self._hold(self.session, uplink, order["silence"])

    # The master

    def _listen(self) -> None:
        """The end of the master is the end of the lease."""
        try:
            while True:
                for message in self.master.receive():
                    self.answers.put(message)
        except EOFError:
            pass
        if self.session is not None and self.welcomed:
            # In a thread: it waits while the way is full.
            threading.Thread(target=self.session.end_input, daemon=True).start()
            time.sleep(max(0.0, self.heard + LEAVE_TIMEOUT - time.monotonic()))
            self._kill_node()
        self._leave()

    def _phase(self, name: str) -> None:
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
        os.killpg(0, signal.SIGKILL)  # with a pip that may be under way
        os._exit(0)

    def _kill_node(self) -> None:
        """Where it has not ended well: it may be stopped, and hears neither of its lease nor of its stdin. Its warm
        parent then ends the workers and removes the files. This is the one exception to one exec a host.
        """
        with self.killing:  # who comes second waits
            node, self.node = self.node, None
            if node is None or self.connection is None or self.session is None or self.session.ended_well:
                return
            command = f"exec /bin/sh -c {shlex.quote(KILL)} qjam {node[0]} {node[1]}"
            run_beside(self.connection.transport, command, KILL_TIMEOUT)

    def _bind(self, address: str) -> str:
        """Have the ROUTER bound there, and give the endpoint. Raises OSError."""
        self.master.send(bind=address)
        answer = self.answers.get()
        if "endpoint" not in answer:
            raise OSError(answer["error"])
        return str(answer["endpoint"])

    def _stderr(self) -> list[str]:
        return [] if self.session is None else self.session.stderr()

    # Stage 1

    def _start_bootstrap(self, connection: Connection, order: dict[str, Any]) -> dict[str, Any]:
        source, python = self.common.bootstrap, order["python"]
        loader = f'import sys;s=sys.stdin.buffer;exec(compile(s.read({len(source)}),"bootstrap","exec"));main(s)'
        # eval, because a line may end with ; or a comment. Its end is told, to know whose failure the next one is.
        set_up = f"qjam {os.urandom(12).hex()}"
        setup = f"eval {shlex.quote(order['setup'])} && echo {set_up} && " if order["setup"] else ""
        command = f"{setup}exec {python} -c {shlex.quote(loader)}"
        session = self.session = RemoteCommand(connection.transport, command, PYTHON_TIMEOUT)
        marker = f"qjam {os.urandom(12).hex()}"
        try:
            session.send(source)
            session.tell(marker=marker, env=order["env"], ways=self._direct_ways(connection, order))
        except OSError:
            pass  # it has ended: how is told by its output
        said = session.skip_to(marker.encode() + b"\n", "python")
        if said is not None and order["setup"] and set_up.encode() not in said:
            why = f"the setup line `{order['setup']}` failed there ({session.ending()}){_last_words(said)}"
            raise Refused("python", why)
        if said is not None:
            raise Refused("python", _why_no_python(session, python, said.rpartition(set_up.encode())[2]))
        facts = session.hear("python")
        self.node = facts["process"]
        self._phase("python")
        return facts

    def _direct_ways(self, connection: Connection, order: dict[str, Any]) -> dict[str, Any]:
        """The addresses of this machine that the host shall try: our end of the connection, then configured ones."""
        addresses = []
        if order["route"] in (None, "direct"):
            if connection.local:
                with contextlib.suppress(OSError):  # where connections are redirected it may not be ours
                    addresses.append(_host_and_port(self._bind(connection.local)))
            for address in order["addresses"]:
                host, port = _host_and_port(address)
                try:
                    endpoint = self._bind(address if port else host)
                except OSError:  # not one of this machine's, but of what translates addresses before it
                    if not port:
                        self.master.send(note=f"address {host!r} is not one of this machine's: it needs a port")
                        continue
                    endpoint = self._bind(f"0.0.0.0:{port}")
                addresses.append((host, _host_and_port(endpoint)[1]))
        return {"addresses": addresses, "seen": connection.direct, "timeout": PROBE_TIMEOUT}

    def _bring_parts(self, session: RemoteCommand, facts: dict[str, Any], workers: int) -> None:
        """Send what the host lacks, each part with its line, and wait until all of it can be imported."""
        lacks = [
            name for name, least in MIN_VERSIONS.items() if not _new_enough(facts["facts"]["has"].get(name), least)
        ]
        own = self.common.bundle
        wanted = [{"name": "the worker bundle", "id": own.hash, "unpacked": 4 * len(own.data), "native": False}]
        content: list[bytes | Path] = [own.data]
        sums = [(len(own.data), own.hash)]
        if lacks:
            try:
                for part in wheels.provide(lacks, _host_facts(facts["facts"])):
                    native = not part.name.startswith(PURE_PYTHON)
                    wanted.append({"name": part.name, "id": part.id, "unpacked": part.unpacked, "native": native})
                    content.append(part.path)
                    sums.append((part.size, part.sha256))
            except ValueError as error:
                raise Refused("bundle", str(error)) from error
        for part_wanted, (size, sha256) in zip(wanted, sums, strict=True):
            part_wanted.update(size=size, sha256=sha256)
        try:
            session.tell(parts=wanted, workers=workers)
            for part_wanted, source in zip(wanted, content, strict=True):
                if part_wanted["id"] not in facts["cached"]:
                    _send_part(session, source)
        except OSError:
            pass  # it has given up: its last words are on their way
        session.channel.settimeout(BUNDLE_TIMEOUT)
        session.hear("bundle")
        self._phase("bundle")

    # The way back

    def _find_way(self, connection: Connection, session: RemoteCommand, wanted: str | None) -> tuple[str, str]:
        """The route, and the endpoint that the node connects to; that of a relay is its own affair."""
        said = session.hear("way back")
        tried = [*said["tried"]]
        if said["way"] is not None:
            return "direct", _endpoint(*said["way"])
        if wanted in (None, "tunnel"):
            port, why = self._forward(connection)
            if port:
                session.tell(ways={"addresses": [["127.0.0.1", port]], "seen": False, "timeout": TUNNEL_TIMEOUT})
                said = session.hear("way back")
                if said["way"] is not None:
                    return "tunnel", _endpoint(*said["way"])
                why = "; ".join(said["tried"])
            tried.append(f"a tunnel: {why}")
        if wanted in (None, "stdio"):
            return "stdio", ""
        raise Refused("way back", f"the host does not reach this machine: {'; '.join(tried) or 'nothing to try'}")

    def _forward(self, connection: Connection) -> tuple[int, str]:
        """Ask for a port on the host's loopback that leads here; 0 and why not, where that is forbidden."""
        endpoint = self._bind("127.0.0.1")

        def joined(channel: Any, origin: Any, server: Any) -> None:
            relay.join(channel, endpoint, self._on_heard)

        try:
            return connection.transport.request_port_forward("127.0.0.1", 0, joined), ""
        except (SSHException, OSError, EOFError) as error:
            return 0, str(error)

    # The lease

    def _hold(self, session: RemoteCommand, uplink: relay.StdioUplink | None, silence: float) -> NoReturn:
        """Send beats and take their echoes, or whatever else comes, until the node ends."""
        frames, why = Frames(), ""
        self._on_heard()
        session.channel.settimeout(BEAT)
        beat = b"\n" if uplink is None else frame(HEARTBEAT, b"\n")
        threading.Thread(target=_beat, args=(session, beat), name="qjam-beat", daemon=True).start()
        while True:
            session.stderr()
            if time.monotonic() - self.heard > silence:
                why = f"no sign of life for {silence:.0f} s"
                break
            try:
                data = session.channel.recv(relay.READ)
            except TimeoutError:
                continue
            except (OSError, EOFError):
                data = b""
            if not data:
                break
            self._on_heard()
            if uplink is not None:
                try:
                    for stream, piece in frames.feed(data):
                        if stream != HEARTBEAT:
                            uplink.put(piece)
                except OSError:
                    why = "the master has hung up"
                    break
        why = why or f"it has ended: {session.ending()}"
        self.master.send(ended=why, stderr=session.stderr())
        raise EOFError

    def _on_heard(self) -> None:
        """A sign of life from the host: an echo, or whatever comes in its place, for echoes stand behind megabytes."""
        self.heard = time.monotonic()


def _beat(session: RemoteCommand, beat: bytes) -> None:
    """In a thread of its own: the way may be full, and what comes must be taken all the same."""
    try:
        while True:
            session.send(beat, patient=True)
            time.sleep(BEAT)
    except OSError:
        pass  # it has ended, as its output tells


def _why_no_python(session: RemoteCommand, python: str, said: bytes) -> str:
    """Why a login ended before our first word; its own last words are the best explanation."""
    status, words = session.exit_status(), _last_words(said)
    if status == 127 or "not found" in words or any("not found" in line for line in session.stderr()):
        return (
            f"'{python}' was not found there (exit status {status}); install python3, or name another one with "
            f"python=... or QJAM_REMOTE_PYTHON{words}"
        )
    return f"'{python}' did not start there ({session.ending()}){words}"


def _last_words(said: bytes) -> str:
    last = said.decode(errors="replace").strip().splitlines()[-STDOUT_LINES:]
    return "".join(f"\n    > {line}" for line in last)


def _send_part(session: RemoteCommand, source: bytes | Path) -> None:
    if isinstance(source, bytes):
        session.send(source)
        return
    with open(source, "rb") as file:
        while piece := file.read(PIECE):
            session.send(piece)


def _host_facts(facts: dict[str, Any]) -> wheels.HostFacts:
    major, minor = facts["python"]
    return wheels.HostFacts((major, minor), facts["implementation"], facts["soabi"], facts["machine"], facts["libc"])


def _new_enough(version: str | None, least: tuple[int, ...]) -> bool:
    """Whether a version, as the host tells it, will do; an unknown one will."""
    return version is not None and (not version or _numbers(version, len(least)) >= least)


def _host_and_port(address: str) -> tuple[str, int]:
    """Of `tcp://1.2.3.4:5`, `name`, `1.2.3.4:5`, `::1` or `[::1]:5`; the port is 0 where none is told."""
    address = address.removeprefix("tcp://")
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        return address.strip("[]"), 0
    return host.strip("[]"), int(port)


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
