"""What a function that travels by value takes along: file name and source lines, and the wrappers of functools."""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import linecache
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any, Callable, Optional

from .header import CodecError

CACHED = type(functools.lru_cache(None)(int))
# Attributes of a class that are code.
KINDS = (
    types.FunctionType,
    CACHED,
    classmethod,
    staticmethod,
    property,
    functools.cached_property,
    functools.partialmethod,
    functools.singledispatchmethod,
)

PYTHON = ".".join(map(str, sys.version_info[:2]))  # whose byte code a code object has

_new: Any = copyreg.__newobj__  # type: ignore[attr-defined]
_dispatcher: Any = functools.singledispatch(lambda value: value)
_has_lock = hasattr(functools.cached_property(lambda _: None), "lock")  # before python 3.12


# Code


_cells: dict[str, str] = {}  # what the cells of notebooks are called that have come, by the name of the file


def cell(file: str) -> str:
    """What IPython calls the cell of a notebook in tracebacks, such as `Cell In[3]`; empty for any other file."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    found = getattr(getattr(shell, "compile", None), "format_code_name", lambda name: None)(file)
    return _cells.get(file, "") if found is None else " ".join(found)


def with_cells(trace: str) -> str:
    """The text of a traceback, with the cells of notebooks as IPython names them."""
    for file, name in _cells.items():
        trace = trace.replace(f'File "{file}", line ', f"{name}, line ")
    return trace


def source_lines(code: types.CodeType) -> str:
    """The source of a code object from its first line to its last; empty if it cannot be had."""
    return "".join(linecache.getlines(code.co_filename)[code.co_firstlineno - 1 : _last_line(code)])


def _last_line(code: types.CodeType) -> int:
    inner = [_last_line(item) for item in code.co_consts if type(item) is types.CodeType]
    return max([*(line for _, line in dis.findlinestarts(code) if line), *inner], default=0)


def code(arguments: tuple[Any, ...], file: str, cell: str, first: int, lines: str, python: str) -> types.CodeType:
    """A code object, whose source lines tracebacks find from now on. `python`: the version that can run it.

    CodecError in any other: its interpreter would be killed by it.
    """
    if python != PYTHON:
        raise CodecError(
            f"it has a function or class that travels as byte code of python {python}, and here is python {PYTHON}: "
            "put it into a module, which travels as source"
        )
    if lines:
        _remember(file, first, lines.splitlines(keepends=True))
    if cell:
        _cells[file] = cell
    return types.CodeType(*arguments).replace(co_filename=file)


def names_of(code: Optional[types.CodeType]) -> Iterator[str]:
    """The names that a code object and those within it use, of globals and attributes."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if type(constant) is types.CodeType:
                yield from names_of(constant)


def _remember(file: str, first: int, lines: list[str]) -> None:
    entry = linecache.cache.get(file)
    text = list(entry[2]) if entry is not None and len(entry) == 4 else []
    text += ["\n"] * (first - 1 + len(lines) - len(text))
    text[first - 1 : first - 1 + len(lines)] = lines
    keep_lines(file, text)


def keep_lines(file: str, lines: list[str]) -> None:
    """Have tracebacks show these lines, whatever lies at that path here: without a time they stay."""
    linecache.cache[file] = (len(lines), None, lines, file)


# Globals


class Globals(dict[str, Any]):
    """The globals of functions that travel by value, as far as these need them to be made."""


_scope: Optional[dict[str, dict[str, Any]]] = None  # by name of their module, where functions share their globals


def globals_of(name: str, base: dict[str, Any]) -> dict[str, Any]:
    """The globals for functions of this module: those of the scope, in which all share them, or `base`."""
    if _scope is None:
        return base
    shared = _scope.setdefault(name, base)
    for key, value in base.items():
        shared.setdefault(key, value)
    return shared


@contextlib.contextmanager
def sharing_globals(scope: Optional[dict[str, dict[str, Any]]]) -> Iterator[None]:
    """Functions that are loaded here share their globals with those that were loaded with this scope before."""
    global _scope
    before, _scope = _scope, scope
    try:
        yield
    finally:
        _scope = before


# Wrappers of functools, reduced as __reduce__ does


def reduce_cached(value: Any) -> Any:
    """Of functools.lru_cache and cache: an empty one around the same function."""
    attributes = {name: item for name, item in vars(value).items() if name not in ("__wrapped__", "cache_parameters")}
    return cached, (value.__wrapped__, value.cache_parameters()), attributes


def cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    """An empty functools.lru_cache."""
    return functools.lru_cache(**parameters)(function)


def reduce_cached_property(value: functools.cached_property[Any]) -> Any:
    """Of functools.cached_property and classes derived from it: without the lock."""
    state = {name: item for name, item in vars(value).items() if name != "lock"}
    return _new, (type(value),), state, None, None, fill_cached_property


def fill_cached_property(value: functools.cached_property[Any], state: dict[str, Any]) -> None:
    """Give it its attributes, and a lock of its own."""
    vars(value).update(state)
    if _has_lock:
        value.lock = threading.RLock()  # type: ignore[attr-defined]


def is_singledispatch(function: types.FunctionType) -> bool:
    """Whether functools.singledispatch has made it."""
    return function.__code__ is _dispatcher.__code__


def reduce_singledispatch(value: Any) -> Any:
    """Of functools.singledispatch: another one with the same implementations."""
    made = ("register", "dispatch", "registry", "_clear_cache", "__wrapped__")
    attributes = {name: item for name, item in vars(value).items() if name not in made}
    implementations = {cls: item for cls, item in value.registry.items() if cls is not object}
    default = value.registry[object]
    return functools.singledispatch, (default,), (implementations, attributes), None, None, fill_singledispatch


def fill_singledispatch(value: Any, state: tuple[dict[type, Any], dict[str, Any]]) -> None:
    """Give it its implementations and attributes."""
    implementations, attributes = state
    for cls, implementation in implementations.items():
        value.register(cls, implementation)
    vars(value).update(attributes)
