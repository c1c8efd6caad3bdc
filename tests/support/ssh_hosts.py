"""Fixtures of hosts that are reached by ssh: import those that a test uses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from needs import need
from qjam import Master
from sshd import Sshd, private_sshd, sshd_works

# A fixture that modules import is one of each module, whatever its scope; what is cached is one of the session.


@functools.cache
def _home(base: Path) -> Path:
    home = base / "home"
    home.mkdir()
    return home


@functools.cache
def _furnish(home: Path) -> None:
    folder = home.with_name("furnishing")
    folder.mkdir()
    with private_sshd(folder, home=home) as sshd, Master(sshd.name, ssh_config=sshd.config):
        pass


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of all hosts that are not about to have none: what the first start has brought there stays."""
    return _home(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def furnished(home: Path) -> Path:
    """The same home, after such a start."""
    need(sshd_works())
    _furnish(home)
    return home


@pytest.fixture
def ssh_host(tmp_path: Path, home: Path) -> Iterator[Callable[..., Sshd]]:
    """Starts a host that lives as long as the test: ssh_host(name, sshd's options)."""
    need(sshd_works())
    with contextlib.ExitStack() as stack:

        def start(name: str = "testhost", *, options: Mapping[str, str] = {}, **more: object) -> Sshd:
            more.setdefault("home", home)
            return stack.enter_context(private_sshd(tmp_path, name=name, options=options, **more))  # type: ignore[arg-type]

        yield start


def block(sshd: Sshd, name: str | None = None, **lines: object) -> str:
    """The part of an ssh_config that leads to a host: what Sshd.config says, with other lines; None leaves one out."""
    settings = {
        "HostName": sshd.address,
        "Port": sshd.port,
        "User": sshd.user,
        "IdentityFile": sshd.identity,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "UserKnownHostsFile": sshd.known_hosts,
        "GlobalKnownHostsFile": "/dev/null",
    } | lines
    kept = [f"    {keyword} {value}\n" for keyword, value in settings.items() if value is not None]
    return f"Host {name or sshd.name}\n{''.join(kept)}"


def with_cache_of(home: Path, folder: Path) -> Path:
    """A home of its own kind that has the parts of another one, so that they are not brought again."""
    (home / ".cache").mkdir(exist_ok=True)
    folder.mkdir()
    (folder / ".cache").symlink_to(home / ".cache")
    return folder


def with_parts_of(home: Path, folder: Path) -> Path:
    """A home with a cache of its own, in which the parts of another one are, and nothing else."""
    cache = folder / ".cache" / "qjam"
    cache.mkdir(parents=True)
    for part in home.glob(f".cache/qjam/{'[0-9a-f]' * 64}"):
        (cache / part.name).symlink_to(part)
    return folder


def run_seven(master: Master) -> None:
    """The shortest proof that a master works."""
    assert master.run(lambda params, part: params * sum(part), 7, [1, 2, 3]) == 42
