"""Hosts to measure on: this machine, an ssh host, or private sshds on this machine (tests/support/sshd.py)."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qjam import HostSpec, Master
from qjam.hosts import parse
from qjam_bench.ends import CHECKOUT

from .figures import BenchError

ROUTES = ("local", "direct", "tunnel", "stdio")


class Host(NamedTuple):
    """An ssh host, and the ssh_config that leads to it. `home` is that of its sessions where it is ours to empty."""

    spec: HostSpec
    config: Path | None
    home: Path | None = None

    def command(self, *words: str) -> list[str]:
        """The command line of OpenSSH that runs `words` there."""
        spec = self.spec
        options = [("-F", self.config), ("-l", spec.user), ("-p", spec.port)]
        return ["ssh", *(str(word) for option in options if option[1] for word in option), spec.host, *words]


@contextmanager
def private_hosts(number: int, python: str) -> Iterator[list[Host]]:
    """Holds so many sshds on this machine, with one empty home for all; `python` is what they run."""
    sshd = checkout_sshd()
    with tempfile.TemporaryDirectory(prefix="qjam-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        home = folder / "home"
        running = [
            stack.enter_context(sshd.private_sshd(folder, name=f"testhost{index}", home=home))
            for index in range(number)
        ]
        config = sshd.write_config(folder / "ssh_config", running)
        yield [Host(HostSpec(one.name, python=python), config, home) for one in running]


def checkout_sshd() -> Any:
    """Give the module of the private sshd, which only a checkout has."""
    tests = str(CHECKOUT / "tests" / "support")
    sys.path.append(tests)
    try:
        sshd = importlib.import_module("sshd")
    except ImportError as error:
        raise BenchError(f"no private sshd: {error} (a checkout of qjam has it, in tests/support/)") from error
    finally:
        sys.path.remove(tests)
    if lacking := sshd.sshd_works():
        raise BenchError(f"no private sshd: {lacking}")
    return sshd


def named_host(text: str, config: Path | None) -> Host:
    """Give the real host that the user has named."""
    try:
        return Host(parse(text), config)
    except ValueError as error:
        raise BenchError(str(error)) from error


def same_python() -> str:
    """Give the python of this process as the command of a host: the rivals run the same one."""
    return os.environ.get("QJAM_REMOTE_PYTHON") or shlex.quote(sys.executable)


@contextmanager
def pool(workers: int, route: str) -> Iterator[Master]:
    """Holds a master with so many workers: `local` ones, or those of a private ssh host that takes this route."""
    with ExitStack() as stack:
        if route == "local":
            yield stack.enter_context(Master(workers))
            return
        (host,) = stack.enter_context(private_hosts(1, same_python()))
        hosts = replace(host.spec, workers=workers)
        yield stack.enter_context(Master(hosts, ssh_config=host.config, route=route))
