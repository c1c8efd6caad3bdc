"""What the ssh configuration says of a host: OpenSSH's own answer, or where it is not installed the files read here."""

from __future__ import annotations

import glob
import hashlib
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .known_hosts import SSH_PORT, in_pattern_list

TIMEOUT_S = 20.0  # `Match exec` may run a slow program, and CanonicalizeHostname asks the name servers

# Values by lower-case keyword, as `ssh -G` tells them.
Found = dict[str, list[str]]

_SYSTEM = Path("/etc/ssh")
_DEFAULTS: Mapping[str, Sequence[str]] = {
    "port": [str(SSH_PORT)],
    "identityfile": [f"~/.ssh/id_{kind}" for kind in ("rsa", "ecdsa", "ecdsa_sk", "ed25519", "ed25519_sk")],
    "userknownhostsfile": ["~/.ssh/known_hosts", "~/.ssh/known_hosts2"],
    "globalknownhostsfile": ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"],
}
_ADD_UP = ("identityfile", "certificatefile")  # of every other keyword the first value counts
_INCLUDES = 16  # how deep OpenSSH lets one file include another
_COMMENTED = re.compile(r"""((?:[^"'\s]|\s(?!\s*#)|"[^"]*"|'[^']*')*)\s+#.*""")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}  # seconds


class SshConfigError(ValueError):
    """The ssh configuration is wrong; the text is what ssh says about it."""


@dataclass(frozen=True)
class SshSettings:
    """How ssh would log in to a host. Paths are expanded but may not exist.

    Attributes:
        name: the host as the user wrote it.
        hostname: the name or address to connect to.
        agent: the path of the socket of the ssh agent; None is no agent.
        known_hosts: where the keys of hosts are looked up, and new ones added to the first; () is nowhere.
        proxy_jump: each hop on the way as `[user@]host[:port]`.
        proxy_command: the command for a shell whose input and output are the connection.
        connect_timeout: seconds; None leaves it to the system.
    """

    name: str
    hostname: str
    port: int
    user: str
    identity_files: tuple[Path, ...]
    certificate_files: tuple[Path, ...]
    identities_only: bool
    agent: str | None
    known_hosts: tuple[Path, ...]
    global_known_hosts: tuple[Path, ...]
    host_key_alias: str | None
    hash_known_hosts: bool
    proxy_jump: tuple[str, ...]
    proxy_command: str | None
    connect_timeout: float | None

    @property
    def known_hosts_name(self) -> str:
        """The name under which the key of the host is kept in known_hosts files."""
        return self.host_key_alias or self.hostname

    @property
    def known_hosts_port(self) -> int:
        """The port that belongs to `known_hosts_name`: an alias stands for name and port."""
        return SSH_PORT if self.host_key_alias else self.port


def resolve(
    host: str, user: str | None = None, port: int | None = None, config: Path | None = None, ssh: str | None = "ssh"
) -> SshSettings:
    """The settings for a host; `user` and `port` win over the files.

    `config` is read in place of both the user's file and the system's, as in `ssh -F`. `ssh` is the program to ask;
    where there is none the files are read here, without CanonicalizeHostname and without the criteria of Match that
    are younger than OpenSSH 9.2. Raises SshConfigError.
    """
    program = ssh and shutil.which(ssh)
    found = _ask(program, host, user, port, config) if program else _read(host, user, port, config)
    tokens = _tokens(host, found)

    def first(keyword: str) -> str | None:
        value = found.get(keyword, ["none"])[0]
        return None if value.lower() == "none" else value

    def paths(keyword: str, *, expand: bool) -> tuple[Path, ...]:
        values = [value for value in found.get(keyword, []) if value.lower() != "none"]
        return tuple(Path(_path(value, tokens) if expand else _home(value)) for value in values)

    jump, command = first("proxyjump"), first("proxycommand")
    return SshSettings(
        name=host,
        hostname=found["hostname"][0],
        port=_port(found["port"][0]),
        user=found["user"][0],
        identity_files=paths("identityfile", expand=True),
        certificate_files=paths("certificatefile", expand=True),
        identities_only=_yes(first("identitiesonly")),
        agent=_agent(found.get("identityagent", ["SSH_AUTH_SOCK"])[0], tokens),
        known_hosts=paths("userknownhostsfile", expand=False),
        global_known_hosts=paths("globalknownhostsfile", expand=False),
        host_key_alias=first("hostkeyalias"),
        hash_known_hosts=_yes(first("hashknownhosts")),
        proxy_jump=tuple(_hop(hop) for hop in _fill(jump, tokens).split(",")) if jump else (),
        proxy_command=_fill(command, tokens) if command else None,
        connect_timeout=_seconds(first("connecttimeout")),
    )


