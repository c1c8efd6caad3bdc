"""Notices state that was set on a module after it was loaded, so that workers can set it too."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import msgpack
import numpy as np

from qjam_worker.values import by_value
from qjam_worker.values.functions import PYTHON

# What each round looks into. Of larger values only the replacement is noticed, and a change of size.
MAX_ITEMS = 1000
MAX_BYTES = 4096

Look = Callable[[Any], Any]

_DELETED: Any = object()
_END: Any = object()
_VALUES = operator.methodcaller("values")
_OF_FUNCTIONS = [operator.attrgetter(name) for name in ("__code__", "__defaults__", "__kwdefaults__")]
# The import system and python itself set these.
_NOT_STATE = {
    *("__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__conditional_annotations__"),
    *("__abstractmethods__", "__builtins__", "__cached__", "__dict__", "__doc__", "__file__", "__loader__"),
    *("__name__", "__package__", "__path__", "__spec__", "__static_attributes__", "__warningregistry__"),
    *("__weakref__", "_abc_impl"),
}


class Snapshot:
    """What a namespace (of a module, or of a class in one) held at some moment: its values, and what small containers,
    functions, classes and objects there held.
    """

    def __init__(self, owner: Any, module: str) -> None:
        self._values = {name: value for name, value in vars(owner).items() if _is_state(name, value, module)}
        looks = ((name, _look(value, module)) for name, value in self._values.items())
        self._inner = {name: (look, look(self._values[name])) for name, look in looks if look is not None}
        self._classes = {
            name: Snapshot(value, module)
            for name, value in self._values.items()
            if isinstance(value, type) and value.__module__ == module and value is not owner
        }

    def changes(self, owner: Any, module: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """What holds something else now: paths below the module ("RATE", "Model.SCALE") and values, or _DELETED."""
        now = {name: value for name, value in vars(owner).items() if _is_state(name, value, module)}
        for name, value in now.items():
            if name not in self._values or value is not self._values[name]:
                yield prefix + name, value
            elif name in self._classes:
                yield from self._classes[name].changes(value, module, f"{prefix}{name}.")
            elif name in self._inner:
                look, held = self._inner[name]
                if not _same(look(value), held):
                    yield prefix + name, value
        for name in self._values.keys() - now.keys():
            yield prefix + name, _DELETED

    def parts(self, owner: Any) -> Iterator[tuple[Any, Look | None]]:
        """All that can change: namespaces, with None, and values, with the function that looks into each."""
        yield vars(owner), None
        for name, (look, _) in self._inner.items():
            yield self._values[name], look
        for name, inner in self._classes.items():
            yield from inner.parts(self._values[name])


class Watch:
    """Tells whether a module still holds what it held. Each round asks, so it compares all at once, without a loop."""

    def __init__(self, module: ModuleType) -> None:
        self._mappings: list[Mapping[Any, Any]] = []
        self._sequences: list[Iterable[Any]] = []  # also dicts, for their keys
        self._functions: list[FunctionType] = []
        self._others: list[tuple[Any, Look, Any]] = []
        for value, look in Snapshot(module, module.__name__).parts(module):
            if look in (None, _in_dict, _in_object):
                self._mappings.append(vars(value) if look is _in_object else value)
                if look is _in_dict:
                    self._sequences.append(value)
            elif look is _in_list:
                self._sequences.append(value)
            elif look is _in_function:
                self._functions.append(value)
                self._mappings.append(value.__dict__)
            else:
                self._others.append((value, look, look(value)))
        self._held = list(self._items())

    def is_unchanged(self) -> bool:
        """Whether it holds the same objects."""
        return all(map(operator.is_, self._items(), self._held)) and all(
            _same(look(value), held) for value, look, held in self._others
        )

    def _items(self) -> Iterator[Any]:
        return itertools.chain(
            itertools.chain.from_iterable(map(_VALUES, self._mappings)),
            itertools.chain.from_iterable(self._sequences),
            *(map(part, self._functions) for part in _OF_FUNCTIONS),
            [_END],
        )


def _is_state(name: str, value: Any, module: str) -> bool:
    return name not in _NOT_STATE and not (isinstance(value, ModuleType) and value.__name__ == f"{module}.{name}")


def _same(now: Any, before: Any) -> bool:
    if type(now) is list is type(before):
        return len(now) == len(before) and all(map(operator.is_, now, before))
    return bool(now == before)


def _look(value: Any, module: str) -> Look | None:
    """The function that tells what the value holds; None for what cannot change, or is not looked into."""
    if type(value) is FunctionType:
        return _in_function if value.__module__ == module else None
    look = _LOOKS.get(type(value))
    if look is not None:
        size, most = (value.nbytes, MAX_BYTES) if look is _in_array else (len(value), MAX_ITEMS)
        return look if size <= most else len
    if isinstance(value, (type, ModuleType)):
        return None
    return _in_object if type(getattr(value, "__dict__", None)) is dict else None


def _in_dict(value: Mapping[Any, Any]) -> list[Any]:
    return [*value, *value.values()]


def _in_object(value: Any) -> list[Any]:
    return _in_dict(vars(value))


def _in_function(value: Any) -> list[Any]:
    return [*(part(value) for part in _OF_FUNCTIONS), *_in_dict(value.__dict__)]


def _in_list(value: Iterable[Any]) -> list[Any]:
    return list(value)


def _in_array(value: np.ndarray[Any, Any]) -> bytes:
    return value.tobytes()


_LOOKS: dict[type, Look] = {
    dict: _in_dict,
    list: _in_list,
    set: _in_list,
    bytearray: bytes,
    np.ndarray: _in_array,
}


class State(NamedTuple):
    """State of a module as it travels: `packed`, b"" if there is none. `stays`: what cannot travel, and why."""

    packed: bytes
    stays: list[tuple[str, str]]


def state_of(module: ModuleType, baseline: Snapshot) -> State:
    """What was set on the module since `baseline`; a worker sets it with user_modules.set_state."""
    changes = list(baseline.changes(module, module.__name__))
    changed = {id(value) for _, value in changes}
    values: list[tuple[str, bytes | None]] = []
    has_code = False
    stays: list[tuple[str, str]] = []
    for path, value in changes:
        if value is _DELETED:
            values.append((path, None))
            continue
        try:
            kind, pickled = _pickled(value, module, changed)
        except Exception as error:  # noqa: BLE001  a user's __reduce__ may raise anything
            stays.append((path, str(error)))
            continue
        values.append((path, kind + pickled.data))
        has_code = has_code or pickled.has_code
    if not values:
        return State(b"", stays)
    python = PYTHON if has_code else None
    return State(msgpack.packb({"python": python, "values": values}), stays)


def _pickled(value: Any, module: ModuleType, changed: set[int]) -> tuple[bytes, by_value.Pickled]:
    if type(value) is FunctionType and value.__globals__ is vars(module) and value.__closure__ is None:
        # It is at home there: the worker makes it anew among the globals of its own module.
        parts = (value.__code__, value.__name__, value.__qualname__, value.__defaults__, value.__kwdefaults__)
        return b"f", by_value.dumps_code((*parts, value.__dict__), changed)
    return b"v", by_value.dumps_code(value, changed)
