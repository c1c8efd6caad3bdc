"""One ssh connection, made as OpenSSH would from the same configuration: connect, verify the host key, log in.

This module changes three slow defaults of paramiko: it sets TCP_NODELAY and TCP_QUICKACK (connect to exec: 120 ms
before, 27 ms now), and prefers a cipher that the processor computes in hardware.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import paramiko

from . import identities, known_hosts
from .config import SshSettings, resolve, split

SSHException = paramiko.SSHException

CONNECT_TIMEOUT = 15.0  # seconds, unless ssh_config sets ConnectTimeout; also for the banner and the key exchange
AUTH_TIMEOUT = 30.0
HEARD = 80  # bytes that an error quotes of what answered, when that was no ssh server
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
RSA = ("rsa-sha2-512", "rsa-sha2-256")  # the signature algorithms of an ssh-rsa key
WINDOW = 16 * 1024 * 1024  # bytes in flight to us: 2 MiB, the default, would cap a 50 ms link at 40 MB/s
# With MaxStartups logins under way, an ssh server drops further connections; so may a jump host, for those it forwards.
ATTEMPTS = 4
BUSY = (b"Exceeded MaxStartups", b"Not allowed at this time")  # what sshd then sends, since OpenSSH 9.8
MAX_HOPS = 8
PROXY_LINES = 12  # the last lines of a ProxyCommand's stderr that we keep
PROXY_TIMEOUT = 0.5  # seconds that a ProxyCommand gets to end after SIGTERM
PAUSE = 0.4  # seconds before the next attempt, doubled each time, with jitter
# TCP keep-alive: seconds before the first probe, between probes, number of probes; milliseconds without an ACK.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}


class Refused(Exception):
    """A phase of the start failed: `phase` is one of docs/ssh.md, the text says why, `stderr` has the last lines."""

    def __init__(self, phase: str, why: str, stderr: Iterable[str] = ()) -> None:
        super().__init__(why)
        self.phase = phase
        self.stderr = list(stderr)


class Connection(NamedTuple):
    """A host that we are logged in to.

    `local` is this machine's address in the connection to the first hop, None if unknown. `direct`: there is no jump
    host between this machine and the host.
    """

    transport: paramiko.Transport
    local: str | None
    direct: bool
    notes: list[str]
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


class _Eager(socket.socket):
    """A TCP socket with TCP_QUICKACK: without it each ssh exchange waits for a delayed ACK."""

    heard = b""  # the first bytes, for errors: paramiko does not report what a server that is no ssh server sent

    def recv(self, *args: Any) -> bytes:
        data = super().recv(*args)
        if len(self.heard) < HEARD:
            self.heard += data[:HEARD]
        if hasattr(socket, "TCP_QUICKACK"):  # Linux, which resets it with each packet
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


def connect(
    host: str, user: str | None, port: int | None, config: Path | None, accept_new: bool, phase: Callable[[str], None]
) -> Connection:
    """Log in to a host; call `phase(name)` as each phase ends. Raises Refused."""
    try:
        hops = _hops(resolve(host, user, port, config), config)
    except ValueError as error:
        raise Refused("resolve", str(error)) from error
    for attempt in range(1, ATTEMPTS + 1):
        stack = ExitStack()
        try:
            return _connect(hops, accept_new, phase, stack)
        except _Dropped as error:
            stack.close()
            if attempt == ATTEMPTS:
                raise Refused(error.phase, f"{error} ({ATTEMPTS} attempts)", error.stderr) from error
            time.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1.0))
        except BaseException:
            stack.close()
            raise
    raise AssertionError


class _Dropped(Refused):
    """The server hung up before the login, perhaps because too many logins are under way: worth another attempt."""


def _connect(hops: list[SshSettings], accept_new: bool, phase: Callable[[str], None], stack: ExitStack) -> Connection:
    notes: list[str] = []
    settings = hops[-1]
    sock: Any = None
    local = proxy = None
    transport: paramiko.Transport | None = None
    for hop in hops:
        through = "" if hop is settings else f"jump host {hop.name}: "
        try:
            if transport is not None:
                sock = _through(transport, hop)
            elif hop.proxy_command is not None:
                phase("resolve")
                proxy = _Proxy(hop.proxy_command)
                stack.callback(proxy.end)
                sock, local = proxy.socket, _own_address(hop)
            else:
                sock, local = _first_socket(hop, phase, stack)
            if hop is settings:
                phase("connect")
            transport = _transport(sock, stack)
            _verify(transport, hop, accept_new, notes)
            if hop is settings:
                phase("host key")
            _log_in(transport, hop)
        except Refused as error:
            name = error.phase if hop is settings or error.phase == "resolve" else "connect"
            if proxy is None or (transport is not None and transport.remote_version):
                raise type(error)(name, f"{through}{error}") from error
            raise type(error)(name, f"{through}{proxy.why() or error}", proxy.stderr) from error
    assert transport is not None
    phase("auth")
    return Connection(transport, local, len(hops) == 1, notes, stack)


def _hops(settings: SshSettings, config: Path | None) -> list[SshSettings]:
    """The jump hosts in order, then the host. As in OpenSSH, only the first jump host's own ProxyJump counts."""
    hops = [settings]
    while hops[0].proxy_jump:
        if len(hops) > MAX_HOPS:
            raise Refused("resolve", f"more than {MAX_HOPS} jump hosts: does one of them lead back?")
        hops[:0] = [resolve(*split(hop), config) for hop in hops[0].proxy_jump]
    return hops