def split(hop: str) -> tuple[str, str | None, int | None]:
    """Host, user and port of a `[user@]host[:port]`, as `resolve` takes them. Raises SshConfigError."""
    parts = re.fullmatch(r"(?:(.+)@)?(?:\[([^\[\]]+)\]|([^-:@\[\]][^:@\[\]]*))(?::(\d+))?", hop)
    if parts is None:
        raise SshConfigError(f"the ssh configuration says ProxyJump {hop}, which is not [user@]host[:port]")
    return parts[2] or parts[3], parts[1], None if parts[4] is None else _port(parts[4])


def _ask(ssh: str, host: str, user: str | None, port: int | None, config: Path | None) -> Found:
    """What `ssh -G` prints; it has expanded HostName and the known_hosts files, but nothing else."""
    command = [ssh, "-G", "-T"]
    for option, value in (("-F", config), ("-l", user), ("-p", port)):
        if value is not None:
            command += [option, str(value)]
    answer = _run([*command, "--", host])
    if answer.returncode != 0:
        said = "; ".join(line.strip() for line in answer.stderr.splitlines()) or f"exit status {answer.returncode}"
        raise SshConfigError(f"{host}: ssh does not accept its configuration: {said}")
    found: Found = {}
    for line in answer.stdout.split("\n"):
        keyword, _, value = line.partition(" ")
        found.setdefault(keyword, []).append(value)
    for keyword in ("userknownhostsfile", "globalknownhostsfile"):
        # The paths come without quotes. As they are absolute, a space before anything but / is part of a path.
        found[keyword] = re.split(r" (?=[/~])", found[keyword][0])
    return found


def _read(host: str, user: str | None, port: int | None, config: Path | None) -> Found:
    """The same as from `ssh -G`, from the files themselves."""
    given = {"user": user, "port": None if port is None else str(port)}
    reader = _Reader(host, {keyword: [value] for keyword, value in given.items() if value is not None})
    own = Path(_home("~/.ssh"))
    if config is not None and not config.exists():
        raise SshConfigError(f"{host}: there is no file {config}")
    files = [(config, own)] if config else [(own / "config", own), (_SYSTEM / "ssh_config", _SYSTEM)]
    for reader.final in (False, True):
        for path, folder in files:
            reader.read(path, folder)
        if not reader.wants_final:
            break
        reader.found["hostname"] = [reader.hostname.replace("%", "%%")]  # the second reading does not change it
    found = {**{keyword: [*values] for keyword, values in _DEFAULTS.items()}, **reader.found}
    found["hostname"] = [reader.hostname]
    found.setdefault("user", [_account()[0]])
    found["hostkeyalias"] = [alias.lower() for alias in found.get("hostkeyalias", ["none"])]
    tokens = _tokens(host, found)
    found["userknownhostsfile"] = [_path(value, tokens) for value in found["userknownhostsfile"]]
    return found


class _Reader:
    """Collects what configuration files say of one host, in the order in which OpenSSH reads them."""

    def __init__(self, host: str, found: Found) -> None:
        self.host = host
        self.found = found
        self.final = False  # the second reading, which there is where the first one met `Match final`
        self.wants_final = False

    @property
    def hostname(self) -> str:
        """The name to connect to, as far as it is known by now."""
        return _fill(self.found.get("hostname", ["%h"])[0], {"h": self.host, "%": "%"}).lower()

    def read(self, path: Path, folder: Path, depth: int = 0) -> None:
        """Read one file; `folder` is where relative names after Include start."""
        if depth > _INCLUDES:
            raise SshConfigError(f"{path}: Include goes more than {_INCLUDES} files deep")
        try:
            lines = path.read_text("utf-8", "surrogateescape").split("\n")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return
        except OSError as error:
            raise SshConfigError(f"{path} cannot be read: {error.strerror}") from error
        active = True  # within the block of the file that includes this one
        for number, line in enumerate(lines, 1):
            try:
                keyword, words = _split(line.strip())
            except ValueError as error:
                raise SshConfigError(f"{path} line {number}: {error}") from None
            if keyword == "host":
                active = in_pattern_list(self.hostname if self.final else self.host, ",".join(words))
            elif keyword == "match":
                active = self._match(words)
            elif keyword == "include" and active:
                for pattern in words:
                    for name in sorted(glob.glob(str(folder / _home(pattern)))):
                        self.read(Path(name), folder, depth + 1)
            elif keyword and active:
                self._set(keyword, words)

    def _set(self, keyword: str, words: list[str]) -> None:
        if keyword in _ADD_UP:
            values = self.found.setdefault(keyword, [])
            values += [word for word in words if word not in values]
        elif keyword not in self.found:
            self.found[keyword] = words
            # Of these two the first counts, but `ProxyJump none` lets a ProxyCommand stand.
            if keyword == "proxycommand":
                self.found["proxyjump"] = ["none"]
            elif keyword == "proxyjump" and words[0].lower() != "none":
                self.found["proxycommand"] = ["none"]

    def _match(self, words: list[str]) -> bool:
        """Whether all criteria of a Match line hold. One that is not known here never does, not even after a `!`."""
        holds = True
        rest = iter(words)
        for word in rest:
            name, _, value = word.removeprefix("!").lower().partition("=")
            if name in ("all", "canonical", "final"):
                self.wants_final |= name == "final"
                fits = self.final or name == "all"
            elif name in ("host", "originalhost", "user", "localuser", "exec"):
                value = word.partition("=")[2] or next(rest, "")
                fits = holds and self._fits(name, value)
            else:
                return False
            holds = holds and fits != word.startswith("!")
        return holds

    def _fits(self, name: str, value: str) -> bool:
        login = _account()[0]
        user = self.found.get("user", [login])[0]
        if name == "exec":
            known = {**_DEFAULTS, **self.found, "hostname": [self.hostname], "user": [user]}
            command = _fill(value, _tokens(self.host, known))
            return _run([os.environ.get("SHELL") or "/bin/sh", "-c", command]).returncode == 0
        if name in ("user", "localuser"):
            return in_pattern_list(user if name == "user" else login, value)
        return in_pattern_list(self.hostname if name == "host" else self.host.lower(), value.lower())


