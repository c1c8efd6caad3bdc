"""A private sshd on a port of its own, with keys, a known_hosts and an ssh_config that leads to it.

Its sessions run as the user who started it, with an empty HOME: the real ~/.bashrc is not read. They do start in the
real home folder, because sshd takes that from the passwd file.
"""

from __future__ import annotations

import functools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from needs import lacking_programs, program
from processes import all_end, descendants

START_S = 10.0  # it takes 20 ms; this is for a machine that is busy with other things
PORTS = range(20_000, 32_768)  # below those that Linux gives to outgoing connections
PORTS_TRIED = 20
PATH = "/usr/bin:/bin:/usr/sbin:/sbin"  # what sshd gives its sessions

LISTENING = b"Server listening on "
PORT_TAKEN = b"Address already in use"


@dataclass(frozen=True, kw_only=True)
class Sshd:
    """One that runs, and all that it takes to reach it."""

    name: str  # what ssh calls it: the alias in `config`
    address: str
    port: int
    user: str
    jump: Sshd | None  # the host on the way to it
    pid: int

    home: Path  # HOME and TMPDIR of its sessions
    temporary: Path

    config: Path  # an ssh_config that knows this host and those on the way to it
    identity: Path  # the private key that opens it
    known_hosts: Path
    host_key: Path  # the public half
    log: Path  # what it and its sessions' sshd processes complain of

    def command(self, *words: str) -> list[str]:
        """The ssh command line that runs a shell command there."""
        return [program("ssh") or "ssh", "-F", str(self.config), self.name, *words]

    def sessions(self) -> set[int]:
        """The processes that logins have brought about: sshd's own, and what they run. No orphans."""
        return descendants(self.pid)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def sshd_works() -> str:
    """Gives "" or the reason why there can be no private sshd here."""
    return lacking_programs("sshd", "ssh", "ssh-keygen")


@contextmanager
def private_sshd(
    folder: Path,
    *,
    address: str = "127.0.0.1",
    namespace: str | None = None,
    options: Mapping[str, str] = {},
    environment: Mapping[str, str] = {},
    name: str = "testhost",
    home: Path | None = None,
    jump: Sshd | None = None,
) -> Iterator[Sshd]:
    """Runs an sshd and ends it, with all sessions that are still on.

    A process that has left its session (a daemon) is not ended: nobody asked for it, so the test is to fail for it.

    Args:
        folder: where its files go, below `name`; they stay, for a look after a failure.
        address: what it listens on.
        namespace: the network namespace that it runs in.
        options: lines of sshd_config, each instead of ours of that name. LogLevel has to be INFO or more talkative.
        environment: variables of its sessions besides HOME, TMPDIR and QJAM_TEST_SESSION, or instead of them.
        name: the alias of the host in the ssh_config.
        home: HOME of its sessions; an empty folder unless given.
        jump: the host through which ssh has to go.

    Raises:
        RuntimeError: it did not start; the message holds its log.
    """
    own = folder / name
    home = home or own / "home"
    home.mkdir(parents=True, exist_ok=True)
    own.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's empty root folder; Debian's service makes it

    client, host = _key("client"), _key("host")
    identity = _written(own / "identity", client.private)
    _written(own / "host_key", host.private)
    _written(own / "authorized_keys", client.public)
    log = own / "log"

    # Not in `folder`: the path of a unix socket may have 108 bytes, and pytest's folders have long names.
    temporary = Path(tempfile.mkdtemp(prefix="host-"))
    process = None
    try:
        variables = {"HOME": str(home), "TMPDIR": str(temporary), **_path_of_sessions(own)}
        if "QJAM_TEST_SESSION" in os.environ:
            variables["QJAM_TEST_SESSION"] = os.environ["QJAM_TEST_SESSION"]
        lines = _sshd_config(own, address, {**variables, **environment}, options)
        process, port = _start(own, lines, log, namespace)
        sshd = Sshd(
            name=name,
            address=address,
            port=port,
            user=pwd.getpwuid(os.getuid()).pw_name,
            jump=jump,
            pid=process.pid,
            home=home,
            temporary=temporary,
            config=own / "ssh_config",
            identity=identity,
            known_hosts=_written(own / "known_hosts", f"[{address}]:{port} {host.public}"),
            host_key=_written(own / "host_key.pub", host.public),
            log=log,
        )
        write_config(sshd.config, [sshd])
        yield sshd
    finally:
        if process is not None:
            _end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def write_config(path: Path, sshds: Iterable[Sshd]) -> Path:
    """Writes an ssh_config that leads to all of these, and to the hosts on the way to them; gives its path."""
    known: dict[str, Sshd] = {}
    for sshd in sshds:
        on_the_way: Sshd | None = sshd
        while on_the_way is not None:
            known[on_the_way.name] = on_the_way
            on_the_way = on_the_way.jump
    return _written(path, "\n".join(map(_ssh_config, known.values())))


