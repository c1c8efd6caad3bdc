"""One submitter of calls."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import msgpack

from qjam.code.unchanged import watch
from qjam.code.user_code import Sources
from qjam.dispatch.call import Call, Function, Returned
from qjam.dispatch.calls import POISON
from qjam.dispatch.commands import Failure
from qjam.errors import TaskError
from qjam.outcome import exception_of
from qjam_worker.values import arguments, codec
from qjam_worker.values.outcomes import BROKEN, LOST, RAISED, STOPPED

from .center import Center, pickled
from .future import CallFuture, CallLost, RemoteTraceback

# Functions of one submitter that are kept as they were pickled, and their bytes beside the last one.
FUNCTIONS_KEPT, BYTES_KEPT = 256, 64 * 1024 * 1024

_groups = itertools.count(1)


class Known(NamedTuple):
    """A function that was pickled in this epoch, while it is alive, and what tells whether it is as it was."""

    alive: weakref.ref[Any]
    epoch: int
    unchanged: Callable[[Any], bool]
    function: Function


def _forget(known: dict[int, Known], place: int, alive: weakref.ref[Any]) -> None:
    if place in known and known[place].alive is alive:
        del known[place]


class Caller:
    """One submitter of calls to the workers of a Master.

    A function is pickled when it is first submitted, and again when anything has changed that it is made of or uses:
    its cells, defaults, globals, the state of its module. `setup` is called with `given` once in each worker process
    before its first call.

    Raises TypeError if `setup` or what it is given cannot be sent to workers.
    """

    def __init__(
        self, center: Center, sources: Sources, setup: Callable[..., Any] | None = None, given: tuple[Any, ...] = ()
    ) -> None:
        self.center, self._sources = center, sources
        self.broken = ""  # why no call can be made any more
        self.closed = False
        self._group = next(_groups)
        self._functions: dict[Any, Function] = {}  # by key
        self._known: dict[int, Known] = {}  # by id
        self._lock = threading.Lock()
        self._outstanding: set[CallFuture] = set()
        self._setup, self._given = setup, b""
        if setup is not None:
            sources.user_code(setup)
            self._given = arguments.BARE + pickled((given, {}), None)[0]

    @property
    def outstanding(self) -> list[CallFuture]:
        """The futures that are not done."""
        return list(self._outstanding)

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallFuture:
        """Have a worker call the function. What cannot be sent is told by the future."""
        future = CallFuture(self)
        if self.broken:
            raise BrokenProcessPool(self.broken)
        try:
            known = self._function(function)
            data, large = self.center.packed((args, kwargs))
        except Exception as error:  # noqa: BLE001  pickling runs user code, which may raise anything
            future.fail(error)
            return future
        future._call = call = Call(self._group, known, data, future, large)  # noqa: SLF001
        self._outstanding.add(future)
        self.center.submit(call)
        return future

    def _function(self, function: Callable[..., Any]) -> Function:
        epoch = self._sources.epoch()
        known = self._known.get(id(function))
        if known is not None and known.epoch == epoch and known.unchanged(function):
            return known.function
        if not callable(function):
            raise TypeError(f"{function!r} is not callable")
        with self._lock:
            unchanged = watch(function)
            code = self._sources.user_code(function)
            epoch = code.header["epoch"]
            found = self._functions.get(code.key)
            if found is None:
                setup = None
                if self._setup is not None:
                    before = self._sources.user_code(self._setup)
                    setup = before.header, before.code, self._given
                description = [code.header, code.code, self._group, setup]
                packed = msgpack.packb(description, unicode_errors="surrogatepass")
                found = self._functions[code.key] = Function(self.center.next_function(), packed)
                self._forget_oldest()
            if unchanged is not None:
                gone = functools.partial(_forget, self._known, id(function))
                self._known[id(function)] = Known(weakref.ref(function, gone), epoch, unchanged, found)
            return found

    def _forget_oldest(self) -> None:
        kept = sum(len(function.description) for function in self._functions.values())
        forgotten = []
        while len(self._functions) > FUNCTIONS_KEPT or (kept > BYTES_KEPT and len(self._functions) > 1):
            forgotten.append(self._functions.pop(next(iter(self._functions))))
            kept -= len(forgotten[-1].description)
        if forgotten:
            self._known.clear()
            self.center.forget(forgotten)

    def wait(self, call: Call) -> None:
        """Run the loop until the call has ended, if no other thread does."""
        self.center.wait(call)

    def leave(self, future: CallFuture) -> None:
        """The future is cancelled."""
        call, future._call = future._call, None  # noqa: SLF001
        self._outstanding.discard(future)
        if call is not None:
            self.center.cancel([call])

    def settled(self, future: CallFuture) -> None:
        """The future is done, and its callbacks have been called."""
        self._outstanding.discard(future)
        future._call = None  # noqa: SLF001  which refers to the future: no circle shall keep its result

    def ended(self, future: CallFuture, one: Returned) -> None:
        """Set the future to what the call has come to."""
        how, data = one.how, one.data
        if how == RAISED:
            future.set_exception(_raised(one))
        elif how == BROKEN:
            self._break(_raised(one), future)
        elif how == LOST:
            worker, text = msgpack.unpackb(data[0])
            text = f"{text}, and so did the {POISON - 1} workers before it that had this call"
            future.set_exception(CallLost(one.host, worker, None, text))
        elif how == STOPPED:  # by a signal of somebody else's
            future.set_exception(CancelledError())
        else:
            try:
                value = arguments.loads(data[0], [bytearray(part) for part in data[1:]])
            except BaseException as error:  # noqa: BLE001  its class may raise anything
                future.set_exception(error)
            else:
                future.set_result(value)

    def failed(self, future: CallFuture, failure: Failure) -> None:
        """The call cannot be done."""
        future.fail(exception_of(failure, None))
        self.settled(future)

    def _break(self, error: BaseException, future: CallFuture) -> None:
        self.broken = f"the initializer has raised in a worker: {error!r}"
        for other in [future, *self.outstanding]:
            broken = BrokenProcessPool(self.broken)
            broken.__cause__ = error
            self._outstanding.discard(other)
            other.fail(broken)
            if other._call is not None and other is not future:  # noqa: SLF001
                self.center.cancel([other._call])  # noqa: SLF001

    def close(self, *, cancel: bool = False) -> None:
        """No more calls will come. `cancel`: those that have not begun are dropped."""
        self.closed = True
        if cancel:
            for future in self.outstanding:
                if not future.running():
                    future.cancel()
        with self._lock:
            functions = list(self._functions.values())
            self._functions.clear()
            self._known.clear()
        self.center.forget(functions)


def _raised(one: Returned) -> BaseException:
    """What a call has raised, with the traceback in the worker as its cause."""
    text, summary, pickled = msgpack.unpackb(one.data[0], unicode_errors="surrogatepass")
    if pickled is not None:
        try:
            error = codec.decode(pickled, [], copy=True)
        except Exception:  # noqa: BLE001  its class cannot be imported here; the text remains
            error = None
        if isinstance(error, BaseException):
            error.__cause__ = RemoteTraceback(text)
            return error
    return TaskError(one.host, -1, None, text, summary)
