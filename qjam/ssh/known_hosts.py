"""Host keys: check them against known_hosts files as OpenSSH does, and add new ones."""

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
    """What the known_hosts files say about a host key."""

    KNOWN = "known"  # the files have this key for this host
    UNKNOWN = "unknown"  # the files have no key for this host
    CHANGED = "changed"  # the files have only other keys for this host, of this type or another
    REVOKED = "revoked"  # a line marked @revoked has this key


@dataclass(frozen=True)
class Verdict:
    """The status of a host key, and the file and line (from 1) that decide it; an unknown key has neither."""

    status: Status
    path: Path | None = None
    line: int = 0

    @property
    def known(self) -> bool:
        """Whether to trust the host."""
        return self.status is Status.KNOWN

    @property
    def unknown(self) -> bool:
        """Whether accept-new would accept the key."""
        return self.status is Status.UNKNOWN


@dataclass(frozen=True)
class KnownHostLine:
    """One line of a known_hosts file: its number (from 1), its host names as written, its key as ssh sends it."""

    path: Path
    number: int
    revoked: bool
    hosts: str
    key_type: str
    blob: bytes

    def matches(self, name: str) -> bool:
        """Whether the line is for this host; `name` comes from `lookup_name`."""
        if not self.hosts.startswith("|"):
            return in_pattern_list(name, self.hosts.lower())
        try:
            _, _, salt, _ = self.hosts.split("|")
            return self.hosts == _hashed(name, base64.b64decode(salt, validate=True))
        except ValueError:
            return False


class KnownHosts:
    """The keys of known_hosts files (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT").

    Lines marked @cert-authority do not count: they are for host certificates, which qjam does not support.
    """

    def __init__(self, lines: Iterable[KnownHostLine]) -> None:
        self.lines = tuple(lines)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> KnownHosts:
        """Read the files. As OpenSSH does, ignore files that cannot be read and lines that are malformed."""
        return cls(line for path in paths for line in _lines_of(path))

    def key_types(self, name: str, port: int) -> list[str]:
        """The types of the keys of this host that are not revoked, each once, in the order of the files."""
        lines = self._of(name, port) or self._of(name, SSH_PORT)
        revoked = {line.blob for line in lines if line.revoked}
        return list(dict.fromkeys(line.key_type for line in lines if line.blob not in revoked))

    def check(self, name: str, port: int, key_type: str, blob: bytes) -> Verdict:
        """What the files say about this key. A @revoked line for the key overrides all other lines.

        As in OpenSSH: where the files have only keys of other types the status is CHANGED, or an attacker could pass
        as the host by showing a key of another type; so ask the server for one of `key_types` first. A host that is
        unknown at a port other than 22 is looked up at port 22 as well.
        """
        lines = self._of(name, port)
        same = [line for line in lines if line.blob == blob]
        for line in same:
            if line.revoked:
                return Verdict(Status.REVOKED, line.path, line.number)
        if same:
            return Verdict(Status.KNOWN, same[0].path, same[0].number)
        others = [line for line in lines if not line.revoked]
        if not others:
            plain = Verdict(Status.UNKNOWN) if port == SSH_PORT else self.check(name, SSH_PORT, key_type, blob)
            return plain if plain.status in (Status.KNOWN, Status.REVOKED) else Verdict(Status.UNKNOWN)
        conflict = next((line for line in others if line.key_type == key_type), others[0])
        return Verdict(Status.CHANGED, conflict.path, conflict.number)

    def _of(self, name: str, port: int) -> list[KnownHostLine]:
        wanted = lookup_name(name, port)
        return [line for line in self.lines if line.matches(wanted)]


def lookup_name(name: str, port: int) -> str:
    """The host as known_hosts files write it: `[name]:port`, or `name` for port 22."""
    return (name if port == SSH_PORT else f"[{name}]:{port}").lower()


def in_pattern_list(text: str, patterns: str) -> bool:
    """Whether `text` matches one of the comma-separated patterns (with * and ?) and none of those that begin with !"""
    found = False
    for pattern in patterns.split(","):
        if fnmatchcase(text, pattern.removeprefix("!").replace("[", "[[]")):  # OpenSSH has no [a-z] in patterns
            if pattern.startswith("!"):
                return False
            found = True
    return found


def fingerprint(blob: bytes) -> str:
    """The SHA256 fingerprint of a public key, as `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def record(path: Path, name: str, port: int, key_type: str, blob: bytes, hashed: bool = False) -> None:
    """Append the key to a known_hosts file unless the file has it; `hashed` writes a hash in place of the host name.

    Creates the file and its folder if needed, readable by this user only. Writes the line in one call, so several
    processes may append at once. Raises OSError.
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
    """The error text for a refused key: why, and the commands after which qjam would accept it.

    `host` is the name as the user wrote it; `files` are the user's known_hosts files.
    """
    kind = next((kind for kind in ("ed25519", "ecdsa", "rsa") if kind in key_type), "dsa")
    shown = f"It showed a key of type {key_type} with the fingerprint\n    {fingerprint(blob)}"
    compare = f"Compare it with what the host itself prints for\n    ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub"
    line = shlex.quote(_line(name, port, key_type, blob))
    if verdict.status is Status.REVOKED:
        return (
            f"{host}: its host key is revoked ({verdict.path}, line {verdict.line}): somebody may have stolen it, "
            f"and could pass as this host.\n{shown}\n"
            "qjam never connects to such a host. Give the host a new key, or ask whoever wrote that line why."
        )
    if verdict.status is Status.CHANGED:
        file = shlex.quote(str(verdict.path))
        return (
            f"{host}: its host key is not the one in {verdict.path}, line {verdict.line}.\nWARNING: this may be an "
            "attack by a machine that poses as the host; or the host was reinstalled or got a new key.\n"
            f"{shown}\n{compare}\nOnly if they are equal, replace the known key with:\n"
            f"    ssh-keygen -f {file} -R {shlex.quote(lookup_name(name, port))}\n    echo {line} >> {file}"
        )
    accept = 'host_keys="accept-new" (qjam-doctor: --accept-new), which trusts the first key that a host shows'
    unknown = f"{host}: its host key is not known, so this could be any machine.\n{shown}\n{compare}\n"
    if not files:
        return (
            f"{unknown}The ssh configuration names no UserKnownHostsFile to add it to: set one, or pass\n    {accept}."
        )
    file = shlex.quote(str(files[0]))
    folder = files[0].parent
    made = "" if folder.is_dir() else f"mkdir -p -m 700 {shlex.quote(str(folder))} && "
    return f"{unknown}If they are equal, add it with:\n    {made}echo {line} >> {file}\nor pass\n    {accept}."


def _lines_of(path: Path) -> Iterator[KnownHostLine]:
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
            yield KnownHostLine(path, number, marker == "@revoked", hosts, key_type, blob)


def _line(name: str, port: int, key_type: str, blob: bytes, hashed: bool = False) -> str:
    host = lookup_name(name, port)
    if hashed:
        host = _hashed(host, os.urandom(hashlib.sha1().digest_size))
    return f"{host} {key_type} {base64.b64encode(blob).decode()}"


def _hashed(name: str, salt: bytes) -> str:
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