def _first_socket(hop: SshSettings, phase: Callable[[str], None], stack: ExitStack) -> tuple[Any, str | None]:
    """A socket to the first hop, and its local address."""
    try:
        places = socket.getaddrinfo(hop.hostname, hop.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Refused("resolve", f"{hop.hostname}: {error.strerror or error}") from error
    phase("resolve")
    timeout = hop.connect_timeout or CONNECT_TIMEOUT
    whys: list[str] = []
    place: Any
    for family, kind, protocol, _, place in places:
        sock = _Eager(family, kind, protocol)
        try:
            sock.settimeout(timeout)
            sock.connect(place)
        except OSError as error:
            sock.close()
            text = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else error.strerror or error
            whys.append(f"{place[0]} port {place[1]}: {text}")
            continue
        stack.callback(sock.close)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has all
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return sock, str(sock.getsockname()[0])
    raise Refused("connect", "; ".join(whys))


def _own_address(hop: SshSettings) -> str | None:
    """This machine's address on the route to a host that a ProxyCommand connects to; None if unknown."""
    try:
        family, _, _, _, place = socket.getaddrinfo(hop.hostname, hop.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # UDP: sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


class _Proxy:
    """A running ProxyCommand and the socket to it. paramiko's ProxyCommand is slow and leaves the process behind."""

    running: ClassVar[set[_Proxy]] = set()

    def __init__(self, command: str) -> None:
        self.command = command
        self.stderr: deque[str] = deque(maxlen=PROXY_LINES)
        self.socket, theirs = socket.socketpair()
        shell = os.environ.get("SHELL") or "/bin/sh"
        with theirs:
            end_there = theirs.fileno()
            self._process = subprocess.Popen(
                [shell, "-c", f"exec {command}"],
                stdin=end_there,
                stdout=end_there,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        self.running.add(self)
        self._reading = threading.Thread(target=self._read, name="qjam-proxy", daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.stderr.append(line.rstrip("\n"))

    def why(self) -> str:
        """How the command ended; the empty string while it runs."""
        try:
            status = self._process.wait(PROXY_TIMEOUT)
        except subprocess.TimeoutExpired:
            return ""
        self._reading.join(PROXY_TIMEOUT)
        return f"its ProxyCommand `{self.command}` has ended (exit status {status})"

    def end(self) -> None:
        """End the command and all processes in its group, as OpenSSH does."""
        self.running.discard(self)
        self.socket.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
                try:
                    self._process.wait(PROXY_TIMEOUT)
                except subprocess.TimeoutExpired:
                    continue


def kill_proxies() -> None:
    """End all ProxyCommands of this process."""
    for proxy in list(_Proxy.running):
        proxy.end()


def _through(transport: paramiko.Transport, hop: SshSettings) -> paramiko.Channel:
    """A channel from a jump host to the next hop."""
    try:
        return transport.open_channel(
            "direct-tcpip", (hop.hostname, hop.port), ("127.0.0.1", 0), timeout=hop.connect_timeout or CONNECT_TIMEOUT
        )
    except (paramiko.SSHException, OSError, EOFError) as error:
        why = error.text if isinstance(error, paramiko.ChannelException) else error
        raise Refused("connect", f"the jump host cannot reach {hop.hostname} port {hop.port}: {why}") from error


def _transport(sock: Any, stack: ExitStack) -> paramiko.Transport:
    try:
        transport = paramiko.Transport(sock, default_window_size=WINDOW)
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise _Dropped("connect", f"no ssh server answers: {error}") from error
    stack.callback(transport.close)
    options = transport.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda cipher: cipher not in CIPHERS)
    return transport


def _verify(transport: paramiko.Transport, hop: SshSettings, accept_new: bool, notes: list[str]) -> None:
    """Do the key exchange and check the host key against the known_hosts files."""
    files = (*hop.known_hosts, *hop.global_known_hosts)
    known = known_hosts.KnownHosts.read(files)
    name, port = hop.known_hosts_name, hop.known_hosts_port
    types = [sign for type_ in known.key_types(name, port) for sign in (RSA if type_ == "ssh-rsa" else (type_,))]
    options = transport.get_security_options()
    options.key_types = sorted(
        options.key_types, key=lambda type_: types.index(type_) if type_ in types else len(types)
    )
    transport.banner_timeout = timeout = hop.connect_timeout or CONNECT_TIMEOUT
    ends = time.monotonic() + timeout
    try:
        transport.start_client(timeout=timeout)  # on time-out it returns as if all were well
        key = transport.get_remote_server_key()
    except (paramiko.SSHException, OSError, EOFError) as error:
        silent = time.monotonic() >= ends
        text = f"no answer within {timeout:g} s" if silent else str(error) or "it hung up"
        if transport.remote_version:
            raise (Refused if silent else _Dropped)("host key", f"the ssh server does not go on: {text}") from error
        heard = getattr(transport.sock, "heard", b"")
        if heard:
            text = f"something says {heard.decode(errors='replace')!r}"
        again = not silent and (not heard or heard.startswith(BUSY))
        raise (_Dropped if again else Refused)("connect", f"no ssh server answers: {text}") from error
    verdict = known.check(name, port, key.get_name(), key.asbytes())
    if verdict.known:
        return
    if verdict.unknown and accept_new and hop.known_hosts:
        try:
            known_hosts.record(hop.known_hosts[0], name, port, key.get_name(), key.asbytes(), hop.hash_known_hosts)
        except OSError as error:
            why = f"its key is new and cannot be recorded in {hop.known_hosts[0]}: {error.strerror or error}"
            raise Refused("host key", why) from error
        notes.append(
            f"{hop.name}: its key was not known and has been accepted: {key.get_name()} "
            f"{known_hosts.fingerprint(key.asbytes())}, now in {hop.known_hosts[0]}"
        )
        return
    raise Refused(
        "host key", known_hosts.refusal(hop.name, name, port, key.get_name(), key.asbytes(), verdict, hop.known_hosts)
    )


def _log_in(transport: paramiko.Transport, hop: SshSettings) -> None:
    """Log in with the keys of the agent and of files, in the order of OpenSSH; never with a password."""
    tried: list[str] = []
    allowed: list[str] = []
    transport.auth_timeout = AUTH_TIMEOUT
    for name, key in identities.to_try(hop, tried):
        try:
            more = transport.auth_publickey(hop.user, key)
            if not more:
                return
            tried.append(f"{name} is accepted, but the server wants more: {', '.join(more)}")
        except paramiko.BadAuthenticationType as error:
            allowed = error.allowed_types
            break
        except paramiko.AuthenticationException as error:
            if not transport.is_active():
                raise Refused(
                    "auth",
                    f"the server hung up after {len(tried) + 1} keys, perhaps too many (MaxAuthTries there): name the "
                    f"right one with IdentityFile, and set IdentitiesOnly yes; {_summary(tried)}; {name} was next",
                ) from error
            tried.append(f"{name} is not accepted")
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise Refused("auth", f"{name}: {str(error) or 'the server hung up'}") from error
    asks = f"the server takes {', '.join(allowed)} only; " if allowed else ""
    raise Refused("auth", f"no key lets {hop.user} in: {asks}{_summary(tried)}")


def _summary(tried: list[str]) -> str:
    return "; ".join(tried) or "there is no key to try: no agent, and no file that ssh_config names exists"


# Errors of paramiko reach the user as Refused.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False
