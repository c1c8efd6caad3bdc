"""Calls of functions in the workers, many at a time: what `Executor`, `Pool` and the joblib back-end are made of."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import msgpack

from qjam_worker.values import arguments, codec
from qjam_worker.values.outcomes import BROKEN, LOST, RAISED, STOPPED

from .code.unchanged import watch
from .code.user_code import Sources
from .dispatch.call import Call, Function, Returned
from .dispatch.calls import POISON
from .dispatch.commands import Ended, Failure
from .engine.engine import Engine
from .errors import TaskError, WorkerLost
from .launch.supervisor import STOP_TIMEOUT
from .outcome import exception_of

# Seconds for which a callback may run before another thread goes on with the other results.
SLOW_CALLBACK = 0.05
FUNCTIONS_KEPT = 256  # of one submitter

_groups = itertools.count(1)


class CallLost(WorkerLost, BrokenProcessPool):
    """Three worker processes ended while they ran this call."""


class RemoteTraceback(Exception):
    """The traceback in the worker, as text: the cause of an exception that a call has raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


class CallFuture(Future[Any]):
    """The future of a call. `cancel` stops a call that runs, too, and is True unless it has ended."""

    def __init__(self, caller: Caller) -> None:
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
        if timeout is None and self._call is not None and not self.done():
            self._caller.center.wait(self._call)
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

    def fail(self, error: BaseException) -> None:
        """The call will not return."""
        try:
            self.set_exception(error)
        except InvalidStateError:
            pass


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
        self._known: OrderedDict[int, tuple[Any, int, Callable[[], bool] | None, Function]] = OrderedDict()  # by id
        self._lock = threading.Lock()
        self._outstanding: set[CallFuture] = set()
        self._setup, self._given = setup, b""
        if setup is not None:
            sources.user_code(setup)
            self._given = _packed((given, {}))

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
            data = _packed((args, kwargs))
        except Exception as error:  # noqa: BLE001  pickling runs user code, which may raise anything
            future.fail(error)
            return future
        future._call = call = Call(self._group, known, data, future)  # noqa: SLF001
        self._outstanding.add(future)
        self.center.submit(call)
        return future

    def _function(self, function: Callable[..., Any]) -> Function:
        epoch = self._sources.epoch()
        known = self._known.get(id(function))
        if known is not None and known[1] == epoch and known[2] is not None and known[2]():
            return known[3]
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
                if len(self._functions) > FUNCTIONS_KEPT:
                    self.center.forget([self._functions.pop(next(iter(self._functions)))])
                    self._known.clear()
            self._known[id(function)] = function, epoch, unchanged, found
            if len(self._known) > FUNCTIONS_KEPT:
                self._known.popitem(last=False)
            return found

    def leave(self, future: CallFuture) -> None:
        """The future is cancelled."""
        self._outstanding.discard(future)
        if future._call is not None:  # noqa: SLF001
            self.center.cancel([future._call])  # noqa: SLF001

    def ended(self, future: CallFuture, one: Returned) -> None:
        """Set the future to what the call has come to."""
        self._outstanding.discard(future)
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
            except Exception as error:  # noqa: BLE001  its class may raise anything
                future.set_exception(error)
            else:
                future.set_result(value)

    def failed(self, future: CallFuture, failure: Failure) -> None:
        """The call cannot be done."""
        self._outstanding.discard(future)
        future.fail(exception_of(failure, None))

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


