"""Whether a function still is what it was when it was pickled, told without pickling it again."""

from __future__ import annotations

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


class Watch:
    """What a function is made of: the names that it uses and what they meant, its cells, its defaults."""

    def __init__(self) -> None:
        self._names: list[tuple[Mapping[str, Any], list[str], list[Any]]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._functions: list[tuple[FunctionType, CodeType, Any, Any]] = []
        self._seen: set[int] = set()

    def is_unchanged(self) -> bool:
        """Whether all of it is as it was."""
        for function, code, defaults, more in self._functions:
            if (
                function.__code__ is not code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not more
                or function.__dict__
            ):
                return False
        for cell, value in self._cells:
            if _content(cell) is not value:
                return False
        for mapping, names, values in self._names:
            for name, value in zip(names, values, strict=True):
                if mapping.get(name, _ABSENT) is not value:
                    return False
        return True

    def add(self, function: FunctionType) -> bool:
        """Watch a function too; False where it uses what may change unseen, such as a list."""
        if id(function) in self._seen:
            return True
        self._seen.add(id(function))
        if function.__dict__:
            return False
        names = list(dict.fromkeys(names_of(function.__code__)))
        values = [function.__globals__.get(name, _ABSENT) for name in names]
        cells = [(cell, _content(cell)) for cell in function.__closure__ or ()]
        self._functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
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
            return _goes_by_name(value) or (kind is FunctionType and self.add(value))
        return False


def watch(function: Any) -> Callable[[], bool] | None:
    """What tells whether the function still is as it is now; None where only pickling it tells."""
    if type(function) is BuiltinFunctionType and isinstance(function.__self__, ModuleType | None):
        return lambda: True
    if _goes_by_name(function):
        names, name = vars(sys.modules[function.__module__]), function.__name__
        module = sys.modules[function.__module__]
        return lambda: names.get(name) is function and sys.modules.get(function.__module__) is module
    if type(function) is not FunctionType:
        return None
    found = Watch()
    return found.is_unchanged if found.add(function) else None


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
