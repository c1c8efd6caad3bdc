"""Defers signal handlers that may raise, Ctrl-C above all, while the engine's loop runs in the main thread."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable
from typing import Any

_bare = importlib.import_module("_signal")  # `signal` wraps it in a search for names: 2 us a call
_SIGNALS = sorted(map(int, signal.valid_signals()))


class DeferredSignals:
    """From `begin` to `end` no handler that python code has installed runs; `on_signal` is called when one is deferred.

    It does nothing in other threads than the main one: python runs no handlers there.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self.came: list[tuple[int, Any]] = []  # the number and the frame of each
        self._on_signal = on_signal
        self._handlers: dict[int, Any] = {}

    def begin(self) -> None:
        """Defer handlers from now on. A handler that runs meanwhile may raise: call `end` then too."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = _bare.getsignal(number)  # an int where it is not python code
            if callable(handler):
                self._handlers[number] = handler
                _bare.signal(number, self._defer)

    def _defer(self, number: int, frame: Any) -> None:
        self.came.append((number, frame))
        self._on_signal()

    def end(self) -> None:
        """Install the handlers again and run the deferred ones; what they raise comes through."""
        for number, handler in self._handlers.items():
            _bare.signal(number, handler)
        handlers, self._handlers = self._handlers, {}
        came, self.came = self.came, []
        for number, frame in came:
            handlers[number](number, frame)
