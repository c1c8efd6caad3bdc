"""concurrent.futures.ProcessPoolExecutor, forked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from qjam_bench.harness.caller import Caller, Futures


@contextmanager
def party(workers: int) -> Iterator[Caller]:
    """Run its processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as executor:
        yield Futures(executor)
