"""Numpy dtypes to bytes and exactly back: byte order, fields, offsets, titles, alignment."""

from __future__ import annotations

import functools
from typing import Any

import msgpack
import numpy as np

BUILTIN = [np.dtype(char) for char in "?bBhHiIlLqQefdgFDG"]


def token(dtype: np.dtype[Any]) -> bytes | None:
    """The dtype in bytes: its name, or a zero byte and the description of a structured one.

    None for a dtype that bytes cannot tell: of objects, without a size, with metadata, of another package.
    """
    description = _describe(dtype)
    if description is None:
        return None
    if isinstance(description, str):
        return description.encode()
    same = _build(description)
    if same != dtype or _describe(same) != description:
        return None
    packed: bytes = msgpack.packb(description, unicode_errors="surrogatepass")
    return b"\0" + packed


def dtype(token: bytes) -> np.dtype[Any]:
    """The dtype of a token. ValueError, or what numpy and msgpack raise, when the token is not one."""
    if token[:1] == b"\0":  # not cached: the names of a structured dtype can be changed in place
        made = _build(msgpack.unpackb(token[1:], unicode_errors="surrogatepass"))
    else:
        made = _simple(token.decode())
    if made.hasobject or not made.itemsize:
        raise ValueError(f"dtype {made} cannot be read from bytes")
    return made


def _describe(dtype: np.dtype[Any]) -> Any:
    """What `_build` makes the same dtype of: a name, [base, shape] or a dict of fields; or None."""
    if dtype.hasobject or not dtype.itemsize or dtype.metadata:
        return None
    if dtype.subdtype is not None:
        base = _describe(dtype.subdtype[0])
        return base and [base, list(dtype.subdtype[1])]
    if dtype.fields is None:
        return _name(dtype)
    names = list(dtype.names or ())
    fields = [dtype.fields[name] for name in names]
    formats = [_describe(field[0]) for field in fields]
    titles = [field[2] if len(field) > 2 else None for field in fields]
    if dtype.type is not np.void or None in formats or not all(type(t) in (str, type(None)) for t in titles):
        return None
    return {
        "names": names,
        "formats": formats,
        "offsets": [field[1] for field in fields],
        "titles": titles,
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    }


def _name(dtype: np.dtype[Any]) -> str | None:
    # The second form is for 'q', which equals 'l' on Linux and has the same str, but scalars of another type.
    for name in (dtype.str, dtype.byteorder + dtype.char):
        try:
            same = np.dtype(name)
        except TypeError:  # a dtype that some other package registered
            continue
        if same == dtype and same.char == dtype.char and same.type is dtype.type:
            return name
    return None


def _build(description: Any) -> np.dtype[Any]:
    if isinstance(description, str):
        return _simple(description)
    if isinstance(description, list):
        base, shape = description
        return np.dtype((_build(base), tuple(shape)))
    fields: Any = {**description, "formats": [_build(item) for item in description["formats"]]}
    made: np.dtype[Any] = np.dtype(fields)
    return made


@functools.lru_cache(maxsize=256)
def _simple(name: str) -> np.dtype[Any]:
    if "," in name or not name:  # numpy would parse a list of fields
        raise ValueError(f"{name!r} is not the name of a dtype")
    return np.dtype(name)


# The fast way, by identity: numpy has one object for each of these.
TOKENS = {id(builtin): token(builtin) for builtin in BUILTIN}
DTYPES = {token(builtin): builtin for builtin in BUILTIN}
