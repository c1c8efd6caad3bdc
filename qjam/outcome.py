"""What the end of a round is for its caller: a result or an exception."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np

from qjam_worker.values import codec

from .code.user_code import Sources, UserCode
from .dispatch.commands import Failure
from .engine.pending import Pending
from .errors import BootstrapError, MasterClosed, QjamError, RoundTimeout, TaskError, WorkerLost
from .hosts import LOCAL, SERIAL
from .launch.supervisor import STOP_TIMEOUT
from .log import say


def outcome(pending: Pending, user_code: UserCode, sources: Sources, timeout: float | None) -> Any:
    """Return the result of a finished round, or raise its exception."""
    if pending.roots is not None:
        result = pending.reduced(user_code.reduce)
        if type(result) is list and user_code.reduce is None and any(isinstance(item, np.ndarray) for item in result):
            _say_that_lists_are_added()
        return result
    raise _error(pending.take_failure(), sources, timeout)  # in no variable: its traceback leads to this frame


def _error(failure: Failure, sources: Sources, timeout: float | None) -> BaseException:
    error = exception_of(failure, timeout)
    cause = error.__cause__
    if isinstance(cause, ImportError):
        sources.forget()
    if isinstance(error, TaskError) and isinstance(cause, ModuleNotFoundError) and error.host not in (LOCAL, SERIAL):
        error.what += sources.hint(cause.name or "")
    return error


def exception_of(failure: Failure, timeout: float | None) -> BaseException:
    """The exception that tells the user of a failure."""
    return _EXCEPTIONS[failure.what](failure, timeout)


@functools.cache
def _say_that_lists_are_added() -> None:
    """Once in a program."""
    say(
        "run has added up lists of arrays, element by element. For a list of the results use collect; if you want "
        "their sum, return a tuple in place of a list, and this is not said."
    )


def _task_error(failure: Failure, timeout: float | None) -> BaseException:
    error = TaskError(failure.host, failure.worker, failure.slice, failure.text, failure.summary)
    if isinstance(failure.error, BaseException):
        error.__cause__ = failure.error
    elif failure.error is not None:
        try:
            error.__cause__ = codec.decode(failure.error, [], copy=True)
        except Exception:  # noqa: BLE001, S110  its class cannot be imported here; the text remains
            pass
    return error


_EXCEPTIONS: dict[str, Callable[[Failure, float | None], BaseException]] = {
    "task": _task_error,
    "lost": lambda f, timeout: WorkerLost(f.host, f.worker, f.slice, f.text),
    "room": lambda f, timeout: QjamError(f"{f.host}: {f.text}"),
    "load": lambda f, timeout: f.error,
    "timeout": lambda f, timeout: RoundTimeout(f"the round did not end within {timeout} s: {f.text}"),
    "cancelled": lambda f, timeout: CancelledError(),
    "closed": lambda f, timeout: MasterClosed(f.text),
    "crashed": lambda f, timeout: QjamError(f.text),
    "node": lambda f, timeout: QjamError(f"{f.host}: {f.text}"),
    "unreachable": lambda f, timeout: BootstrapError(f"no worker is left: {f.text}"),
}


def settle(future: Future[Any], pending: Pending, user_code: UserCode, sources: Sources, timeout: float | None) -> None:
    """End the future of a round that is over."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(outcome(pending, user_code, sources, timeout))
    except BaseException as error:  # noqa: BLE001  goes to whoever waits for the future
        future.set_exception(error)
    finally:
        del future, pending  # the error's traceback leads to this frame


class Finisher:
    """Threads that decode and reduce the results of `submit`, because the engine's loop runs no user code.

    Each result has its own thread: a callback of one future may wait for another.
    """

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    def put(self, call: Callable[[], None]) -> None:
        """Make `call` in a new thread."""

        def run() -> None:
            try:
                call()
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="qjam-finish", daemon=True)
        self._threads.add(thread)
        thread.start()

    def close(self) -> None:
        """Wait for the calls to end, STOP_TIMEOUT seconds for each."""
        for thread in list(self._threads):
            thread.join(STOP_TIMEOUT)