def _split(line: str) -> tuple[str, list[str]]:
    """The keyword, and the words after it; the command of ProxyCommand is one word, quotes and all."""
    if not line or line.startswith("#"):
        return "", []
    parts = re.fullmatch(r"(\w+)(?:\s*=\s*|\s+)(.+)", line)
    if parts is None:
        raise ValueError(f"'{line}' is not a keyword and a value")
    keyword, rest = parts[1].lower(), parts[2]
    if keyword == "proxycommand":
        return keyword, [rest]
    commented = _COMMENTED.fullmatch(rest)
    return keyword, shlex.split(commented[1] if commented else rest)


def _tokens(host: str, found: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What the %-tokens of ssh_config(5) stand for."""
    login, home = _account()
    local = socket.gethostname()
    hostname, port, user = (found[keyword][0] for keyword in ("hostname", "port", "user"))
    alias = found.get("hostkeyalias", ["none"])[0]
    return {
        "%": "%",
        "C": hashlib.sha1(f"{local}{hostname}{port}{user}".encode("utf-8", "surrogateescape")).hexdigest(),
        "d": home,
        "h": hostname,
        "i": str(os.getuid()),
        "k": host if alias == "none" else alias,
        "L": local.partition(".")[0],
        "l": local,
        "n": host,
        "p": port,
        "r": user,
        "u": login,
    }


def _fill(text: str, tokens: Mapping[str, str]) -> str:
    return re.sub(r"%(.)", lambda found: tokens.get(found[1], found[0]), text)


def _path(text: str, tokens: Mapping[str, str]) -> str:
    """The path with ~, %-tokens and ${VARIABLE} in place."""
    text = _fill(_home(text), tokens)
    return re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], found[0]), text)


def _home(text: str) -> str:
    """The path with ~ in place."""
    return _account()[1] + text[1:] if text == "~" or text.startswith("~/") else os.path.expanduser(text)


def _account() -> tuple[str, str]:
    """The login name and the home of this user, from the password database: ssh heeds neither $USER nor $HOME."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:  # a container may run under a number that has no name
        return str(os.getuid()), os.path.expanduser("~")
    return entry.pw_name, entry.pw_dir


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise SshConfigError(f"`{shlex.join(command)}` did not end within {TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise SshConfigError(f"{command[0]} cannot be run: {error.strerror}") from error


def _agent(text: str, tokens: Mapping[str, str]) -> str | None:
    if text.lower() == "none":
        return None
    if variable := re.fullmatch(r"\$(\w+)|(SSH_AUTH_SOCK)", text):
        return os.environ.get(variable[1] or variable[2]) or None
    return _path(text, tokens)


def _hop(text: str) -> str:
    return text.strip().removeprefix("ssh://").rstrip("/")


def _port(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise SshConfigError(f"the ssh configuration says port {text}, which is not a number from 1 to 65535")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if re.fullmatch(r"(\d+[smhdw]?)+", text.lower()) is None:
        raise SshConfigError(f"the ssh configuration says ConnectTimeout {text}, which is not a time as 10 or 1m30")
    return sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+)([smhdw]?)", text.lower())) or None


def _yes(text: str | None) -> bool:
    return text is not None and text.lower() in ("yes", "true")