def _ssh_config(sshd: Sshd) -> str:
    lines = [
        f"Host {sshd.name}",
        f"HostName {sshd.address}",
        f"Port {sshd.port}",
        f"User {sshd.user}",
        f"IdentityFile {_quoted(sshd.identity)}",
        "IdentitiesOnly yes",
        "IdentityAgent none",
        f"UserKnownHostsFile {_quoted(sshd.known_hosts)}",
        "GlobalKnownHostsFile /dev/null",
        "BatchMode yes",
    ]
    if sshd.jump is not None:
        lines.append(f"ProxyJump {sshd.jump.name}")
    return "\n    ".join(lines) + "\n"


def bare_python() -> str:
    """A python of the version that runs the tests, for functions travel as its byte code, without our packages: the
    system's, or the one that the tests' environment was made from.
    """
    there = shutil.which("python3", path=PATH)
    same = there is not None and _version(there) == _version(sys.executable)
    return there if there is not None and same else str(Path(sys.executable).resolve())


def _path_of_sessions(own: Path) -> dict[str, str]:
    """A PATH on which `python3` is that one."""
    python = bare_python()
    if python == shutil.which("python3", path=PATH):
        return {}
    folder = own / "bin"
    folder.mkdir()
    (folder / "python3").symlink_to(python)
    return {"PATH": f"{folder}:{PATH}"}


@functools.cache
def _version(python: str) -> str:
    return subprocess.check_output([python, "-c", "import sys; print(sys.version_info[:2])"], text=True)


def _sshd_config(own: Path, address: str, variables: Mapping[str, str], options: Mapping[str, str]) -> str:
    """All of sshd_config but the port."""
    lines = {
        "ListenAddress": address,
        "HostKey": _quoted(own / "host_key"),
        "AuthorizedKeysFile": _quoted(own / "authorized_keys"),
        "PidFile": "none",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "StrictModes": "no",  # of a folder in /tmp
        "UsePAM": "no",
        "UseDNS": "no",
        "PrintMotd": "no",
        "PrintLastLog": "no",
        # Nothing of the real home folder, nothing of the client's environment.
        "PermitUserEnvironment": "no",
        "PermitUserRC": "no",
        # sshd heeds the first SetEnv line alone.
        "SetEnv": " ".join(_quoted(f"{name}={value}") for name, value in variables.items()),
        # OpenSSH's defaults, whatever the distribution's are.
        "MaxStartups": "10:30:100",
        "MaxSessions": "10",
        "Subsystem": "sftp internal-sftp",
    }
    given = {name.lower() for name in options}
    lines = {name: value for name, value in lines.items() if name.lower() not in given} | dict(options)
    return "".join(f"{name} {value}\n" for name, value in lines.items())


def _start(own: Path, lines: str, log: Path, namespace: str | None) -> tuple[subprocess.Popen[bytes], int]:
    """Gives an sshd that listens, and its port."""
    config = own / "sshd_config"
    within = [program("ip") or "ip", "netns", "exec", namespace] if namespace else []
    # By its absolute path, because it starts itself anew for each connection.
    command = [*within, program("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", str(config)]
    for _ in range(PORTS_TRIED):
        port = secrets.choice(PORTS)
        _written(config, f"Port {port}\n{lines}")
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for the tests alone, which end it in their own time
            )
        try:
            if _listens(process, log):
                return process, port
        except BaseException:
            _end(process)
            raise
        if PORT_TAKEN not in log.read_bytes():
            raise RuntimeError(f"sshd ended with status {process.returncode}:\n{log.read_text(errors='replace')}")
    raise RuntimeError(f"{PORTS_TRIED} ports between {PORTS[0]} and {PORTS[-1]} were all taken on this machine")


def _listens(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits for it to listen, and tells whether it does or has ended instead.

    Its log knows best. A connection could reach a stranger who had the port before, would count as a login that is
    under way (MaxStartups), and from here there may be no way at all to where it listens.
    """
    deadline = time.monotonic() + START_S
    while LISTENING not in (said := log.read_bytes()):
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise RuntimeError(f"sshd has not listened within {START_S:.0f} s:\n{said.decode(errors='replace')}")
        time.sleep(0.001)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends an sshd and its sessions.

    All are stopped before the first is killed, so that none starts another, or loses its parent, unseen.
    """
    stopped: set[int] = set()
    if process.poll() is None:
        while more := ({process.pid} | descendants(process.pid)) - stopped:
            for pid in more:
                _signal(pid, signal.SIGSTOP)
            stopped |= more
    for pid in stopped:
        _signal(pid, signal.SIGKILL)
    process.wait()
    if not all_end(stopped):
        raise RuntimeError(f"sessions of the test's sshd do not end: {sorted(stopped)}")


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class _Key(NamedTuple):
    private: str
    public: str


@functools.cache
def _key(purpose: str) -> _Key:
    """One key pair for each purpose in this process; kept as text, so that it is nobody's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, purpose)
        command = [program("ssh-keygen") or "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        return _Key(path.read_text(), path.with_suffix(".pub").read_text())


def _written(path: Path, text: str) -> Path:
    """Writes a file that is for its owner alone, as ssh wants it of a private key."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def _quoted(word: object) -> str:
    text = str(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
