"""loky: its reusable executor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import loky

from qjam_bench.harness.caller import Caller, Futures


@contextmanager
def party(workers: int) -> Iterator[Caller]:
    """Run its processes."""
    executor = loky.get_reusable_executor(workers, timeout=None)
    try:
        yield Futures(executor)
    finally:
        executor.shutdown(wait=True, kill_workers=True)
