"""Whether a host shows the key that the known_hosts files have for it, decided as OpenSSH does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

SSH_PORT = 22


class Status(Enum):
    """What the known_hosts files say about the key of a host."""

    KNOWN = "known"  # this key is there
    UNKNOWN = "unknown"  # there is no key for this host
    CHANGED = "changed"  # there are only other keys for this host, of whatever type
    REVOKED = "revoked"  # this key is marked @revoked


@dataclass(frozen=True)
class Verdict:
    """What was found, and the line (from 1) that says so; an unknown key has none."""

    status: Status
    path: Path | None = None
    line: int = 0

    @property
    def known(self) -> bool:
        """Whether the host may be trusted."""
        return self.status is Status.KNOWN

    @property
    def unknown(self) -> bool:
        """Whether accept-new would take the key."""
        return self.status is Status.UNKNOWN


@dataclass(frozen=True)
class Entry:
    """One line of a known_hosts file; `hosts` is its first field, `blob` the public key as it goes over the wire."""

    path: Path
    line: int
    revoked: bool
    hosts: str
    key_type: str
    blob: bytes

    def matches(self, name: str) -> bool:
        """Whether the line is about the host that `lookup_name` calls so."""
        if not self.hosts.startswith("|"):
            return in_pattern_list(name, self.hosts.lower())
        try:
            _, _, salt, _ = self.hosts.split("|")
            return self.hosts == _hashed(name, base64.b64decode(salt, validate=True))
        except ValueError:
            return False


class KnownHosts:
    """The keys of known_hosts files (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT").

    Lines marked @cert-authority are left out: they vouch for certificates alone, never for a plain key.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> KnownHosts:
        """Files that cannot be read and lines that cannot be understood count as empty, as in OpenSSH."""
        return cls(entry for path in paths for entry in _entries(path))

    def key_types(self, name: str, port: int) -> list[str]:
        """The types of the good keys of this host, each once, in the order of the files."""
        entries = self._of(name, port) or self._of(name, SSH_PORT)
        revoked = {entry.blob for entry in entries if entry.revoked}
        return list(dict.fromkeys(entry.key_type for entry in entries if entry.blob not in revoked))

    def check(self, name: str, port: int, key_type: str, blob: bytes) -> Verdict:
        """What the files say of this key: @revoked wins over every other line, the same key over another one.

        A host that is known by keys of other types alone has CHANGED, as in OpenSSH: whoever pretends to be the
        host could else just show a key of another type. Therefore negotiate the `key_types` first. Where the port is
        another than 22 and the host is unknown with it, its key for port 22 will do, also as in OpenSSH.
        """
        entries = self._of(name, port)
        same = [entry for entry in entries if entry.blob == blob]
        for entry in same:
            if entry.revoked:
                return Verdict(Status.REVOKED, entry.path, entry.line)
        if same:
            return Verdict(Status.KNOWN, same[0].path, same[0].line)
        others = [entry for entry in entries if not entry.revoked]
        if not others:
            plain = Verdict(Status.UNKNOWN) if port == SSH_PORT else self.check(name, SSH_PORT, key_type, blob)
            return plain if plain.status in (Status.KNOWN, Status.REVOKED) else Verdict(Status.UNKNOWN)
        conflict = next((entry for entry in others if entry.key_type == key_type), others[0])
        return Verdict(Status.CHANGED, conflict.path, conflict.line)

    def _of(self, name: str, port: int) -> list[Entry]:
        wanted = lookup_name(name, port)
        return [entry for entry in self.entries if entry.matches(wanted)]


def lookup_name(name: str, port: int) -> str:
    """The host as known_hosts files name it: `[name]:port`, or the bare name where the port is 22."""
    return (name if port == SSH_PORT else f"[{name}]:{port}").lower()


def in_pattern_list(text: str, patterns: str) -> bool:
    """Whether one of the patterns (commas between them, with * and ?) fits and none of those with a ! does."""
    found = False
    for pattern in patterns.split(","):
        if fnmatchcase(text, pattern.removeprefix("!").replace("[", "[[]")):  # OpenSSH has no [a-z]
            if pattern.startswith("!"):
                return False
            found = True
    return found


def fingerprint(blob: bytes) -> str:
    """The SHA256 fingerprint of a public key, as `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def record(path: Path, name: str, port: int, key_type: str, blob: bytes, hashed: bool = False) -> None:
    """Append the key to a known_hosts file unless it is there; `hashed` keeps the name from who reads the file.

    The file and its folder are made where they are missing, for this user alone. Each line is one write, so several
    processes may append at once. Raises OSError where the file cannot be written.
    """
    if KnownHosts.read([path]).check(name, port, key_type, blob).known:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(file).st_size
        start = "\n" if size and os.pread(file, 1, size - 1) != b"\n" else ""
        os.write(file, f"{start}{_line(name, port, key_type, blob, hashed)}\n".encode())
    finally:
        os.close(file)


def refusal(
    host: str, name: str, port: int, key_type: str, blob: bytes, verdict: Verdict, files: Sequence[Path]
) -> str:
    """Why the key of `host` (as the user wrote it) is refused, and the commands that would have it accepted.

    `files` are the user's known_hosts files; an unknown key would be added to the first.
    """
    kind = next((kind for kind in ("ed25519", "ecdsa", "rsa") if kind in key_type), "dsa")
    shown = f"It showed a key of type {key_type} with the fingerprint\n    {fingerprint(blob)}"
    compare = f"Compare it with what the host itself prints for\n    ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub"
    line = shlex.quote(_line(name, port, key_type, blob))
    if verdict.status is Status.REVOKED:
        return (
            f"{host}: its host key is revoked ({verdict.path}, line {verdict.line}): whoever has stolen the key can "
            f"pretend to be this host.\n{shown}\n"
            "qjam never connects to it. Give the host a new key, or ask whoever wrote that line why it is there."
        )
    if verdict.status is Status.CHANGED:
        file = shlex.quote(str(verdict.path))
        return (
            f"{host}: its host key is not the one in {verdict.path}, line {verdict.line}.\nWARNING: this may be an "
            "attack by a machine that pretends to be the host; or the host was installed anew or got another key.\n"
            f"{shown}\n{compare}\nOnly if they are equal, replace the known key with:\n"
            f"    ssh-keygen -f {file} -R {shlex.quote(lookup_name(name, port))}\n    echo {line} >> {file}"
        )
    accept = 'host_keys="accept-new" (qjam-doctor: --accept-new), which trusts the first key that a host shows'
    unknown = f"{host}: its host key is not known, so it could be any machine.\n{shown}\n{compare}\n"
    if not files:
        return (
            f"{unknown}The ssh configuration names no UserKnownHostsFile to add it to: set one, or pass\n    {accept}."
        )
    file = shlex.quote(str(files[0]))
    folder = files[0].parent
    made = "" if folder.is_dir() else f"mkdir -p -m 700 {shlex.quote(str(folder))} && "
    return f"{unknown}If they are equal, add it with:\n    {made}echo {line} >> {file}\nor pass\n    {accept}."


def _entries(path: Path) -> Iterator[Entry]:
    try:
        lines = path.read_text("utf-8", "replace").split("\n")
    except OSError:
        return
    for number, line in enumerate(lines, 1):
        marker, *fields = line.split() if line.lstrip().startswith("@") else ["", *line.split()]
        if marker not in ("", "@revoked") or len(fields) < 3 or fields[0].startswith("#"):
            continue
        hosts, key_type, text = fields[:3]
        try:
            blob = base64.b64decode(text, validate=True)
        except ValueError:
            continue
        name = key_type.encode()
        if blob.startswith(len(name).to_bytes(4, "big") + name):
            yield Entry(path, number, marker == "@revoked", hosts, key_type, blob)


def _line(name: str, port: int, key_type: str, blob: bytes, hashed: bool = False) -> str:
    host = lookup_name(name, port)
    if hashed:
        host = _hashed(host, os.urandom(hashlib.sha1().digest_size))
    return f"{host} {key_type} {base64.b64encode(blob).decode()}"


def _hashed(name: str, salt: bytes) -> str:
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
