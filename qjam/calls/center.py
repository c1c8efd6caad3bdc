"""All calls of one Master, between the threads that submit them and the engine's loop."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

from qjam.dispatch.call import Argument, Call, Function, Returned
from qjam.dispatch.commands import Ended, Failure
from qjam.engine.engine import Engine
from qjam_worker.values import arguments, codec

from .settler import Settler

# Seconds for which hosts keep large parts of arguments that no call needs: the next one may well have the same.
GRACE = 5.0
# After so many calls that were waited for within so many seconds, the next one is expected to be so, too: the thread
# that submits it runs the loop itself when it waits, and no other thread is woken.
STREAK, AT_ONCE = 3, 0.0002


def pickled(value: Any, most: int | None) -> tuple[bytes, list[memoryview]]:
    try:
        return arguments.dumps(value, most)
    except codec.CodecError as error:
        raise arguments.NotPickled(f"the arguments of a call cannot be sent to workers: {error}") from error.__cause__


class Center:
    """The calls of one Master, between the threads that submit them and the engine's loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._new: deque[Call] = deque()
        self._posted = False  # whether the loop is about to take the new ones
        self._settler = Settler(engine.call_later)
        self._waiting: dict[Call, _Waiting] = {}
        self._numbers = itertools.count(1)
        self._arguments: OrderedDict[str, Argument] = OrderedDict()  # large parts by key, least recently used first
        self._lock = threading.Lock()
        self._last: Callable[[], Call | None] = lambda: None  # the call that was submitted last, weakly
        self._submitted = 0.0  # when, in seconds
        self._streak = 0  # calls that were waited for as soon as they were submitted, in a row
        self._tidying = False  # whether the loop is going to look for parts that nobody needs
        engine.on_ended(self._on_ended)

    def next_function(self) -> int:
        """A number for a function."""
        return next(self._numbers)

    def submit(self, call: Call) -> None:
        """Hand a call to the loop, which is woken once for all that come until it looks."""
        self._new.append(call)
        if self._posted:
            return
        self._posted = True
        last = self._last()
        if last is not None and not last.over:
            self._streak = 0
        self._last, self._submitted = weakref.ref(call), time.monotonic()
        self._engine.submit_calls(self._take, awaited=self._streak >= STREAK)

    def packed(self, value: Any) -> tuple[bytes, list[Argument]]:
        """Arguments as they are sent, and their large parts, which hosts are sent once. TypeError if they cannot be."""
        data, buffers = pickled(value, arguments.LARGE)
        return arguments.BARE + data, [self._argument(buffer) for buffer in buffers] if buffers else []

    def _argument(self, buffer: memoryview) -> Argument:
        import xxhash  # here, for user modules that import qjam are loaded on hosts that lack it

        key = xxhash.xxh3_128_hexdigest(buffer)
        with self._lock:
            known = self._arguments.get(key)
            if known is None:
                copy = bytes(buffer)  # the user may change it; what is sent has this hash
                key = xxhash.xxh3_128_hexdigest(copy)
                known = self._arguments[key] = self._arguments.get(key) or Argument(key, copy)
            self._arguments.move_to_end(key)
            known.used = time.monotonic()
        if not self._tidying:
            self._tidying = True
            self._engine.tidy_later(GRACE, self._tidy)
        return known

    def _tidy(self) -> None:
        """Let go of large parts that no call has needed for a while. In the loop."""
        self._tidying = False
        with self._lock:
            unused = [argument for argument in self._arguments.values() if not argument.calls]
            late = time.monotonic() - GRACE
            going = [argument for argument in unused if argument.used < late]
            for argument in going:
                del self._arguments[argument.key]
        self._engine.forget_arguments(going)
        if self._arguments and not self._tidying:
            self._tidying = True
            self._engine.call_later(GRACE, self._tidy)

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
        at_once = call is self._last() and time.monotonic() - self._submitted < AT_ONCE
        self._streak = self._streak + 1 if at_once else 0
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
        self.call.future.give_up(self.failure)


class _Waiting:
    """A caller that runs the loop until its call has ended: `one` tells how."""

    def __init__(self) -> None:
        self.over = False
        self.one: Returned | None = None
