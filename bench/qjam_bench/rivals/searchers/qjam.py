"""qjam: its back-end for joblib, on this machine or on ssh hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import joblib

import qjam
import qjam.joblib
from qjam_bench.harness.searcher import Searcher


@contextmanager
def party(workers: int, hosts: list[dict[str, Any]] | None = None, config: str | None = None) -> Iterator[Searcher]:
    """Register the back-end: with `workers` local workers, or with these hosts, each the arguments of a HostSpec."""
    qjam.joblib.register()
    if hosts is None:
        yield Searcher(lambda *_: joblib.parallel_config("qjam", n_jobs=workers))
    else:
        options = {"hosts": [qjam.HostSpec(**host) for host in hosts], "ssh_config": config}
        yield Searcher(lambda *_: joblib.parallel_config("qjam", n_jobs=-1, **options))
