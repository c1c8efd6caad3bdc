"""A result as it was when mapfunc returned it, whatever later calls of mapfunc do to the objects that it is made of."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from qjam_worker.values import codec

# Nothing can change these. (np.void is a view of a record, and may change.)
_FIXED = frozenset([type(None), bool, int, float, complex, str, bytes, range]) | {
    kind for kind in np.sctypeDict.values() if not issubclass(kind, (np.void, np.object_))
}


def detached(value: Any) -> Any:
    """A copy that shares nothing that can change. What cannot be copied (a lock, say) is the same object.

    Exact arrays, lists, tuples and dicts are rebuilt here; every other type is copied by copy.deepcopy, which keeps its
    class and state. Raises MemoryError, and TypeError for what is nested so deeply that it cannot be sent either.
    """
    for copied in (_rebuilt, _copied):
        try:
            return copied(value)
        except RecursionError:  # it contains itself, or is nested deeply: the next one goes further
            pass
    sent = encoded(value)
    return codec.decode(sent.header, sent.buffers, copy=True)


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


def encoded(result: Any) -> codec.Encoded:
    """A result as it is sent. Raises TypeError where it cannot be, and MemoryError."""
    try:
        return codec.encode(result)
    except codec.CodecError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        raise TypeError(f"mapfunc or reduce gave a result that cannot be sent back: {error}") from None
