"""joblib with loky: one pool for all rounds; slices are dumped once to /dev/shm, and the workers map them.

joblib itself dumps params above 1 MB to /dev/shm and lets the workers map them.
"""

from __future__ import annotations

import operator
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any

import joblib

from qjam_bench import ends
from qjam_bench.ends.loops import Round
from qjam_bench.harness.party import ManyWays, Party, parts

SHARED_MEMORY = "/dev/shm"


class Joblib(ManyWays):
    """Two joblib.Parallel over one pool: the first gives results as a list, the second in order of arrival."""

    def __init__(self, function: Any, workers: int, folder: Path, stack: ExitStack) -> None:
        """Start the pool."""
        super().__init__()
        self._call = joblib.delayed(function)
        self._slices: list[Any] = [None] * workers
        self._folder = folder
        options = {"n_jobs": workers, "backend": "loky", "batch_size": 1, "pre_dispatch": "all"}
        self._listed = stack.enter_context(joblib.Parallel(**options))
        self._streamed = stack.enter_context(joblib.Parallel(return_as="generator_unordered", **options))

    @property
    def ways(self) -> list[Round]:
        return [partial(self._play, parallel) for parallel in (self._listed, self._streamed)]

    def _load(self, data: Any) -> None:
        for index, part in enumerate(parts(data, len(self._slices))):
            file = str(self._folder / f"{index}.joblib")
            joblib.dump(part, file)
            self._slices[index] = joblib.load(file, mmap_mode="r")

    def _play(self, parallel: Any, params: Any) -> Any:
        return reduce(operator.add, parallel(self._call(params, part) for part in self._slices))


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run loky's processes."""
    from joblib.externals.loky import get_reusable_executor

    with ExitStack() as stack:
        stack.callback(lambda: get_reusable_executor().shutdown(wait=True, kill_workers=True))
        folder = Path(tempfile.mkdtemp(prefix="qjam-bench-", dir=SHARED_MEMORY))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield Joblib(ends.work(function), workers, folder, stack)