class Center:
    """The calls of one Master, between the threads that submit them and the engine's loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._new: deque[Call] = deque()
        self._posted = False  # whether the loop is about to take the new ones
        self._settler = Settler(engine.call_later)
        self._waiting: dict[Call, _Waiting] = {}
        self._numbers = itertools.count(1)
        engine.on_ended(self._on_ended)

    def next_function(self) -> int:
        """A number for a function."""
        return next(self._numbers)

    def submit(self, call: Call) -> None:
        """Hand a call to the loop, which is woken once for all that come until it looks."""
        self._new.append(call)
        if not self._posted:
            self._posted = True
            self._engine.submit_calls(self._take)

    def _take(self) -> list[Call]:
        self._posted = False
        taken: list[Call] = []
        try:
            while True:
                taken.append(self._new.popleft())
        except IndexError:
            return taken

    def cancel(self, calls: list[Call]) -> None:
        """Nobody wants these any more."""
        self._engine.cancel_calls(calls)

    def forget(self, functions: Sequence[Function]) -> None:
        """No more calls of these will come."""
        if functions:
            self._engine.forget_functions(list(functions))

    def wait(self, call: Call) -> None:
        """Run the loop in this thread, if no other one does, until the call has ended."""
        waiting = _Waiting()

        def begin() -> None:
            self._waiting[call] = waiting
            waiting.over = call.over

        try:
            self._engine.drive(waiting, begin)
        finally:
            self._waiting.pop(call, None)
            if waiting.one is not None:
                call.future.settle(waiting.one)

    def _on_ended(self, command: Ended) -> None:
        for call in command.begun:
            call.future.begin()
        items: list[Callable[[], None]] = []
        for one in command.returned:
            waiting = self._waiting.get(one.call) if self._waiting else None
            if waiting is not None:
                waiting.over = True
                if not one.call.future._done_callbacks:  # noqa: SLF001
                    waiting.one = one
                    continue
            items.append(_Settle(one))
        for call, failure in command.failed:
            waiting = self._waiting.get(call)
            if waiting is not None:
                waiting.over = True
            items.append(_Fail(call, failure))
        if items:
            self._settler.put(items)

    def close(self) -> None:
        """End the threads, once all futures are set."""
        self._settler.close()


class _Settle:
    __slots__ = ("one",)

    def __init__(self, one: Returned) -> None:
        self.one = one

    def __call__(self) -> None:
        self.one.call.future.settle(self.one)


class _Fail:
    __slots__ = ("call", "failure")

    def __init__(self, call: Call, failure: Failure) -> None:
        self.call, self.failure = call, failure

    def __call__(self) -> None:
        future: CallFuture = self.call.future
        future._caller.failed(future, self.failure)  # noqa: SLF001


class _Waiting:
    """A caller that runs the loop until its call has ended: `one` tells how."""

    def __init__(self) -> None:
        self.over = False
        self.one: Returned | None = None


class Settler:
    """Sets futures, in a thread of its own: decoding and callbacks run user code. A callback that takes long, or waits
    for another future, does not keep the others waiting: another thread goes on with them.
    """

    def __init__(self, later: Callable[[float, Callable[[], None]], None]) -> None:
        self._later = later
        self._items: deque[Callable[[], None]] = deque()
        self._ready = threading.Semaphore(0)
        self._busy: dict[threading.Thread, float | None] = {}  # since when a thread is at an item
        self._lock = threading.Lock()
        self._looking = self._closed = False

    def put(self, items: list[Callable[[], None]]) -> None:
        """Have these called, in this order as long as none takes long. In the loop."""
        self._items.extend(items)
        if not self._busy:
            self._start()
        self._ready.release()
        self._look_later()

    def _look_later(self) -> None:
        if not self._looking:
            self._looking = True
            self._later(SLOW_CALLBACK, self._look)

    def _look(self) -> None:
        self._looking = False
        if not self._items or self._closed:
            return
        slow = time.monotonic() - SLOW_CALLBACK
        if all(since is not None and since < slow for since in list(self._busy.values())):
            self._start()
            self._ready.release()
        self._look_later()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="qjam-settle", daemon=True)
        self._busy[thread] = None
        thread.start()

    def _run(self) -> None:
        me, busy, items = threading.current_thread(), self._busy, self._items
        while True:
            self._ready.acquire()
            while items:
                try:
                    item = items.popleft()
                except IndexError:
                    break
                busy[me] = time.monotonic()
                item()
                del item
                busy[me] = None
            with self._lock:
                if self._closed or len(busy) > 1:  # one is enough
                    del busy[me]
                    if self._closed:
                        self._ready.release()
                    return

    def close(self) -> None:
        """Wait for the items to be done, a while for each thread, and end the threads."""
        self._closed = True
        threads = list(self._busy)
        self._ready.release()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(STOP_TIMEOUT)


def _packed(value: Any) -> bytes:
    try:
        data, buffers = arguments.dumps(value)
        return data if not buffers else arguments.dumps_whole(value)
    except codec.CodecError as error:
        raise TypeError(f"the arguments of a call cannot be sent to workers: {error}") from error.__cause__


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
