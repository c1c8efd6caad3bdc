"""The future of a call, and what it raises."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from qjam.dispatch.call import Call, Returned
from qjam.dispatch.commands import Failure
from qjam.errors import WorkerLost


class CallLost(WorkerLost, BrokenProcessPool):
    """Three worker processes ended while they ran this call."""


class RemoteTraceback(Exception):
    """The traceback in the worker, as text: the cause of an exception that a call has raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


class Submitter(Protocol):
    """Whose call it is."""

    def wait(self, call: Call) -> None: ...
    def leave(self, future: CallFuture) -> None: ...
    def ended(self, future: CallFuture, one: Returned) -> None: ...
    def settled(self, future: CallFuture) -> None: ...
    def failed(self, future: CallFuture, failure: Failure) -> None: ...


class CallFuture(Future[Any]):
    """The future of a call. `cancel` stops a call that runs, too, and is True unless it has ended."""

    def __init__(self, caller: Submitter) -> None:
        super().__init__()
        self._caller = caller
        self._call: Call | None = None  # None: it was never handed to the workers

    def cancel(self) -> bool:
        """Drop the call if it has not begun, stop it if it runs. False if it has ended."""
        with self._condition:
            if self._state == "FINISHED":
                return False
            if self._state not in ("PENDING", "RUNNING"):
                return True
            self._state = "CANCELLED_AND_NOTIFIED"
            for waiter in self._waiters:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._caller.leave(self)
        self._invoke_callbacks()  # type: ignore[attr-defined]
        return True

    def result(self, timeout: float | None = None) -> Any:
        """As for any Future. A caller that waits without a timeout runs the engine's loop meanwhile."""
        call = self._call
        if timeout is None and call is not None and not self.done():
            self._caller.wait(call)
        return super().result(timeout)

    def begin(self) -> None:
        """A worker has begun the call."""
        with self._condition:
            if self._state == "PENDING":
                self._state = "RUNNING"

    def settle(self, one: Returned) -> None:
        """The call has returned."""
        try:
            self._caller.ended(self, one)
        except InvalidStateError:
            pass  # it was cancelled meanwhile
        finally:
            self._caller.settled(self)

    def give_up(self, failure: Failure) -> None:
        """The call cannot be done."""
        self._caller.failed(self, failure)

    def fail(self, error: BaseException) -> None:
        """The call will not return."""
        try:
            self.set_exception(error)
        except InvalidStateError:
            pass
