"""The process that holds one host's ssh connection: it starts the node, relays for it where need be, keeps its lease.

A process of its own, because a master may be in C code for a minute with the GIL held, and because a relay in a busy
python is several times slower. It is forked from a warm one that has paramiko imported, and ends with its master.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from qjam_worker.stdio import LEASE, Frames, frame

from . import bundle, parts, ssh, tunnel
from .lines import Lines
from .ssh import Refused

BEAT = 2.0  # seconds between the signs of life that a node gets, and answers
SILENCE = 30.0  # seconds without an answer after which the host counts as lost
PYTHON_TIMEOUT = 60.0  # seconds for a login shell, its start files and python; the disk may be a sleepy network one
BUNDLE_TIMEOUT = 120.0  # to unpack and import, once everything is there
PROBE_TIMEOUT = 1.5  # for a SYN and one repetition of it
TUNNEL_TIMEOUT = 10.0  # for a probe through the tunnel, which answers or does not exist
LEAVE_TIMEOUT = 6.0  # for the node to stop everything, once its stdin has ended
NOISE = 64 * 1024  # bytes that a login may print before our first word are skipped; of that many the end is kept
STDERR_LINES = 12
PIECE = 1 << 20

# The least versions that the node works with. What is older on a host is there twice: ours comes first.
LEAST = {"numpy": (1, 21), "pyzmq": (22,), "msgpack": (1, 0), "cloudpickle": (1, 6)}


def main(control_fd: int) -> NoReturn:
    """Fork a process for each socket that comes, until the control socket closes; then wait for all of them."""
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for one by one
    common = Common()
    while True:
        word, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            break
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            Lease(Lines(socket.socket(fileno=fds[0])), common).run()
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
        self.stage1 = Path(__file__).with_name("stage1.py").read_bytes()


class Lease:
    """One host, from the first packet to the last."""

    def __init__(self, master: Lines, common: Common) -> None:
        self.master = master
        self.common = common
        self.answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.connection: ssh.Connection | None = None
        self.channel: Any = None
        self.leaving = False
        self.line_rest = b""
        self.stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._stderr_rest = ""
        self.sending = threading.Lock()
        self.phase_began = time.monotonic()

    def run(self) -> NoReturn:
        """Start the node and hold the lease; whatever happens, the master hears of it."""
        try:
            (order,) = self.master.receive()
            threading.Thread(target=self._listen, name="qjam-master", daemon=True).start()
            self._run(order)
        except Refused as error:
            self._read_stderr()
            self.master.send(failed=error.phase, why=str(error), stderr=list(self.stderr))
        except EOFError:
            pass
        except BaseException as error:  # noqa: BLE001  a defect of ours, which the user must hear of
            import traceback

            self.master.send(failed="", why=f"{error!r}\n{traceback.format_exc()}", stderr=list(self.stderr))
        finally:
            try:
                if self.connection is not None:
                    self.connection.close()
            finally:
                os._exit(0)

    def _run(self, order: dict[str, Any]) -> None:
        time.sleep(order["delay"])
        self.phase_began = time.monotonic()
        config = Path(order["ssh_config"]) if order["ssh_config"] else None
        self.connection = ssh.connect(
            order["host"], order["user"], order["port"], config, order["accept_new"], self._phase
        )
        for note in self.connection.notes:
            self.master.send(note=note)
        facts = self._start_stage1(order)
        workers = order["workers"] or facts["facts"]["cores"]
        self._bring_parts(facts, workers)
        route, welcome = self._find_way(order, workers)
        self._tell(welcome=welcome, stdio=route == "stdio")
        uplink = None
        if route == "stdio":  # from here on both ways are frames
            uplink = tunnel.StdioUplink(self.channel, self._bind("127.0.0.1"), self.sending)
        self.master.send(route=route, facts=facts)
        self._phase("way back")
        self._hold(uplink)

    # The master

    def _listen(self) -> None:
        """The end of the master is the end of the lease."""
        try:
            while True:
                for message in self.master.receive():
                    self.answers.put(message)
        except EOFError:
            pass
        self.leaving = True
        if self.channel is None:
            os._exit(0)
        try:
            self.channel.shutdown_write()
        except (OSError, EOFError):
            pass
        time.sleep(LEAVE_TIMEOUT)
        os._exit(0)

    def _phase(self, name: str) -> None:
        now = time.monotonic()
        self.master.send(phase=name, seconds=now - self.phase_began)
        self.phase_began = now

    def _bind(self, address: str) -> str:
        """Have the ROUTER bound there, and give the endpoint. Raises OSError."""
        self.master.send(bind=address)
        answer = self.answers.get()
        if "endpoint" not in answer:
            raise OSError(answer["error"])
        return str(answer["endpoint"])

    # Stage 1

    def _start_stage1(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.connection is not None
        source = self.common.stage1
        loader = f'import sys;s=sys.stdin.buffer;exec(compile(s.read({len(source)}),"stage1","exec"));main(s)'
        setup = f"{order['setup']} && " if order["setup"] else ""
        self.python = order["python"]
        try:
            self.channel = self.connection.transport.open_session(timeout=PYTHON_TIMEOUT)
            self.channel.exec_command(f"{setup}exec {self.python} -c {shlex.quote(loader)}")
        except (ssh.SSHException, OSError, EOFError) as error:
            raise Refused("python", f"the server starts no command: {_text(error)}") from error
        self.channel.settimeout(PYTHON_TIMEOUT)
        marker = f"qjam {os.urandom(12).hex()}"
        self._send(source)
        self._tell(marker=marker, env=order["env"], ways=self._direct_ways(order), cache=None)
        self._skip_to(marker.encode() + b"\n")
        facts: dict[str, Any] = self._hear("python")
        self._phase("python")
        return facts

    def _direct_ways(self, order: dict[str, Any]) -> dict[str, Any]:
        """The addresses of this machine that the host shall try: our end of the connection, then configured ones."""
        assert self.connection is not None
        addresses = []
        if order["route"] in (None, "direct"):
            if self.connection.local:
                with contextlib.suppress(OSError):  # where connections are redirected it may not be ours
                    addresses.append(_host_and_port(self._bind(self.connection.local)))
            for address in order["addresses"]:
                host, port = _host_and_port(address)
                try:
                    endpoint = self._bind(address)
                except OSError:  # not one of this machine's, but of what translates addresses before it
                    endpoint = self._bind(f"0.0.0.0:{port}" if port else "0.0.0.0")
                addresses.append((host, _host_and_port(endpoint)[1]))
        return {"addresses": addresses, "seen": self.connection.direct, "timeout": PROBE_TIMEOUT}

    def _skip_to(self, marker: bytes) -> None:
        """Everything up to the marker was printed by the login: banners, a .bashrc, the setup line."""
        said = b""
        while True:
            data = self._recv("python")
            if not data:
                raise Refused("python", self._why_no_python(said))
            said += data
            _, found, after = said.partition(marker)
            if found:
                self.line_rest = after
                return
            if len(said) > 2 * NOISE:
                said = said[-NOISE:]

    def _why_no_python(self, said: bytes) -> str:
        status = self._exit_status()
        self._read_stderr()
        text = said.decode(errors="replace").strip().splitlines()
        self.stderr.extendleft(reversed(text[-STDERR_LINES:]))
        if status == 127 or any("not found" in line for line in self.stderr):
            return (
                f"'{self.python}' was not found there (exit status {status}); install python3, or name another one "
                "with python=... or QJAM_REMOTE_PYTHON"
            )
        return f"'{self.python}' did not start there (exit status {status})"

    def _exit_status(self) -> int | None:
        return self.channel.recv_exit_status() if self.channel.status_event.wait(2.0) else None

    def _bring_parts(self, facts: dict[str, Any], workers: int) -> None:
        """Send what the host lacks, each part with its line, and wait until all of it can be imported."""
        lacks = [name for name, least in LEAST.items() if not _new_enough(facts["facts"]["has"].get(name), least)]
        own = self.common.bundle
        wanted = [{"name": "the worker bundle", "id": own.hash, "unpacked": 4 * len(own.data), "native": False}]
        content: list[Any] = [own.data]
        sums = [(len(own.data), own.hash)]
        if lacks:
            try:
                for part in parts.provide(lacks, _host_facts(facts["facts"])):
                    native = not part.name.startswith("cloudpickle")
                    wanted.append({"name": part.name, "id": part.id, "unpacked": part.unpacked, "native": native})
                    content.append(part.path)
                    sums.append((part.size, part.sha256))
            except ValueError as error:
                raise Refused("bundle", str(error)) from error
        for part_wanted, (size, sha256) in zip(wanted, sums, strict=True):
            part_wanted.update(size=size, sha256=sha256)
        self._tell(parts=wanted, workers=workers)
        try:
            for part_wanted, source in zip(wanted, content, strict=True):
                if part_wanted["id"] not in facts["cached"]:
                    self._send_part(source)
        except OSError:
            pass  # it has given up: its last words are on their way
        self.channel.settimeout(BUNDLE_TIMEOUT)
        self._hear("bundle")
        self._phase("bundle")

    def _send_part(self, source: Any) -> None:
        if isinstance(source, bytes):
            self._send(source)
            return
        with open(source, "rb") as file:
            while piece := file.read(PIECE):
                self._send(piece)

    # The way back

    def _find_way(self, order: dict[str, Any], workers: int) -> tuple[str, dict[str, Any]]:
        """The route, and the welcome that names its endpoint on the host."""
        assert self.connection is not None
        welcome = {"node": order["node"], "workers": workers, "keys": order["keys"], "lease": order["lease"]}
        said = self._hear("way back")
        tried = [*said["tried"]]
        if said["way"] is not None:
            return "direct", {**welcome, "endpoint": _endpoint(*said["way"])}
        if order["route"] in (None, "tunnel"):
            port, why = self._forward()
            if port:
                self._tell(ways={"addresses": [["127.0.0.1", port]], "seen": False, "timeout": TUNNEL_TIMEOUT})
                said = self._hear("way back")
                if said["way"] is not None:
                    return "tunnel", {**welcome, "endpoint": _endpoint(*said["way"])}
                why = "; ".join(said["tried"])
            tried.append(f"a tunnel: {why}")
        if order["route"] in (None, "stdio"):
            return "stdio", {**welcome, "endpoint": ""}
        raise Refused("way back", f"the host does not reach this machine: {'; '.join(tried) or 'nothing to try'}")

    def _forward(self) -> tuple[int, str]:
        """Ask for a port on the host's loopback that leads here; 0 and why not, where that is forbidden."""
        assert self.connection is not None
        endpoint = self._bind("127.0.0.1")

        def joined(channel: Any, origin: Any, server: Any) -> None:
            tunnel.join(channel, endpoint)

        try:
            return self.connection.transport.request_port_forward("127.0.0.1", 0, joined), ""
        except (ssh.SSHException, OSError, EOFError) as error:
            return 0, str(error)

    # The lease

    def _hold(self, uplink: tunnel.StdioUplink | None) -> NoReturn:
        """Send beats and take their echoes, until the node ends."""
        frames = Frames()
        self.channel.settimeout(BEAT)
        beaten = heard = time.monotonic()
        self._beat(uplink)
        why = "its process has ended"
        while True:
            now = time.monotonic()
            if now - beaten >= BEAT:
                beaten = now
                self._read_stderr()
                if not self._beat(uplink):
                    why = "its ssh connection is gone"
                    break
            if now - heard > SILENCE:
                why = f"no sign of life for {SILENCE:.0f} s"
                break
            try:
                data = self.channel.recv(tunnel.READ)
            except TimeoutError:
                continue
            except (OSError, EOFError):
                data = b""
            if not data:
                break
            heard = time.monotonic()
            if uplink is not None:
                try:
                    for stream, piece in frames.feed(data):
                        if stream != LEASE:
                            uplink.put(piece)
                except OSError:
                    why = "the master has hung up"
                    break
        self._tell_end(why)
        raise EOFError

    def _beat(self, uplink: tunnel.StdioUplink | None) -> bool:
        try:
            with self.sending:
                tunnel.send(self.channel, b"\n" if uplink is None else frame(LEASE, b"\n"))
        except (OSError, EOFError):
            return self.leaving
        return True

    def _tell_end(self, why: str) -> None:
        status = self._exit_status()
        self._read_stderr()
        if status is None and why == "its process has ended":
            why = "its ssh connection is gone"
        self.master.send(ended=f"{why}{f' (exit status {status})' if status else ''}", stderr=list(self.stderr))

    # Messages to and from stage 1

    def _tell(self, **message: Any) -> None:
        self._send(json.dumps(message).encode() + b"\n")

    def _send(self, data: bytes) -> None:
        try:
            with self.sending:
                tunnel.send(self.channel, data)
        except EOFError as error:
            raise OSError("the channel is closed") from error

    def _hear(self, phase: str) -> dict[str, Any]:
        while b"\n" not in self.line_rest:
            data = self._recv(phase)
            if not data:
                raise Refused(phase, f"python has ended there (exit status {self._exit_status()})")
            self.line_rest += data
        line, _, self.line_rest = self.line_rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "failed" in message:
            raise Refused(phase, message["failed"])
        return message

    def _recv(self, phase: str) -> bytes:
        try:
            data: bytes = self.channel.recv(tunnel.READ)
        except TimeoutError:
            raise Refused(phase, f"nothing was heard of the host for {self.channel.gettimeout():.0f} s") from None
        except (OSError, EOFError) as error:
            raise Refused(phase, f"the ssh connection broke: {error}") from error
        return data

    def _read_stderr(self) -> None:
        if self.channel is None:
            return
        while self.channel.recv_stderr_ready():
            text = self._stderr_rest + self.channel.recv_stderr(NOISE).decode(errors="replace")
            *lines, self._stderr_rest = text.split("\n")
            self.stderr.extend(line for line in lines if line.strip())
        if self._stderr_rest.strip() and self.channel.eof_received:
            self.stderr.append(self._stderr_rest)
            self._stderr_rest = ""


def _host_facts(facts: dict[str, Any]) -> parts.HostFacts:
    major, minor = facts["python"]
    return parts.HostFacts((major, minor), facts["implementation"], facts["soabi"], facts["machine"], facts["libc"])


def _new_enough(version: str | None, least: tuple[int, ...]) -> bool:
    """Whether a version, as the host tells it, will do; an unknown one will."""
    if not version:
        return version is not None
    numbers = [int(number) if number.isdecimal() else 0 for number in version.split(".")[: len(least)]]
    return tuple(numbers) >= least


def _text(error: BaseException) -> str:
    return str(error) or "it hung up"


def _host_and_port(address: str) -> tuple[str, int]:
    """Of `tcp://1.2.3.4:5`, `name`, `1.2.3.4:5`, `::1` or `[::1]:5`; the port is 0 where none is told."""
    address = address.removeprefix("tcp://")
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        return address.strip("[]"), 0
    return host.strip("[]"), int(port)


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
