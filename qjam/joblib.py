"""The workers of a Master as a back-end of joblib, and so of scikit-learn. Needs the extra `joblib`.

import qjam.joblib
from joblib import parallel_config

qjam.joblib.register()
with parallel_config("qjam", hosts=["node1*8", "node2*auto"], n_jobs=-1):
    GridSearchCV(model, grid).fit(X, y)
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import joblib
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from qjam_worker.adapters import apply_batch

from . import arguments
from .executor import Executor
from .master import Hosts, Master

# Seconds after which workers that no Parallel uses end, as loky's do.
IDLE = 300.0
# What joblib tells every back-end, and only those with shared files or forks of their own have a use for.
_OF_OTHERS = ("context", "max_nbytes", "mmap_mode", "prefer", "require", "temp_folder", "verbose")


def register() -> None:
    """Make "qjam" a name of joblib's back-ends. May be called again.

    qjam.joblib.register()
    joblib.Parallel(n_jobs=4, backend="qjam")(joblib.delayed(abs)(x) for x in [-1, -2])
    """
    joblib.register_parallel_backend("qjam", QjamBackend)


def shutdown() -> None:
    """End the workers that wait for the next Parallel. They end without it, too: when they have been idle for 300 s,
    when a Parallel wants others, when the program ends.
    """
    _workers.end_idle()


class QjamBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """Runs the batches of a joblib.Parallel in the workers of `hosts`, a Master's, or `n_jobs` of this machine.

    `hosts`, and all further options, are as for Master; None: `n_jobs` workers on this machine. `master`: a Master
    whose workers are shared, in the place of `hosts` and options. `initializer`: is called as `initializer(*initargs)`
    once in each worker process. `idle_worker_timeout`: seconds after which workers end that no Parallel uses. All of
    these are also arguments of `joblib.parallel_config("qjam", ...)` and of `joblib.Parallel(backend="qjam", ...)`.

    Raises TypeError or ValueError for wrong arguments. A Parallel raises BootstrapError if a host does not start, and
    otherwise what its functions raise, with the traceback in the worker as `__cause__`.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    default_n_jobs = -1
    # A call costs less than with other back-ends, so batches may be shorter, and the workers end at one time.
    MIN_IDEAL_BATCH_DURATION = 0.02
    MAX_IDEAL_BATCH_DURATION = 0.2

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        hosts: Hosts = None,
        master: Master | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        if master is not None and hosts is not None:
            raise ValueError("master has its workers already: leave out hosts")
        if hosts is not None:
            arguments.specs(hosts)  # raises here for what is no host
        self._wanted: dict[str, Any] = {"hosts": hosts, "master": master, **options}
        self._of_call: dict[str, Any] = {}  # what the Parallel says besides
        self._n_jobs = 1
        self._used: _Used | None = None
        self._lock = threading.Lock()
        self._limit: int | None = None  # of batches that run at once, where there are more workers
        self._running: set[Future[Any]] = set()
        self._seats = 0  # how many run, or are about to
        self._queue: deque[tuple[Callable[[], Any], Callable[[Any], Any] | None]] = deque()
        self._aborts = 0

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many batches may run at once; 1: joblib runs all of them in the calling process."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or self.nesting_level:  # a call of another Parallel, whose workers use all cores
            return 1
        wanted = self._all_wanted()
        if wanted["hosts"] is None and wanted["master"] is None:
            return n_jobs if n_jobs > 0 else max(joblib.cpu_count() + 1 + n_jobs, 1)
        workers = self._number_of_workers(wanted)
        if n_jobs > 0:
            return min(n_jobs, max(workers, 2))
        # The only worker of a host that was named is to be used, and with 1 joblib would not.
        return 2 if workers == 1 else max(workers + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Start workers, or take those that the last Parallel has left. Returns how many batches may run at once."""
        self._of_call = {name: value for name, value in options.items() if name not in _OF_OTHERS}
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel, self._n_jobs = parallel, n_jobs
        workers = self._executor()._max_workers  # noqa: SLF001  its own name for the same
        self._limit = n_jobs if n_jobs < workers else None
        return n_jobs

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], Any] | None = None) -> None:
        """Run a batch in a worker, and call `callback` with its future when it has ended."""
        with self._lock:
            if self._limit is not None and self._seats >= self._limit:
                self._queue.append((func, callback))
                return
            self._seats += 1
        self._begin(func, callback)

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """What the batch of a future has come to."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel the batches of this back-end, also those that run. The workers stay."""
        with self._lock:
            self._aborts += 1
            self._queue.clear()
            running = list(self._running)
        for future in running:
            future.cancel()

    def terminate(self) -> None:
        """Leave the workers to the next Parallel."""
        used, self._used = self._used, None
        if used is not None:
            _workers.leave(used)
        self.reset_batch_stats()

    def _begin(self, func: Callable[[], Any], callback: Callable[[Any], Any] | None) -> None:
        def ended(future: Future[Any]) -> None:
            with self._lock:
                self._running.discard(future)
            if callback is not None:
                callback(future)
            with self._lock:
                following = self._queue.popleft() if self._queue else None
                self._seats -= following is None
            if following is not None:
                self._begin(*following)

        aborts = self._aborts
        future = self._executor().submit(apply_batch, func, self.inner_max_num_threads)
        with self._lock:
            self._running.add(future)
        if aborts != self._aborts:
            future.cancel()
        future.add_done_callback(ended)

    def _all_wanted(self) -> dict[str, Any]:
        return {**self._wanted, **self._of_call}

    def _number_of_workers(self, wanted: dict[str, Any]) -> int:
        if wanted["master"] is not None:
            return len(wanted["master"].workers)
        counts = [spec.workers for spec in arguments.counted(arguments.specs(wanted["hosts"]))]
        if None not in counts:
            return sum(count or 0 for count in counts)
        idle = self._used is None
        workers = self._executor()._max_workers  # noqa: SLF001  as above
        if idle:
            self.terminate()
        return workers

    def _executor(self) -> Executor:
        """That of this back-end. A Parallel that shares the back-end with this one may have left it meanwhile."""
        wanted = self._all_wanted()
        if wanted["hosts"] is None and wanted["master"] is None:
            wanted["hosts"] = self._n_jobs
        used = self._used
        if used is None or not used.fits(wanted):
            self.terminate()
            used = self._used = _workers.take(wanted)
        return used.executor


class _Used:
    """An executor, and what it was made for."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.wanted = wanted
        options = {name: value for name, value in wanted.items() if name != "idle_worker_timeout"}
        self.executor = Executor(options.pop("hosts"), **options)

    def fits(self, wanted: dict[str, Any]) -> bool:
        """Whether it is as it is wanted, the very arguments of the initializer included, and of use."""
        try:
            return not self.executor._broken and bool(self.wanted == wanted)  # noqa: SLF001  as above
        except Exception:  # noqa: BLE001  arrays, say, that are not compared to a bool
            return False


class _Workers:
    """The executors that back-ends use, and one that nobody uses at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: list[_Used] = []
        self._idle: _Used | None = None
        self._timer: threading.Timer | None = None
        os.register_at_fork(after_in_child=self._forget)

    def take(self, wanted: dict[str, Any]) -> _Used:
        """An executor as it is wanted: one that is in use, the idle one, or a new one, for which the idle one ends."""
        with self._lock:
            for used in self._users:
                if used.fits(wanted):
                    self._users.append(used)
                    return used
            idle, self._idle = self._idle, None
            if self._timer is not None:
                self._timer.cancel()
            if idle is not None and not idle.fits(wanted):
                idle.executor.shutdown()
                idle = None
            self._users.append(idle or _Used(wanted))
            return self._users[-1]

    def leave(self, used: _Used) -> None:
        """A back-end needs it no longer."""
        with self._lock:
            if used not in self._users:  # in a fork of the program
                return
            self._users.remove(used)
            if used in self._users:
                return
            before, self._idle = self._idle, used
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(used.wanted.get("idle_worker_timeout") or IDLE, self.end_idle)
            self._timer.name, self._timer.daemon = "qjam-joblib-idle", True
            self._timer.start()
        if before is not None:
            before.executor.shutdown(wait=False)

    def end_idle(self) -> None:
        """End the workers of the idle one."""
        with self._lock:
            used, self._idle = self._idle, None
            if self._timer is not None:
                self._timer.cancel()
        if used is not None:
            used.executor.shutdown()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._users, self._idle, self._timer = [], None, None


_workers = _Workers()
