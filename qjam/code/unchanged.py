"""Whether a function still is what it was when it was pickled, told without pickling it again."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from qjam_worker.values.functions import names_of

_ABSENT: Any = object()
# What never changes: the same object is the same value.
_FIXED = frozenset(
    [int, float, complex, str, bytes, bool, type(None), type(...), range, BuiltinFunctionType, ModuleType]
)


Parts = tuple[CodeType, Any, Any]  # of a function: code, defaults, defaults of keywords


class Watch:
    """What a function is made of: the names that it uses and what they meant, its cells, its defaults."""

    def __init__(self, function: FunctionType) -> None:
        self._own = _parts(function)  # not the function itself, which is not to be kept alive
        self._names: list[tuple[Mapping[str, Any], list[str], list[Any]]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._functions: list[tuple[FunctionType, Parts]] = []  # that it calls
        self._seen: set[int] = {id(function)}
        self.is_known = self._add(function)

    def is_unchanged(self, function: FunctionType) -> bool:
        """Whether all of it is as it was."""
        if not _has(function, self._own):
            return False
        for other, parts in self._functions:
            if not _has(other, parts):
                return False
        for cell, value in self._cells:
            if _content(cell) is not value:
                return False
        for mapping, names, values in self._names:
            for name, value in zip(names, values, strict=True):
                if mapping.get(name, _ABSENT) is not value:
                    return False
        return True

    def _add(self, function: FunctionType) -> bool:
        """Watch what a function uses; False where that may change unseen, as a list may."""
        if function.__dict__:
            return False
        names = list(dict.fromkeys(names_of(function.__code__)))
        values = [function.__globals__.get(name, _ABSENT) for name in names]
        cells = [(cell, _content(cell)) for cell in function.__closure__ or ()]
        self._names.append((function.__globals__, names, values))
        self._cells += cells
        more = (function.__kwdefaults__ or {}).values()
        used = [*values, *(value for _, value in cells), *(function.__defaults__ or ()), *more]
        return all(map(self._is_known, used))

    def _is_known(self, value: Any) -> bool:
        kind = type(value)
        if kind in _FIXED or value is _ABSENT:
            return True
        if kind in (tuple, frozenset):
            return all(map(self._is_known, value))
        if kind is FunctionType or isinstance(value, type):
            return _goes_by_name(value) or (kind is FunctionType and self._add_other(value))
        return False

    def _add_other(self, function: FunctionType) -> bool:
        if id(function) in self._seen:
            return True
        self._seen.add(id(function))
        self._functions.append((function, _parts(function)))
        return self._add(function)


def _parts(function: FunctionType) -> Parts:
    return function.__code__, function.__defaults__, function.__kwdefaults__


def _has(function: FunctionType, parts: Parts) -> bool:
    return all(map(operator.is_, _parts(function), parts)) and not function.__dict__


def watch(function: Any) -> Callable[[Any], bool] | None:
    """What tells whether the function still is as it is now; None where only pickling it tells. It does not keep the
    function alive.
    """
    if type(function) is BuiltinFunctionType and isinstance(function.__self__, ModuleType | None):
        return lambda function: True
    if type(function) is functools.partial:
        return _watch_partial(function)
    if _goes_by_name(function):
        return _goes_by_name
    if type(function) is not FunctionType:
        return None
    found = Watch(function)
    return found.is_unchanged if found.is_known else None


def _watch_partial(function: functools.partial[Any]) -> Callable[[Any], bool] | None:
    inner = watch(function.func)
    keywords = dict(function.keywords)
    if (
        inner is None
        or vars(function)
        or not all(type(value) in _FIXED for value in [*function.args, *keywords.values()])
    ):
        return None
    return lambda function: inner(function.func) and function.keywords == keywords and not vars(function)


def _goes_by_name(value: Any) -> bool:
    """Whether this is a function or class at the top of a module that others can import."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if module is None or module.__name__ in ("__main__", "__mp_main__") or getattr(module, "__spec__", None) is None:
        return False
    name = getattr(value, "__qualname__", "")
    return vars(module).get(name) is value


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT
