"""Dask: the back-end that joblib has for it; the data are scattered once for each search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import joblib

from qjam_bench.harness.searcher import Searcher
from qjam_bench.rivals.dask import connected


@contextmanager
def party(workers: int) -> Iterator[Searcher]:
    """Run a cluster on this machine."""
    with connected(workers):
        yield Searcher(lambda *arrays: joblib.parallel_config("dask", n_jobs=workers, scatter=list(arrays)))
