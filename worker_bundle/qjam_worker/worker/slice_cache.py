"""The slices that a worker keeps mapped."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, Callable, NoReturn

import numpy as np

from qjam_worker.ipc import file_slices
from qjam_worker.values import codec, flat

# Slices that stay mapped: each map takes a file descriptor, of which there may be 1,024.
MAX_MAPPED = 128


class SliceCache:
    """Slices by path, least recently used first. `map_file` maps a file; `give_up` ends a process that cannot."""

    def __init__(self, map_file: Callable[[str, int], memoryview], give_up: Callable[[OSError], NoReturn]) -> None:
        self._map_file, self._give_up = map_file, give_up
        self._slices: OrderedDict[Any, Any] = OrderedDict()  # arrays, or functions that decode the value anew

    def drop(self, path: Any) -> None:
        """The file is gone."""
        self._slices.pop(path, None)

    def get(self, path: Any, size: int) -> Any:
        """A slice; an array as a new view each time, because user code can reshape even a read-only one. `path` is that
        of its flat form, or says where it lies in a user's file.
        """
        if type(path) is not str:
            path = file_slices.FileSlice.of(path)
            file_slices.check(path)
        known = self._slices.get(path)
        if known is None:
            load = self._loader(path, size)
            value = load()
            # What holds objects or named fields can be changed through any view of it.
            lasting = type(value) is np.ndarray and not value.dtype.hasobject and value.dtype.names is None
            known = self._slices[path] = value if lasting else load
            if len(self._slices) > MAX_MAPPED:
                self._slices.popitem(last=False)
        else:
            self._slices.move_to_end(path)
        return known.view() if isinstance(known, np.ndarray) else known()

    def _loader(self, path: Any, size: int) -> Callable[[], Any]:
        """A function that returns the slice whenever it is called."""
        if isinstance(path, file_slices.FileSlice):
            try:
                return file_slices.loader(path)
            except OSError as error:
                self._give_up(error)
        return functools.partial(decoded, self._map_file(path, size))


def decoded(packed: memoryview, copy: bool = False) -> Any:
    """The value whose flat form this is. MemoryError when it is too large for what is left; ImportError when it is made
    of what this host lacks.
    """
    try:
        return flat.load(packed, copy=copy)
    except codec.CodecError as error:
        if isinstance(error.__cause__, (MemoryError, ImportError)):
            raise error.__cause__ from None
        raise
