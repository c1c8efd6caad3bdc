"""One ssh connection, as OpenSSH would make it from the same configuration: connect, verify the host, log in.

With `keys` and `session`, the only user of paramiko. What is slow in its defaults is set here: no delay on the
socket, early acknowledgements (120 -> 27 ms from connect to exec), the cipher that the processor does itself.
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

CONNECT_TIMEOUT = 15.0  # seconds, where ssh_config says nothing; for the banner and the key exchange as well
AUTH_TIMEOUT = 30.0
HEARD = 80  # bytes of what is no ssh server that are shown
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
RSA = ("rsa-sha2-512", "rsa-sha2-256")  # the names under which an ssh-rsa key signs
WINDOW = 16 * 1024 * 1024  # bytes on their way to us: 2 MiB would cap a link of 50 ms at 40 MB/s
# A server that has MaxStartups logins under way drops more; so does a jump host for all that is behind it.
ATTEMPTS = 4
BUSY = (b"Exceeded MaxStartups", b"Not allowed at this time")  # what sshd says then, since OpenSSH 9.8
MOST_HOPS = 8
PROXY_LINES = 12  # of what a ProxyCommand complains of that are kept
PROXY_TIMEOUT = 0.5  # seconds for a ProxyCommand to end once it is told to
PAUSE = 0.4  # seconds before another attempt, twice as long each time, with jitter
# A peer that is silent for this long is gone: seconds until the first probe, between probes, and how many.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}


class Refused(Exception):
    """A phase of the start failed; `phase` is one of the table's, the text says why, `stderr` has last words."""

    def __init__(self, phase: str, why: str, stderr: Iterable[str] = ()) -> None:
        super().__init__(why)
        self.phase = phase
        self.stderr = list(stderr)


class Connection(NamedTuple):
    """A host that we are logged in to.

    `local` is the address of this machine's end of the (first) TCP connection, None for a ProxyCommand. `direct` tells
    that the host sees that connection itself, without a jump host between.
    """

    transport: paramiko.Transport
    local: str | None
    direct: bool
    notes: list[str]
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


class _Eager(socket.socket):
    """A TCP socket that acknowledges at once: each of ssh's exchanges would wait for a delayed acknowledgement."""

    heard = b""  # the first bytes: paramiko does not tell what answers in place of an ssh server

    def recv(self, *args: Any) -> bytes:
        data = super().recv(*args)
        if len(self.heard) < HEARD:
            self.heard += data[:HEARD]
        if hasattr(socket, "TCP_QUICKACK"):  # Linux, where it is forgotten again with each packet
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


def connect(
    host: str, user: str | None, port: int | None, config: Path | None, accept_new: bool, phase: Callable[[str], None]
) -> Connection:
    """Log in to a host; `phase(name)` is called as each phase ends. Raises Refused."""
    try:
        settings = resolve(host, user, port, config)
    except ValueError as error:
        raise Refused("resolve", str(error)) from error
    for attempt in range(1, ATTEMPTS + 1):
        stack = ExitStack()
        try:
            return _connect(settings, config, accept_new, phase, stack)
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
    """The server hung up before the login: it may have too many under way."""


def _connect(
    settings: SshSettings,
    config: Path | None,
    accept_new: bool,
    phase: Callable[[str], None],
    stack: ExitStack,
) -> Connection:
    notes: list[str] = []
    hops = _hops(settings, config)
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
            raise type(error)(name, f"{through}{proxy.why() or error}", proxy.words) from error
    assert transport is not None
    phase("auth")
    return Connection(transport, local, len(hops) == 1, notes, stack)


def _hops(settings: SshSettings, config: Path | None) -> list[SshSettings]:
    """The jump hosts in order, and the host. Only the first one's own configuration tells how it is reached itself."""
    hops = [settings]
    while hops[0].proxy_jump:
        if len(hops) > MOST_HOPS:
            raise Refused("resolve", f"more than {MOST_HOPS} jump hosts: does one of them lead back?")
        hops[:0] = [resolve(*split(hop), config) for hop in hops[0].proxy_jump]
    return hops


def _first_socket(hop: SshSettings, phase: Callable[[str], None], stack: ExitStack) -> tuple[Any, str | None]:
    """A socket to the first hop, and the address of its end here."""
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
            if hasattr(socket, name):  # Linux has all of them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return sock, str(sock.getsockname()[0])
    raise Refused("connect", "; ".join(whys))


def _own_address(hop: SshSettings) -> str | None:
    """This machine's address on the way to a host that a command connects us to."""
    try:
        family, _, _, _, place = socket.getaddrinfo(hop.hostname, hop.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


class _Proxy:
    """What a ProxyCommand connects us to. paramiko's own way is slow and leaves the process behind."""

    running: ClassVar[set[_Proxy]] = set()

    def __init__(self, command: str) -> None:
        self.command = command
        self.words: deque[str] = deque(maxlen=PROXY_LINES)
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
            self.words.append(line.rstrip("\n"))

    def why(self) -> str:
        """That it has ended, and how; nothing while it runs."""
        try:
            status = self._process.wait(PROXY_TIMEOUT)
        except subprocess.TimeoutExpired:
            return ""
        self._reading.join(PROXY_TIMEOUT)
        return f"its ProxyCommand `{self.command}` has ended (exit status {status})"

    def end(self) -> None:
        """With all that it has started: as OpenSSH does when it ends."""
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
    """End the ProxyCommands of this process, whatever it is in the middle of."""
    for proxy in list(_Proxy.running):
        proxy.end()


def _through(transport: paramiko.Transport, hop: SshSettings) -> paramiko.Channel:
    """A connection from a jump host to the next one."""
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
    """Agree on keys with a server whose own key is known for this host."""
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
        transport.start_client(timeout=timeout)  # after that time it goes on as if all were well
        key = transport.get_remote_server_key()
    except (paramiko.SSHException, OSError, EOFError) as error:
        silent = time.monotonic() >= ends
        text = f"nothing was heard within {timeout:g} s" if silent else str(error) or "it hung up"
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
    """With the keys of the agent and of files, in the order that OpenSSH tries them; never with a password."""
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
    return "; ".join(tried) or "there is no key: no agent, and none of the files that ssh_config names"


# Whatever paramiko has to say reaches the user as a Refused.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False
