"""qjam with a function of the script itself, which travels by value: `master.run(function, params, dataset)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qjam_bench import ends
from qjam_bench.harness import hosts
from qjam_bench.harness.party import Party

from .qjam import Qjam


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run a master as the party qjam does, with a function that no module has."""
    script: dict[str, Any] = {"__name__": "__main__"}
    exec((ends.FOLDER / "qjam_bench_work.py").read_text(), script)
    with hosts.pool(workers, route) as master:
        yield Qjam(master, script[function])
