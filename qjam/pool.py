"""Pool: an Executor under the interface of multiprocessing.Pool."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Generic, TypeVar

from qjam_worker.adapters import apply_chunk

from .executor import Executor
from .master import Hosts, Master

T = TypeVar("T")

# Chunks for each worker when `map` chooses their size, as multiprocessing does.
CHUNKS = 4
# Chunks for each worker of `imap` whose results are outstanding or not yet taken, where the iterable has no length.
BUFFERED = 64


class PoolTimeout(multiprocessing.TimeoutError, TimeoutError):
    """A result did not come within `timeout` seconds."""


class Pool:
    """Worker processes that calls are handed to, as multiprocessing.Pool has them, on this machine or on hosts.

        with Pool(4) as pool:
            print(pool.map(abs, [-1, -2]), pool.starmap(pow, [(2, 3), (3, 2)]))

    `processes`: a number of workers on this machine, None for one per usable core, or hosts as for Master:
    Pool("node1*8 node2*8"). `initializer`: is called as `initializer(*initargs)` once in each worker process. `master`:
    a Master whose workers the pool shares. Further options are those of Master.

    Functions and arguments travel as those of `Master.run` do: lambdas and functions of a notebook too. Exceptions come
    back as they were raised, with the traceback in the worker as `__cause__`. A call whose worker dies is tried again,
    three times in all, and then ends with BrokenProcessPool.

    Raises TypeError or ValueError for wrong arguments, BootstrapError if a host does not start. All methods raise
    ValueError after `close` and `terminate`.
    """

    def __init__(
        self,
        processes: Hosts = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        master: Master | None = None,
        **options: Any,
    ) -> None:
        self._executor = Executor(
            processes, initializer=initializer, initargs=tuple(initargs), master=master, **options
        )
        self._closed = False
        self._unfinished: weakref.WeakSet[Results[Any]] = weakref.WeakSet()

    def __enter__(self) -> Pool:  # noqa: PYI034  typing.Self is of python 3.11
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.terminate()

    def __repr__(self) -> str:
        return f"<Pool: {'closed' if self._closed else 'open'}, of {self._executor!r}>"

    def __reduce__(self) -> str:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    @property
    def _processes(self) -> int:
        """The number of workers, which some libraries ask a pool for."""
        return self._executor._max_workers  # noqa: SLF001  its own name for the same

    def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: dict[str, Any] | None = None) -> T:
        """Call `func(*args, **kwds)` in a worker and return its result. Raises what `func` raises."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: dict[str, Any] | None = None,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[T]:
        """Call `func(*args, **kwds)` in a worker. Returns an AsyncResult at once.

        `callback` is then called with the result, or `error_callback` with the exception, in another thread.
        """
        self._check_open()
        future = self._executor.submit(func, *args, **(kwds or {}))
        return AsyncResult([future], lambda: future.result(0), callback, error_callback)

    def map(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int | None = None) -> list[T]:
        """Return the list of `func(item)` for each item, in order. Raises the exception of the first that fails.

        `chunksize`: items that a worker gets at once; None: four chunks for each worker.
        """
        return self.map_async(func, iterable, chunksize).get()

    def map_async(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[list[T]]:
        """Like `map`, but returns an AsyncResult at once. The callbacks are as for `apply_async`."""
        return self._map_async(func, ((item,) for item in iterable), chunksize, callback, error_callback)

    def starmap(
        self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[T]:
        """Like `map`, but each item is the arguments of a call: `func(*item)`."""
        return self.starmap_async(func, iterable, chunksize).get()

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[list[T]]:
        """Like `starmap`, but returns an AsyncResult at once. The callbacks are as for `apply_async`."""
        return self._map_async(func, map(tuple, iterable), chunksize, callback, error_callback)

    def imap(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1) -> Results[T]:
        """Return an iterator over `func(item)` for each item, in order, as results come.

        Its `next(timeout=None)` waits that many seconds, and raises a TimeoutError after them. Each result that is an
        exception is raised in its turn; the iterator goes on. An iterable without a length is taken from as results
        are: it may have no end.
        """
        return self._imap(func, iterable, chunksize, ordered=True)

    def imap_unordered(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1) -> Results[T]:
        """Like `imap`, but each result comes as soon as it is there."""
        return self._imap(func, iterable, chunksize, ordered=False)

    def close(self) -> None:
        """Take no more calls; the workers end when those that were made have ended."""
        self._closed = True
        if not self._unfinished:
            self._executor.shutdown(wait=False)

    def terminate(self) -> None:
        """Drop all calls, also those that run, and end the workers. Who waits for a call gets a CancelledError."""
        self._closed = True
        self._executor.terminate_workers()

    def join(self) -> None:
        """Wait for the end of all calls. Raises ValueError before `close` or `terminate`."""
        if not self._closed:
            raise ValueError("Pool is still running")
        for results in list(self._unfinished):
            results.submit(None)
        self._executor.shutdown()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("Pool not running")

    def _map_async(
        self,
        func: Callable[..., T],
        items: Iterable[tuple[Any, ...]],
        chunksize: int | None,
        callback: Callable[[list[T]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> AsyncResult[list[T]]:
        self._check_open()
        items = list(items)
        size = chunksize or max(1, -(-len(items) // (CHUNKS * self._processes)))
        futures = list(self._submitted(func, items, size))

        def result() -> list[T]:
            return [value for future in futures for value in future.result(0)]

        return AsyncResult(futures, result, callback, error_callback)

    def _imap(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int, *, ordered: bool) -> Results[T]:
        self._check_open()
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        futures = self._submitted(func, ((item,) for item in iterable), chunksize)
        if hasattr(iterable, "__len__"):
            return Results(list(futures), ordered)
        results = Results(futures, ordered, BUFFERED * self._processes, self._taken)
        if results.more:
            self._unfinished.add(results)
        return results

    def _taken(self, results: Results[Any]) -> None:
        """All items of an iterable without a length have been taken."""
        self._unfinished.discard(results)
        if self._closed and not self._unfinished:
            self._executor.shutdown(wait=False)

    def _submitted(
        self, func: Callable[..., T], items: Iterable[tuple[Any, ...]], chunksize: int
    ) -> Iterator[Future[list[T]]]:
        """Submits a chunk each time when its future is taken."""
        left = iter(items)
        call = partial(apply_chunk, func)
        while chunk := tuple(islice(left, chunksize)):
            yield self._executor.submit(call, chunk)


class AsyncResult(Generic[T]):
    """What a call, or a map, will come to."""

    def __init__(
        self,
        futures: list[Future[Any]],
        result: Callable[[], T],
        callback: Callable[[T], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        self._result, self._callback, self._error_callback = result, callback, error_callback
        self._left = len(futures)
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._value: T
        self._error: BaseException | None = None
        if not futures:
            self._end()
        for future in futures:
            future.add_done_callback(self._count)

    def ready(self) -> bool:
        """Whether the result, or an exception, is here."""
        return self._ready.is_set()

    def successful(self) -> bool:
        """Whether there was no exception. Raises ValueError if the result is not here yet."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the result, `timeout` seconds at most."""
        self._ready.wait(timeout)

    def get(self, timeout: float | None = None) -> T:
        """Return the result, or raise the exception. Raises a TimeoutError after `timeout` seconds; None: no limit."""
        if not self._ready.wait(timeout):
            raise PoolTimeout(f"the result did not come within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value

    def _count(self, _: Future[Any]) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._end()

    def _end(self) -> None:
        result, callback, error_callback = self._result, self._callback, self._error_callback
        del self._result, self._callback, self._error_callback  # which hold futures, and what callbacks refer to
        try:
            try:
                self._value = result()
            except BaseException as error:  # noqa: BLE001  goes to whoever asks for the result
                self._error = error
                if error_callback is not None:
                    error_callback(error)
            else:
                if callback is not None:
                    callback(self._value)
        finally:
            self._ready.set()


class Results(Generic[T]):
    """An iterator over the results of `imap`. `more`: whether there are items that were not submitted yet."""

    def __init__(
        self,
        futures: Iterable[Future[list[T]]],
        ordered: bool,
        buffer: int | None = None,
        taken: Callable[[Results[T]], None] | None = None,
    ) -> None:
        self._futures, self._ordered, self._taken = iter(futures), ordered, taken
        self._pending: deque[Future[list[T]]] = deque()
        self._done: queue.SimpleQueue[Future[list[T]]] = queue.SimpleQueue()
        self._left = 0
        self._values: list[T] = []  # of the chunk that is being given out, the last one first
        self.more = True
        self.submit(buffer)

    def __iter__(self) -> Results[T]:
        return self

    def __next__(self) -> T:
        return self.next()

    def next(self, timeout: float | None = None) -> T:
        """Return the next result, or raise the exception that it is. Raises a TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._values:
            if not self._left:
                raise StopIteration
            future = self._first(deadline)
            self._left -= 1
            self.submit(1)
            self._values = future.result(0)[::-1]
            del future
        return self._values.pop()

    def submit(self, count: int | None) -> None:
        """Submit so many more chunks; None: all."""
        if not self.more:
            return
        submitted = 0
        for future in islice(self._futures, count):
            submitted += 1
            self._left += 1
            if self._ordered:
                self._pending.append(future)
            else:
                future.add_done_callback(self._done.put)
        if count is None or submitted < count:
            self.more = False
            if self._taken is not None:
                self._taken(self)

    def _first(self, deadline: float | None) -> Future[list[T]]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            if not self._ordered:
                return self._done.get(timeout=left)
            with suppress(CancelledError):
                self._pending[0].exception(left)
            return self._pending.popleft()
        except (queue.Empty, concurrent.futures.TimeoutError):  # which is python's own since 3.11
            raise PoolTimeout("the next result did not come in time") from None
