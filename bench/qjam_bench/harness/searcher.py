"""A way to run what scikit-learn runs by joblib, as `qjam-bench joblib` drives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class Searcher:
    """A back-end of joblib that is ready."""

    def __init__(self, entered: Callable[..., AbstractContextManager[Any]]) -> None:
        """`entered`: gives a block in which joblib runs in this back-end; its arguments are arrays of many calls."""
        self.entered = entered

    def drive(self, loop: Callable[..., Any], *arguments: Any) -> Any:
        """Call a loop of ends/searches.py with this back-end; give the result."""
        return loop(self.entered, *arguments)
