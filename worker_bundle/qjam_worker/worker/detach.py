"""A result as it was when mapfunc returned it, whatever later calls of mapfunc do to the objects that it is made of."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

# Nothing can change these. (np.void is a view of a record, and may change.)
_FIXED = frozenset([type(None), bool, int, float, complex, str, bytes, range]) | {
    kind for kind in np.sctypeDict.values() if not issubclass(kind, (np.void, np.object_))
}


def detached(value: Any) -> Any:
    """A copy that shares nothing that can change. What cannot be copied (a lock, say) is the same object.

    Exact arrays, lists, tuples and dicts are rebuilt here; every other type is copied by copy.deepcopy, which keeps its
    class and state. Raises MemoryError.
    """
    try:
        return _rebuilt(value)
    except RecursionError:  # it contains itself, or is nested deeply
        return _copied(value)


def _rebuilt(value: Any) -> Any:
    kind = type(value)
    if kind in _FIXED:
        return value
    if kind is np.ndarray and not value.dtype.hasobject:
        return value.copy("K")
    if kind is list:
        return [_rebuilt(item) for item in value]
    if kind is tuple:
        return tuple([_rebuilt(item) for item in value])
    if kind is dict:
        return {_rebuilt(key): _rebuilt(item) for key, item in value.items()}
    return _copied(value)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001  a class of the user's may raise anything
        return value
