"""Loads pickles: arrays that the caller may write to, and errors that name versions where these differ."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .header import Buffer

# Modules whose name means another module elsewhere; __mp_main__ is the script in a child that multiprocessing spawned.
MAIN = ("__main__", "__mp_main__")

# After a pickle, where loading does not look, stand the versions of those of these packages that it names, and how many
# bytes that takes.
_PACKAGES = ("numpy", "pandas", "scipy")
_MARKS = [(name, name.encode()) for name in _PACKAGES]
_SIZE = 2
_NO_VERSIONS = bytes(_SIZE)

_from_buffer: Any = np.zeros(1).__reduce_ex__(5)[0]  # with which numpy's pickles make an array


def names_main(data: bytes) -> bool:
    """Whether a pickle names a module that is another one elsewhere."""
    return b"_main__" in data  # which is in all names of MAIN


def with_versions(data: bytes) -> bytes:
    """The pickle and the versions of packages behind it."""
    found = [f"{name} {_version(name)}" for name, mark in _MARKS if mark in data and _version(name)]
    if not found:  # most are small, and made often
        return data + _NO_VERSIONS
    text = ", ".join(found).encode("ascii", "replace")
    return data + text + len(text).to_bytes(_SIZE, "little")


def loads(data: Buffer, buffers: Sequence[Any] = (), *, own: bool = False) -> Any:
    """The value that was pickled. With own=True its arrays can be written to, also those that could not before.

    Raises what loading raises; an ImportError that names the versions where packages have others here.
    """
    try:
        return _Own(io.BytesIO(data), buffers=buffers).load() if own else pickle.loads(data, buffers=buffers)
    except Exception as error:
        differences = _differences(bytes(data))
        if not differences or differences in str(error):  # a pickle within this one has told
            raise
        raise ImportError(f"{type(error).__name__}: {error} ({differences})") from error


def _version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", ""))


def _differences(data: bytes) -> str:
    size = int.from_bytes(data[-_SIZE:], "little")
    told = []
    with contextlib.suppress(UnicodeDecodeError):
        for package in data[-_SIZE - size : -_SIZE].decode("ascii").split(", "):
            name, _, there = package.partition(" ")
            here = _version(name)
            if name in _PACKAGES and here and here != there:
                told.append(f"{name} is {there} where this was pickled, and {here} here")
    return "; ".join(told)


class _Own(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return _own_array if found is _from_buffer else found


def _own_array(*arguments: Any) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = _from_buffer(*arguments)
    return array if array.flags.writeable else array.copy("K")
