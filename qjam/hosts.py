"""HostSpec, and how the user's `hosts` ("alice@node1:2222*8", 4, None, a list) become a list of HostSpecs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral

LOCAL = "local"
SERIAL = "serial"
# The variable that decides what hash(text) is; python reads it when it starts.
HASH_SEED = "PYTHONHASHSEED"

_FORM = (
    "write [user@]host[:port][*workers], as in 'alice@node1:2222*8', 'node2*auto' or '[::1]:22'; "
    "'local*4' is this machine without ssh"
)
# Characters that a name may not contain. ssh would read a leading '-' as an option, and a ProxyCommand passes %h and %r
# to a shell (CVE-2023-51385).
_NOT = r"\s:*,/\[\]\x00-\x1f\x7f`'\"$\\;&<>|(){}"
_USER = rf"(?!-)[^{_NOT}]+"
_NAME = rf"(?!-)[^@{_NOT}]+"
_IPV6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(?:%[\w.-]+)?"
_SPEC = re.compile(
    rf"(?:(?P<user>{_USER})@)?(?:(?P<name>{_NAME})|\[(?P<ipv6>{_IPV6})\])"
    r"(?::(?P<port>[0-9]{1,9}))?(?:\*(?P<workers>-?[0-9]{1,9}|auto))?"
)


@dataclass(frozen=True)
class HostSpec:
    """One host, and how to start workers on it.

    Attributes:
        host: a name that ssh knows, an address (IPv6 without brackets), `local`: this machine without ssh, or `serial`:
            the calling process.
        user: the name to log in with; None: as the ssh configuration says.
        port: the port of the ssh server; None: as the ssh configuration says.
        workers: the number of workers; None (`auto`): one worker per usable core of that host.
        python: the shell command that starts python on the host; None: QJAM_REMOTE_PYTHON if it is set, else python3.
        env: environment variables for the workers. They are sent over ssh's stdin, so no list of processes shows them
            (but PYTHONHASHSEED, which python reads when it starts).
        setup: a line that the login shell runs before it starts python, such as `module load python` or
            `. venv/bin/activate`.

    Raises TypeError or ValueError if an attribute is wrong.
    """

    host: str
    user: str | None = None
    port: int | None = None
    workers: int | None = 1
    python: str | None = None
    env: Mapping[str, str] | None = field(default=None, hash=False)
    setup: str | None = None

    def __post_init__(self) -> None:
        _check_text("host", self.host, rf"{_NAME}|{_IPV6}")
        if self.host.isdecimal():
            raise ValueError(
                f"hosts: '{self.host}' is a number, not a host: for {self.host} workers on this machine write "
                f"'local*{self.host}'"
            )
        if self.user is not None:
            _check_text("user", self.user, _USER)
        if self.port is not None:
            _check_number("port", self.port)
        if self.workers is not None:
            _check_number("workers", self.workers)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"hosts: '{self}': the port must be from 1 to 65535, not {self.port}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(
                f"hosts: '{self}': the number of workers must be at least 1, or auto for one per usable core, "
                f"not {self.workers}"
            )
        if self.local and self.address != LOCAL:
            raise ValueError(
                f"hosts: '{self}': 'local' is this machine without ssh and has no user and no port; "
                "to reach this machine by ssh write 'localhost'"
            )
        if self.serial and (self.address, self.workers) != (SERIAL, 1):
            raise ValueError(
                f"hosts: '{self}': 'serial' is the calling process and has no user, no port and no number of workers"
            )
        for name in ("python", "setup"):
            _check_line(name, getattr(self, name))
        _check_env(self.env)
        if (self.local or self.serial) and (self.python, self.env, self.setup) != (None, None, None):
            raise ValueError(f"hosts: '{self}': python, env and setup are for hosts that are reached by ssh")

    @property
    def local(self) -> bool:
        """True for this machine without ssh."""
        return self.host == LOCAL

    @property
    def serial(self) -> bool:
        """True for the calling process."""
        return self.host == SERIAL

    @property
    def address(self) -> str:
        """`[user@]host[:port]`, an IPv6 address in brackets."""
        user = "" if self.user is None else f"{self.user}@"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{user}{host}{port}"

    def __str__(self) -> str:
        """The text from which `parse` creates this HostSpec; it has no python, env and setup."""
        if self.workers == 1:
            return self.address
        return f"{self.address}*{'auto' if self.workers is None else self.workers}"


Hosts = int | str | HostSpec | Iterable[str | HostSpec] | None


def parse(text: str) -> HostSpec:
    """Return the HostSpec of a text `[user@]host[:port][*workers]`. Without `*workers` it has one worker.

    Raises ValueError, which quotes the text and the right form.
    """
    found = _SPEC.fullmatch(text)
    if found is None:
        raise ValueError(f"hosts: {text!r} is not a host: {_FORM}")
    port, workers = found["port"], found["workers"]
    return HostSpec(
        host=found["name"] or found["ipv6"],
        user=found["user"],
        port=None if port is None else int(port),
        workers=1 if workers is None else None if workers == "auto" else int(workers),
    )


def resolve(hosts: Hosts) -> list[HostSpec]:
    """Return the hosts to start, each once, in the order in which they were first named.

    None is one worker per usable core of this machine; a number is that many workers on this machine. A text may name
    several hosts, separated by spaces or commas. If a host is named again, its workers add up.

    Raises TypeError or ValueError, which names the wrong part of `hosts` and says what would be right.
    """
    merged: dict[str, HostSpec] = {}
    for spec in _specs(hosts):
        known = merged.get(spec.address)
        if known is None:
            merged[spec.address] = spec
        elif known.workers is None or spec.workers is None:
            raise ValueError(
                f"hosts: '{spec.address}' is named more than once, and once with *auto, which already is one "
                f"worker per usable core; write '{spec.address}*auto' once, or numbers only"
            )
        elif (known.python, known.env, known.setup) != (spec.python, spec.env, spec.setup):
            raise ValueError(f"hosts: '{spec.address}' is named more than once, with other python, env or setup")
        else:
            merged[spec.address] = replace(known, workers=known.workers + spec.workers)
    if not merged:
        raise ValueError("hosts: no host is named; give one, or None for all usable cores of this machine")
    if SERIAL in merged and len(merged) > 1:
        raise ValueError("hosts: 'serial' runs everything in the calling process; it cannot be one of several hosts")
    return list(merged.values())


def _specs(hosts: object) -> list[HostSpec]:
    if hosts is None:
        return [HostSpec(LOCAL, workers=None)]
    if isinstance(hosts, (str, HostSpec)):
        return _item(hosts)
    # A mapping is refused: its values, surely numbers of workers, would be lost without an error.
    if isinstance(hosts, Iterable) and not isinstance(hosts, (bytes, bytearray, memoryview, Mapping)):
        return [spec for item in hosts for spec in _item(item)]
    if isinstance(hosts, bool) or not isinstance(hosts, Integral):
        raise TypeError(
            "hosts must be None, a number of workers on this machine, a text, a HostSpec, or a list of texts "
            f"and HostSpecs, not {hosts!r} ({type(hosts).__name__}); {_FORM}"
        )
    return [HostSpec(LOCAL, workers=int(hosts))]


def _item(item: object) -> list[HostSpec]:
    if isinstance(item, HostSpec):
        return [item]
    if isinstance(item, str):
        return [parse(part) for part in re.split(r"[\s,]+", item) if part]
    raise TypeError(f"hosts: {item!r} ({type(item).__name__}) is neither a text nor a HostSpec; {_FORM}")


def _check_text(name: str, value: object, pattern: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"hosts: {name} must be a text, not {value!r} ({type(value).__name__})")
    if re.fullmatch(pattern, value) is None:
        raise ValueError(f"hosts: {value!r} cannot be a {name}; {_FORM}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        none = "None (one per usable core)" if name == "workers" else "None"
        raise TypeError(f"hosts: {name} must be an int or {none}, not {value!r} ({type(value).__name__})")


def _check_line(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"hosts: {name} must be a text or None, not {value!r} ({type(value).__name__})")
    if not value.strip() or any(character in value for character in "\0\n\r"):
        raise ValueError(f"hosts: {name} must be one line of a shell, not {value!r}")


def _check_env(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"hosts: env must be a dict of texts, not {value!r} ({type(value).__name__})")
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"hosts: env must be a dict of texts; {name!r}: {text!r} is not")
        if not name or "=" in name or "\0" in name + text:
            raise ValueError(f"hosts: env: {name!r} cannot be an environment variable")
