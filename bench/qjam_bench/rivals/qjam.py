"""qjam itself: `master.run(module.function, params, dataset)`, which adds up the results by default_reduce."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import qjam
from qjam_bench import ends
from qjam_bench.harness import hosts
from qjam_bench.harness.party import Party


class Qjam(Party):
    """A master and the function that it runs. The first round after `load` sends the slices."""

    def __init__(self, master: qjam.Master, function: Any) -> None:
        """`function`: of user code, f(params, slice)."""
        self.master = master
        self._function = function
        self._data: qjam.BaseDataSet | None = None

    def _load(self, data: Any) -> None:
        self._data = qjam.DataSet(data)

    def round(self, params: Any) -> Any:
        return self.master.run(self._function, params, self._data)


@contextmanager
def party(function: str, workers: int, route: str) -> Iterator[Party]:
    """Run a master with `workers` workers: on this machine, or on a private ssh host that takes this route."""
    with shipped() as module, hosts.pool(workers, route) as master:
        yield Qjam(master, getattr(module, function))


@contextmanager
def shipped(source: str | None = None) -> Iterator[Any]:
    """Yield a module of this source (default: qjam_bench_work), which qjam sends to workers as the user's own code."""
    text = source or (ends.FOLDER / "qjam_bench_work.py").read_text()
    with tempfile.TemporaryDirectory(prefix="qjam-bench-") as folder, ExitStack() as stack:
        Path(folder, "qjam_bench_user.py").write_text(text)
        sys.path.insert(0, folder)
        stack.callback(sys.path.remove, folder)
        importlib.invalidate_caches()
        sys.modules.pop("qjam_bench_user", None)
        module = importlib.import_module("qjam_bench_user")
        stack.callback(sys.modules.pop, module.__name__, None)
        yield module
