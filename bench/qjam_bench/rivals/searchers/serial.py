"""No workers: one fit after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import joblib

from qjam_bench.harness.searcher import Searcher


@contextmanager
def party(workers: int) -> Iterator[Searcher]:
    """Nothing has to be started."""
    yield Searcher(lambda *_: joblib.parallel_config("sequential"))
