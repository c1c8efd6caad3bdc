"""loky: joblib's own back-end, which maps large arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import joblib
from joblib.externals.loky import get_reusable_executor

from qjam_bench.harness.searcher import Searcher


@contextmanager
def party(workers: int) -> Iterator[Searcher]:
    """End loky's processes after the block."""
    try:
        yield Searcher(lambda *_: joblib.parallel_config("loky", n_jobs=workers))
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)
