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
    """An ssh host and the ssh_config for it. `home`: the home of its sessions, if the benchmark may empty it."""

    spec: HostSpec
    config: Path | None
    home: Path | None = None

    def command(self, *words: str) -> list[str]:
        """Give the command line of OpenSSH that runs `words` on the host."""
        spec = self.spec
        options = [("-F", self.config), ("-l", spec.user), ("-p", spec.port)]
        return ["ssh", *(str(word) for option in options if option[1] for word in option), spec.host, *words]


@contextmanager
def private_hosts(number: int, python: str) -> Iterator[list[Host]]:
    """Run `number` sshds on this machine with one empty home for all; `python`: the command of their HostSpecs."""
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


def support(name: str) -> Any:
    """Import a module of tests/support from the checkout. BenchError if there is none."""
    folder = str(CHECKOUT / "tests" / "support")
    sys.path.append(folder)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BenchError(f"{error} (a checkout of qjam has it, in tests/support/)") from error
    finally:
        sys.path.remove(folder)


def checkout_sshd() -> Any:
    """Import the module of the private sshd from the checkout. BenchError if there is none or no sshd works."""
    sshd = support("sshd")
    if lacking := sshd.sshd_works():
        raise BenchError(f"no private sshd: {lacking}")
    return sshd


def named_host(text: str, config: Path | None) -> Host:
    """Give the host that the user has named with --host."""
    try:
        return Host(parse(text), config)
    except ValueError as error:
        raise BenchError(str(error)) from error


def same_python() -> str:
    """Give QJAM_REMOTE_PYTHON, or else the python of this process, which the rivals run too."""
    return os.environ.get("QJAM_REMOTE_PYTHON") or shlex.quote(sys.executable)


@contextmanager
def pool(workers: int, route: str) -> Iterator[Master]:
    """Run a master with `workers` workers: on this machine for `local`, else on a private ssh host with this route."""
    with ExitStack() as stack:
        if route == "local":
            yield stack.enter_context(Master(workers))
            return
        (host,) = stack.enter_context(private_hosts(1, same_python()))
        hosts = replace(host.spec, workers=workers)
        yield stack.enter_context(Master(hosts, ssh_config=host.config, route=route))
