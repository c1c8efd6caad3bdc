"""Signals whose handlers may raise, Ctrl-C above all, put off while the engine's loop runs in the main thread."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable
from typing import Any

_bare = importlib.import_module("_signal")  # what `signal` wraps in a search for names that takes 2 us each time
_SIGNALS = sorted(map(int, signal.valid_signals()))


class DeferredSignals:
    """From `begin` to `end` no handler that python code has installed is run; `on_signal` tells that one was put off.

    In other threads than the main one nothing is done: python runs no handlers there.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self.came: list[tuple[int, Any]] = []  # number of the signal, and the frame that it came in
        self._on_signal = on_signal
        self._handlers: dict[int, Any] = {}

    def begin(self) -> None:
        """Put off what comes from now on. What a handler raises meanwhile comes through: call `end` then as well."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = _bare.getsignal(number)  # a number for what is not python code
            if callable(handler):
                self._handlers[number] = handler
                _bare.signal(number, self._defer)

    def _defer(self, number: int, frame: Any) -> None:
        self.came.append((number, frame))
        self._on_signal()

    def end(self) -> None:
        """Have the handlers back; what was put off is handled now, and what they raise comes through."""
        for number, handler in self._handlers.items():
            _bare.signal(number, handler)
        handlers, self._handlers = self._handlers, {}
        came, self.came = self.came, []
        for number, frame in came:
            handlers[number](number, frame)
