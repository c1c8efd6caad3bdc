"""What calls are given and give back, as pickles: most are small, and the codec of params takes ten times as long."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from typing import Any, Optional

from . import definitions, pickles
from .header import Buffer, CodecError

# Bytes of a buffer that stays outside the pickle, to be sent on its own and mapped.
LARGE = 1 << 20


class NotPickled(TypeError, pickle.PicklingError):
    """The arguments or the result of a call cannot be sent. `__cause__` is what pickling them has raised."""


def dumps(value: Any, most: Optional[int] = LARGE) -> tuple[bytes, list[memoryview]]:
    """A pickle of `value`, and its buffers from `most` bytes on; None: the pickle holds all. CodecError where it cannot
    be pickled.
    """

    def keeper(large: list[memoryview]) -> Optional[_Keeper]:
        return None if most is None else _Keeper(large, most)

    classes = definitions.changed()
    failure = None
    try:
        large: list[memoryview] = []
        data = pickle.dumps((value,), 5, buffer_callback=keeper(large))
        if not (classes or pickles.names_main(data)):
            return pickles.with_versions(data), large
    except RecursionError as error:
        raise CodecError(f"a {type(value).__name__} is nested too deeply to be sent") from error
    except Exception as error:  # noqa: BLE001  a user's __reduce__ may raise anything
        failure = error
    try:
        from . import by_value

        return by_value.dumps((value, *classes), keep=keeper)[:2]
    except ImportError as error:
        failure = failure or error
    except Exception as error:  # noqa: BLE001  as above
        failure = error
    raise CodecError(f"a value of type {type(value).__name__} cannot be pickled: {failure}") from failure


def dumps_whole(value: Any) -> bytes:
    """A pickle of `value` that holds all its buffers."""
    return dumps(value, most=None)[0]


def loads(data: Buffer, buffers: Sequence[Any] = ()) -> Any:
    """The value. Its arrays are the caller's own, but for views of `buffers`. Raises what loading it raises."""
    return pickles.loads(data, buffers)[0]


# Arguments begin with the size of the table that tells where their large parts lie; most have none.
_TABLE = struct.Struct("<I")
BARE = _TABLE.pack(0)


def with_places(packed: bytes, table: bytes) -> bytes:
    """Packed arguments that begin with BARE, with this table in its place."""
    return _TABLE.pack(len(table)) + table + packed[_TABLE.size :]


def parts(packed: memoryview) -> tuple[memoryview, memoryview]:
    """The table, which is empty for most, and the pickle."""
    (size,) = _TABLE.unpack_from(packed)
    return packed[_TABLE.size : _TABLE.size + size], packed[_TABLE.size + size :]


class _Keeper:
    """Called by pickle for each buffer; whether the pickle is to hold it. The large ones are kept outside."""

    def __init__(self, large: list[memoryview], most: int) -> None:
        self._large, self._most = large, most

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # it is not contiguous
            return True
        if raw.nbytes < self._most:
            return True
        self._large.append(raw)
        return False
