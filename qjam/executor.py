"""Executor: the workers of a Master under the interface of concurrent.futures."""

from __future__ import annotations

import atexit
import concurrent.futures
import os
import reprlib
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from numbers import Integral, Real
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from qjam_worker.adapters import apply_chunk

from . import serial
from .calls import Caller
from .master import Hosts, Master

P = ParamSpec("P")
T = TypeVar("T")


class Executor(concurrent.futures.Executor):
    """Calls functions in the workers of `hosts`, as concurrent.futures.ProcessPoolExecutor does on this machine.

        with Executor(4) as executor:
            future = executor.submit(pow, 2, 8)
            print(future.result(), list(executor.map(abs, [-1, -2])))

    `hosts`, and all further options, are as for Master: None or a number for this machine. `max_workers`: the same as a
    number of `hosts`. `initializer`: is called as `initializer(*initargs)` once in each worker process, before its
    first call. If it raises, all calls end with BrokenProcessPool. `master`: a Master whose workers this executor
    shares, in the place of `hosts` and options; it is left open. `max_pending`: how many calls may be outstanding;
    submit waits while there are so many. None: no limit.

    Functions and arguments travel as those of `Master.run` do: lambdas, closures and functions of a notebook too. A
    call whose worker process dies is tried again, three times in all, and then ends with CallLost, which is a
    BrokenProcessPool; the executor goes on. `cancel()` of a future also interrupts a call that runs. Ctrl-C in a `with`
    block drops all calls; at its usual end the block waits for them, as the program's end does.

    Raises TypeError or ValueError for wrong arguments, BootstrapError if a host does not start.
    """

    def __init__(
        self,
        hosts: Hosts = None,
        *,
        max_workers: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        master: Master | None = None,
        max_pending: int | None = None,
        **options: Any,
    ) -> None:
        _check_count("max_workers", max_workers)
        _check_count("max_pending", max_pending)
        if _is_integer(hosts):
            _check_count("max_workers", hosts)
        _check_initializer(initializer, initargs)
        if hosts is not None and max_workers is not None:
            raise ValueError(
                "max_workers is a number of workers on this machine: beside hosts leave it out, and write "
                "'node1*8' for 8 workers on node1"
            )
        if master is not None:
            _check_master(master)
            if hosts is not None or max_workers is not None or options:
                raise ValueError("master has its workers already: leave out hosts, max_workers and options of Master")
        owned = master is None
        master = Master(max_workers if hosts is None else hosts, **options) if master is None else master
        try:
            self._calls = _Calls(master, master._caller(initializer, initargs), owned, max_pending)  # noqa: SLF001
        except BaseException:
            if owned:
                master.close()
            raise
        self._end = weakref.finalize(self, _Calls.let_go, self._calls)
        self._end.atexit = False  # _at_exit waits for the calls

    def __repr__(self) -> str:
        return f"<Executor: {'shut down' if self._calls.ending else 'open'}, on {self._calls.master!r}>"

    def __reduce__(self) -> str:
        raise TypeError("an Executor cannot be pickled or sent to workers; perhaps a function or argument refers to it")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            self.terminate_workers()
        else:
            self.shutdown()

    @property
    def _max_workers(self) -> int:
        """The number of workers, which some libraries ask a ProcessPoolExecutor for."""
        return max(1, len(self._calls.master.workers))

    @property
    def _broken(self) -> str | bool:
        """Why no call can be made any more, or False; a name of ProcessPoolExecutor's, too."""
        return self._calls.broken or False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `fn(*args, **kwargs)` in a worker. Returns its Future at once, or when `max_pending` allows.

        The future has the result, or the exception that `fn` raised, with the traceback in the worker as `__cause__`.

            future = executor.submit(pow, 2, 8)
            future.result(timeout=10)  # 256

        Raises TypeError if `fn` is not callable, RuntimeError after `shutdown` and in a fork of the program, and
        BrokenProcessPool, a RuntimeError too, if the initializer has raised.
        """
        _check_function("submit(fn, *args, **kwargs)", fn)
        return self._calls.submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Call `fn(item)` for each item, or `fn(a, b)` for those of several iterables up to the end of the shortest.
        Returns an iterator over the results, in order.

        `timeout`: seconds from now in which results must come; None: no limit. `chunksize`: items that a worker gets
        at once. `buffersize`: of how many chunks the results may be outstanding or not yet taken; items are taken from
        the iterables as results are, so that they may have no end. None: all items are taken and sent now.

            for line in executor.map(parse, open("log"), chunksize=100, buffersize=50):
                print(line)

        When the iterator is closed, or ends with an exception, the calls that remain are cancelled. The iterator raises
        the first exception in the order of items, and TimeoutError. Raises TypeError or ValueError for wrong
        arguments, and what `submit` raises.
        """
        _check_function("map(fn, *iterables)", fn)
        _check_map(iterables, timeout, chunksize, buffersize)
        deadline = None if timeout is None else time.monotonic() + timeout
        items = zip(*iterables, strict=False)
        if chunksize == 1:
            return _results(self, fn, items, buffersize, deadline)
        chunks = iter(lambda: tuple(islice(items, int(chunksize))), ())
        return _flat(_results(self, partial(apply_chunk, fn), ((chunk,) for chunk in chunks), buffersize, deadline))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and close the Master when all calls have ended, unless it was passed as `master`.

        `wait`: return only then. `cancel_futures`: cancel the calls that no worker has begun. May be called again.
        """
        self._calls.end(wait=wait, cancel=cancel_futures)

    def terminate_workers(self) -> None:
        """Cancel all calls, interrupt those that run, and shut down. Workers of a Master of your own stay.

        executor.terminate_workers()  # as of ProcessPoolExecutor since python 3.14; kill_workers is the same
        """
        self._calls.cancel()
        self._calls.end()

    kill_workers = terminate_workers


class _Calls:
    """The calls of an executor that have not ended, and its Master, which is closed when they have. Where the executor
    is collected while calls run, this outlives it.
    """

    def __init__(self, master: Master, caller: Caller | serial.Caller, owned: bool, max_pending: int | None) -> None:
        self.master, self.ending = master, False
        self._caller, self._owned, self._max_pending = caller, owned, max_pending
        self._owner = os.getpid()
        self._pending: set[Future[Any]] = set()  # where there may be max_pending
        self._changed = threading.Condition(threading.RLock())
        self._idle = threading.Event()
        self._waiting = 0
        _running.add(self)

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        if os.getpid() != self._owner:
            raise RuntimeError(
                f"this Executor belongs to process {self._owner}, and this is a fork of it; make a new one here"
            )
        with self._changed:
            self._check()
            if self._max_pending is None:
                # Without a callback: a thread that waits for the future's result may get it with less ado.
                return self._caller.submit(fn, args, kwargs)
            while len(self._pending) >= self._max_pending:
                self._changed.wait()
                self._check()
            future = self._caller.submit(fn, args, kwargs)
            self._pending.add(future)
        future.add_done_callback(self._make_room)
        return future

    @property
    def broken(self) -> str:
        """Why no call can be made any more, after an initializer that has raised."""
        return self._caller.broken

    def _check(self) -> None:
        if self.broken:
            raise BrokenProcessPool(self.broken)
        if self.ending:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def _make_room(self, future: Future[Any]) -> None:
        with self._changed:
            self._pending.discard(future)
            self._changed.notify()

    def cancel(self) -> None:
        """Drop all calls, also those that run."""
        self._stop_taking()
        for future in self._caller.outstanding:
            future.cancel()

    def end(self, *, wait: bool = True, cancel: bool = False) -> None:
        """Take no more calls, and close the Master after the last one."""
        if os.getpid() != self._owner:
            return
        self._stop_taking()
        self._caller.close(cancel=cancel)
        futures = self._caller.outstanding
        left = len(futures) + 1

        def ended(_: object = None) -> None:
            nonlocal left
            with self._changed:
                left -= 1
                last = not left
            if last:
                self._idle.set()
                self._close()

        with self._changed:
            self._waiting += wait
        # A callback that was added before has been called when this one is.
        for future in futures:
            future.add_done_callback(ended)
        try:
            ended()
            if wait:
                self._idle.wait()
        finally:
            with self._changed:
                self._waiting -= wait
            self._close()

    def let_go(self) -> None:
        """The executor was collected: its calls go on."""
        try:
            # A thread of its own, because the collector may call this in one that holds any lock.
            threading.Thread(target=partial(self.end, wait=False), name="qjam-executor-end").start()
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            self.end(wait=False)

    def _stop_taking(self) -> None:
        with self._changed:
            self.ending = True
            self._changed.notify_all()

    def _close(self) -> None:
        """Close the Master if there are no more calls, and nobody waits for that, who would do so."""
        with self._changed:
            done = self._idle.is_set() and not self._waiting and self in _running
            if done:
                _running.discard(self)
        if done and self._owned:
            self.master.close()


_running: set[_Calls] = set()
_exiting = False


def _at_exit() -> None:
    """Wait for the calls of all executors, as ProcessPoolExecutor does; after Ctrl-C drop them."""
    global _exiting
    _exiting = True
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")
    for calls in list(_running):
        try:
            if interrupted:
                calls.cancel()
            calls.end()
        except KeyboardInterrupt:
            interrupted = True
            calls.cancel()
            calls.end()


# Before the program's threads are joined, so that those which wait for calls end. Python's own executors use it too.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
os.register_at_fork(after_in_child=_running.clear)


def _results(
    executor: Executor,
    fn: Callable[..., T],
    items: Iterator[tuple[Any, ...]],
    buffersize: int | None,
    deadline: float | None,
) -> Iterator[T]:
    """Submit all calls, or as many as the buffer holds. The iterator submits the rest."""
    futures: deque[Future[T]] = deque()
    try:
        futures.extend(executor.submit(fn, *arguments) for arguments in islice(items, buffersize))
    except BaseException:
        _cancel(futures)
        raise
    return _taken(futures, weakref.ref(executor), fn, items if buffersize else iter(()), deadline)


def _taken(
    futures: deque[Future[T]],
    executor: weakref.ref[Executor],
    fn: Callable[..., T],
    items: Iterator[tuple[Any, ...]],
    deadline: float | None,
) -> Iterator[T]:
    try:
        while futures:
            for arguments in islice(items, 1):
                if (still := executor()) is not None:
                    futures.append(still.submit(fn, *arguments))
                still = None
            yield _result(futures.popleft(), deadline)
    finally:
        _cancel(futures)


def _result(future: Future[T], deadline: float | None) -> T:
    try:
        return future.result(None if deadline is None else deadline - time.monotonic())
    finally:
        future.cancel()
        del future  # the traceback of its exception leads here


def _flat(chunks: Iterator[list[T]]) -> Iterator[T]:
    """The items of the chunks, one by one, without keeping those that were taken."""
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


def _cancel(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


def _check_initializer(initializer: Any, initargs: Any) -> None:
    if initializer is not None and not callable(initializer):
        raise TypeError("initializer must be a callable")
    if not isinstance(initargs, tuple):
        raise TypeError(f"initargs must be a tuple, not {_short(initargs)}")


def _check_master(master: Any) -> None:
    if not isinstance(master, Master):
        raise TypeError(f"master must be a Master, not {_short(master)}")


def _check_function(order: str, fn: Any) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be callable, not {_short(fn)}: the order is {order}")


def _check_map(iterables: Iterable[Any], timeout: Any, chunksize: Any, buffersize: Any) -> None:
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, Real)):
        raise TypeError(f"timeout must be a number of seconds or None, not {_short(timeout)}")
    _check_count("buffersize", buffersize)
    if not _is_integer(chunksize):
        raise TypeError(f"chunksize must be an integer, not {_short(chunksize)}")
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    for iterable in iterables:
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise TypeError(f"iterables: {_short(iterable)} is not iterable: the order is map(fn, *iterables)")


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer or None, not {_short(value)}")
    if value < 1:
        raise ValueError(f"{name} must be greater than 0, not {value}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _short(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"
