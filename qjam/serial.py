"""Carries out rounds and calls in the calling process, for debuggers and profilers: what a worker does."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from qjam_worker.task import Task, set_current
from qjam_worker.values import arguments, codec, flat
from qjam_worker.values.reduction import Tree
from qjam_worker.worker.application import Code
from qjam_worker.worker.detach import detached, encoded
from qjam_worker.worker.exceptions import describe, raised
from qjam_worker.worker.slice_cache import decoded

from .dispatch.commands import Failure
from .engine.pending import Pending, Roots
from .hosts import SERIAL
from .stats import Stats


def carry_out(pending: Pending, code: Code, stats: Stats) -> None:
    """Map and reduce, and end `pending`. Ctrl-C and sys.exit() come through; a timeout is looked at between slices."""
    stats.failed_rounds += 1  # until it has succeeded
    roots, failure = _roots_or_failure(pending, code)
    if failure is None:
        stats.failed_rounds -= 1
        stats.rounds += 1
    pending.end(roots, failure)


class Caller:
    """One submitter of calls, as `qjam.calls.Caller`: each is made when it is submitted, and has ended then."""

    broken = ""
    outstanding: tuple[Future[Any], ...] = ()

    def __init__(self, setup: Callable[..., Any] | None, given: tuple[Any, ...]) -> None:
        self._setup, self._given = setup, given

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        """Call the function with copies of its arguments, as a worker would. Ctrl-C comes through."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            args, kwargs = arguments.loads(arguments.dumps_whole((args, kwargs)))
            if self._setup is not None:
                self._setup(*self._given)
                self._setup = None
            future.set_result(function(*args, **kwargs))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  whatever user code raises is the answer
            future.set_exception(error)
        return future

    def close(self, *, cancel: bool = False) -> None:
        """No more calls will come."""


def _roots_or_failure(pending: Pending, code: Code) -> tuple[Roots | None, Failure | None]:
    number, at = pending.spec.nslices, None
    tree: Tree[Any] = Tree(number)
    params = _laid_out(pending.params)
    try:
        for at in range(number):
            if pending.deadline is not None and time.monotonic() > pending.deadline:
                return None, Failure("timeout", f"{at} of {number} slices were done")
            try:
                part = _slice(pending, at)
            except Exception as error:  # noqa: BLE001  user code: the slice() of a data set
                return None, Failure("load", f"a slice of the data set could not be made: {error!r}", error=error)
            before = set_current(Task(at, number, 0, SERIAL))
            try:
                result = code.mapfunc(decoded(params), part, at)
            finally:
                set_current(before)
            tree.add((at, at + 1), detached(result))
            tree.fold_from((at, at + 1), code.reduce)
        return [((0, number), encoded(tree.values[0, number]))], None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  whatever user code raises is the answer
        told = describe(error)
        return None, Failure("task", told["text"], SERIAL, 0, at, told["summary"], raised(error)[0])


def _slice(pending: Pending, index: int) -> Any:
    if pending.dataset is None:
        return None
    return decoded(_laid_out(codec.encode(pending.dataset.slice_from_hash(pending.spec.refs[index]))))


def _laid_out(value: codec.Encoded) -> memoryview:
    """A value in memory as a worker has it: read-only, from the beginning of a page, on which sums of numpy depend."""
    memory = mmap.mmap(-1, flat.size(value))
    flat.write(value, memoryview(memory))
    return memoryview(memory).toreadonly()
