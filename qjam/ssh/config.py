"""The ssh settings of a host: `ssh -G` tells them; where OpenSSH is not installed, qjam reads the ssh_config files."""

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

TIMEOUT_S = 20.0  # of `ssh -G`: `Match exec` may run a slow program, CanonicalizeHostname queries name servers

# The values of each keyword (in lower case), as `ssh -G` prints them.
Found = dict[str, list[str]]

_SYSTEM = Path("/etc/ssh")
_DEFAULTS: Mapping[str, Sequence[str]] = {
    "port": [str(SSH_PORT)],
    "identityfile": [f"~/.ssh/id_{kind}" for kind in ("rsa", "ecdsa", "ecdsa_sk", "ed25519", "ed25519_sk")],
    "userknownhostsfile": ["~/.ssh/known_hosts", "~/.ssh/known_hosts2"],
    "globalknownhostsfile": ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"],
}
_REPEATABLE = ("identityfile", "certificatefile")  # every value counts; of any other keyword the first value
MAX_INCLUDE_DEPTH = 16  # as in OpenSSH
_COMMENTED = re.compile(r"""((?:[^"'\s]|\s(?!\s*#)|"[^"]*"|'[^']*')*)\s+#.*""")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}  # seconds


class SshConfigError(ValueError):
    """The ssh configuration is wrong, or qjam cannot read it; the text says where and why."""


@dataclass(frozen=True)
class SshSettings:
    """How ssh would log in to a host. Paths are expanded but may not exist.

    Attributes:
        name: the host as the user wrote it.
        hostname: the name or address to connect to.
        agent: the path of the socket of the ssh agent; None is no agent.
        known_hosts: the user's known_hosts files; new host keys go to the first one.
        proxy_jump: the jump hosts, first hop first, each as `[user@]host[:port]`.
        proxy_command: a shell command whose stdin and stdout are the connection to the host.
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
        """The name to look the host up by in known_hosts files."""
        return self.host_key_alias or self.hostname

    @property
    def known_hosts_port(self) -> int:
        """The port to look the host up by in known_hosts files: HostKeyAlias replaces both name and port."""
        return SSH_PORT if self.host_key_alias else self.port


def resolve(
    host: str, user: str | None = None, port: int | None = None, config: Path | None = None, ssh: str | None = "ssh"
) -> SshSettings:
    """The settings for a host; `user` and `port` override the configuration.

    `config` replaces both the user's file and the system's, as in `ssh -F`. `ssh` is the program to ask. Without it
    qjam reads the files itself: it ignores CanonicalizeHostname and refuses every Match but `Match all`.
    Raises SshConfigError.
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
    """The settings that `ssh -G` prints. It expands %-tokens in HostName and UserKnownHostsFile only."""
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
        # ssh prints the paths without quotes. All are absolute, so a space that no / or ~ follows is part of a path.
        found[keyword] = re.split(r" (?=[/~])", found[keyword][0])
    return found


def _read(host: str, user: str | None, port: int | None, config: Path | None) -> Found:
    """The settings as `ssh -G` would print them, read from the files."""
    found: Found = {} if user is None else {"user": [user]}
    if port is not None:
        found["port"] = [str(port)]
    own = Path(_home("~/.ssh"))
    if config is not None and not config.exists():
        raise SshConfigError(f"{host}: there is no file {config}")
    for path, folder in [(config, own)] if config else [(own / "config", own), (_SYSTEM / "ssh_config", _SYSTEM)]:
        _read_file(path, folder, host, found)
    found = {**{keyword: [*values] for keyword, values in _DEFAULTS.items()}, **found}
    found["hostname"] = [_fill(found.get("hostname", ["%h"])[0], {"h": host, "%": "%"}).lower()]
    found.setdefault("user", [_account()[0]])
    found["hostkeyalias"] = [alias.lower() for alias in found.get("hostkeyalias", ["none"])]
    tokens = _tokens(host, found)
    found["userknownhostsfile"] = [_path(value, tokens) for value in found["userknownhostsfile"]]
    return found


def _read_file(path: Path, folder: Path, host: str, found: Found, depth: int = 0) -> None:
    """Add what one file says of `host` to `found`. A relative path in an Include starts at `folder`."""
    if depth > MAX_INCLUDE_DEPTH:
        raise SshConfigError(f"{path}: Include goes more than {MAX_INCLUDE_DEPTH} files deep")
    try:
        lines = path.read_text("utf-8", "surrogateescape").split("\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return
    except OSError as error:
        raise SshConfigError(f"{path} cannot be read: {error.strerror}") from error
    active = True  # whether the lines of this block are for `host`
    for number, line in enumerate(lines, 1):
        try:
            keyword, words = _split(line.strip())
        except ValueError as error:
            raise SshConfigError(f"{path} line {number}: {error}") from None
        if keyword == "host":
            active = in_pattern_list(host, ",".join(words))
        elif keyword == "match":
            active = True  # it is `Match all`
        elif keyword == "include" and active:
            for pattern in words:
                for name in sorted(glob.glob(str(folder / _home(pattern)))):
                    _read_file(Path(name), folder, host, found, depth + 1)
        elif keyword and active:
            _set(found, keyword, words)


def _set(found: Found, keyword: str, words: list[str]) -> None:
    if keyword in _REPEATABLE:
        values = found.setdefault(keyword, [])
        values += [word for word in words if word not in values]
    elif keyword not in found:
        found[keyword] = words
        # The first of ProxyCommand and ProxyJump counts, but after `ProxyJump none` a ProxyCommand still counts.
        if keyword == "proxycommand":
            found["proxyjump"] = ["none"]
        elif keyword == "proxyjump" and words[0].lower() != "none":
            found["proxycommand"] = ["none"]


def _split(line: str) -> tuple[str, list[str]]:
    """The keyword of a line and its arguments. Raises ValueError. A ProxyCommand is one argument, quotes included."""
    if not line or line.startswith("#"):
        return "", []
    parts = re.fullmatch(r"(\w+)(?:\s*=\s*|\s+)(.+)", line)
    if parts is None:
        raise ValueError(f"'{line}' is not a keyword and a value")
    keyword, rest = parts[1].lower(), parts[2]
    if keyword == "proxycommand":
        return keyword, [rest]
    commented = _COMMENTED.fullmatch(rest)
    words = shlex.split(commented[1] if commented else rest)
    if keyword == "match" and [word.lower() for word in words] != ["all"]:
        raise ValueError(
            f"qjam cannot read `{line}` itself: install an OpenSSH client (`ssh`) on this machine, "
            "or name another file with ssh_config= or QJAM_SSH_CONFIG"
        )
    return keyword, words


def _tokens(host: str, found: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The value of each %-token of ssh_config(5)."""
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
    """Expand ~, %-tokens and ${VARIABLE}."""
    text = _fill(_home(text), tokens)
    return re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], found[0]), text)


def _home(text: str) -> str:
    """Expand ~."""
    return _account()[1] + text[1:] if text == "~" or text.startswith("~/") else os.path.expanduser(text)


def _account() -> tuple[str, str]:
    """Login name and home directory from the password database: ssh ignores $USER and $HOME."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:  # a container may run under a uid that has no name
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
