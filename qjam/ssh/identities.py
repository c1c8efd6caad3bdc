"""The keys to log in with, from the ssh agent and from files, in the order in which OpenSSH tries them."""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko

from . import known_hosts
from .config import SshSettings

OPENSSH_KEY = b"openssh-key-v1\0"  # how a private key file begins, decoded (OpenSSH's PROTOCOL.key)


def to_try(hop: SshSettings, tried: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """The keys to try, each with its name. For a key that cannot be used, add the reason to `tried`."""
    in_agent = {key.asbytes(): key for key in _agent_keys(hop.agent, tried)}
    files = [path for path in hop.identity_files if path.exists() or path.with_name(path.name + ".pub").exists()]
    public = {path: _public(path) for path in files}
    named = [blob for blob in public.values() if blob in in_agent]
    for blob, key in in_agent.items():
        if blob in named:
            yield f"the agent's {_short(key)}", key
    if not hop.identities_only:
        for blob, key in in_agent.items():
            if blob not in named:
                yield f"the agent's {_short(key)}", key
    for path in files:
        if public[path] in in_agent or not path.exists():
            continue
        try:
            for certificate in hop.certificate_files:
                if (key := _certified(path, certificate)) is not None:
                    yield f"{path} with {certificate}", key
            yield str(path), paramiko.PKey.from_path(path)  # with <path>-cert.pub, where there is one
        except (TypeError, paramiko.PasswordRequiredException):
            tried.append(f"{path} has a passphrase and no agent holds it: run ssh-add {path}")
        except (ValueError, OSError, paramiko.SSHException) as error:
            tried.append(f"{path} cannot be read: {error}")


def _certified(path: Path, certificate: Path) -> paramiko.PKey | None:
    """The key with a certificate from a CertificateFile; None if the certificate does not fit or cannot be read."""
    key = paramiko.PKey.from_path(path)
    try:
        key.load_certificate(str(certificate))
    except (ValueError, OSError, paramiko.SSHException):
        return None
    return key


def _agent_keys(path: str | None, tried: list[str]) -> list[Any]:
    if path is None:
        return []
    os.environ["SSH_AUTH_SOCK"] = path  # safe: this process holds one connection only
    try:
        return list(paramiko.Agent().get_keys())
    except (paramiko.SSHException, OSError) as error:
        tried.append(f"the agent at {path} does not answer: {error}")
        return []


def _public(path: Path) -> bytes | None:
    """The public half of a key file: from FILE.pub, or from the file itself, where no passphrase hides it."""
    try:
        return b64decode(path.with_name(path.name + ".pub").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        pass
    try:
        packed = b64decode("".join(path.read_text().split("-----")[2].split()))
    except (OSError, ValueError, IndexError):
        return None
    if not packed.startswith(OPENSSH_KEY):
        return None
    fields = paramiko.Message(packed[len(OPENSSH_KEY) :])  # then: cipher, key derivation, its options, number of keys
    for _ in range(3):
        fields.get_binary()
    fields.get_int()
    return fields.get_binary()


def _short(key: Any) -> str:
    return f"{key.get_name()} {known_hosts.fingerprint(key.asbytes())}"
