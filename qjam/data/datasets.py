"""Data sets: cut a user's data into an ordered list of slices, each identified by a hash of its content."""

from __future__ import annotations

import builtins
import copy
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from qjam_worker.ipc.file_slices import stamp
from qjam_worker.values import codec, flat

from . import file_slices, leases
from .text_matrix import TextMatrix

_ACCEPTED = "a list, a tuple, a range, a numpy array of one dimension or more (cut by rows), or a BaseDataSet"
PARALLEL_HASH = 4 * 1024 * 1024  # bytes a slice from which hashing in threads pays
HASH_THREADS = min(8, os.cpu_count() or 1)
_EMPTY = (
    "so there is nothing to map over and no result; leave the data set out of run() to call "
    "mapfunc(params, None) once on each worker"
)


class _Known(NamedTuple):
    """The hashes that a data set has computed so far."""

    hash_at: dict[int, str]
    index_of: dict[str, int]
    size_of: dict[str, int]  # bytes


class BaseDataSet(ABC):
    """An ordered list of slices; subclass it for data from other sources.

    A subclass defines `chunks()` and `slice(index)`. Each chunk is one slice, unless there is a `slice_size`:
    then a slice is that many chunks (the last one may have fewer), and `slice(index)` returns them together.

    The data must not change while the data set is in use: qjam computes each hash once, and sends no slice to a host
    that has one with the same hash. What is sent is hashed again: if it has changed, `run` raises RuntimeError. So
    `slice(index)` must give the same bytes each time. For changed data make a new data set.
    """

    slice_size: int | None = None

    def __init__(self, slice_size: int | None = None) -> None:
        """`slice_size`: chunks a slice, at least 1, or None; anything else is a TypeError or ValueError."""
        self.slice_size = None if slice_size is None else _counted("slice_size", slice_size)

    @abstractmethod
    def chunks(self) -> int:
        """The number of chunks, the smallest pieces of the data: elements, rows or lines."""

    @abstractmethod
    def slice(self, index: int) -> Any:
        """The data of one slice, as mapfunc gets it; `index` runs from 0 to len(self) - 1."""

    def raw_data(self) -> Any:
        """All of the data: a list of the slices, or the object that the data set was made from (not a copy)."""
        return list(self)

    def bind(self, slices: int) -> BaseDataSet:
        """This data set with a fixed number of slices.

        Where qjam cuts the data and there is no `slice_size`: a data set of `slices` slices (at most one per chunk),
        whose sizes differ by at most one chunk. The same number returns the same object, so that hashes are
        computed once. Otherwise self.
        """
        return self

    def slice_data(self, index: int) -> codec.Encoded:
        """One slice as qjam sends it; arrays are not copied. Not cached."""
        return codec.encode(self[index], lasting=True)

    def in_file(self) -> file_slices.InFile | None:
        """The slices that hosts with access to the same file can map, so that qjam need not send them; None if none."""
        return None

    def hash(self, index: int) -> str:
        """The hash of one slice: 32 hexadecimal digits (xxh3-128) over types, dtypes, shapes and bytes.

        Equal data has equal hashes in every process, except objects whose pickle differs from one process to
        the next: qjam sends such a slice once more than needed.
        """
        index = self._index(index)
        if index not in self._known.hash_at:
            self.in_file()  # before: if the file changes afterwards, hosts must not map it
            encoded = codec.encode(self.slice(index), lasting=True)
            found = _content_hash(encoded)
            self._known.size_of[found] = flat.size(encoded)
            # index_of first: a thread that sees the hash must be able to find its slice.
            self._known.index_of.setdefault(found, index)
            self._known.hash_at[index] = found
        return self._known.hash_at[index]

    def hash_list(self) -> list[str]:
        """The hashes of all slices, in order."""
        slices = range(len(self))
        # Every round calls this; only the first has hashes to compute.
        hash_at = self._known.hash_at
        if len(hash_at) < len(slices):
            self._hash_all(slices)
        return [hash_at[index] for index in slices]

    def _hash_all(self, slices: range) -> None:
        for index in slices:
            self.hash(index)

    def size_in_bytes(self) -> int:
        """The bytes that hosts keep of the slices that were hashed: each content once."""
        return sum(self._known.size_of.values())

    def slice_from_hash(self, hash: str) -> Any:
        """The data of the slice with this hash. Raises KeyError if there is none."""
        index_of = self._known.index_of
        if hash not in index_of:
            self.hash_list()
        if hash not in index_of:
            raise KeyError(f"none of the {len(self)} slices of this data set has the hash {hash!r}")
        return self.slice(index_of[hash])

    def release(self) -> None:
        """Have the hosts remove the slices: at once, or when the rounds that use them are over.

        Without it they do so some seconds after this object has gone. Slices that another data set in use has too
        stay, and so does what hosts keep on disk (`keep_data`). The data set can still be used: its slices are then
        sent again.
        """
        leases.release(self)

    def __len__(self) -> int:
        """The number of slices."""
        size = self.slice_size or 1
        return (self._checked_chunks() + size - 1) // size

    @overload
    def __getitem__(self, key: int) -> Any: ...
    @overload
    def __getitem__(self, key: builtins.slice) -> list[Any]: ...
    def __getitem__(self, key: Any) -> Any:
        """`slice(key)`; a negative key counts from the end. For `[start:stop:step]` a list of slices."""
        if isinstance(key, slice):
            return [self.slice(index) for index in range(len(self))[key]]
        return self.slice(self._index(key))

    def __iter__(self) -> Iterator[Any]:
        return (self.slice(index) for index in range(len(self)))

    @property
    def _known(self) -> _Known:
        # Made on demand, as a subclass need not call __init__; by setdefault, as all threads must share one.
        known: _Known = vars(self).setdefault("_slices_known", _Known({}, {}, {}))
        return known

    def _index(self, index: int) -> int:
        found = operator.index(index)
        slices = len(self)
        if not -slices <= found < slices:
            raise IndexError(f"there is no slice {found}: the data set has {slices}, from 0 to {slices - 1}")
        return found % slices

    def _checked_chunks(self) -> int:
        """chunks() of the subclass, checked. Raises TypeError or ValueError, which name the subclass."""
        chunks = self.chunks()
        name = f"{type(self).__name__}.chunks()"
        try:
            found = operator.index(chunks)
        except TypeError:
            raise TypeError(f"{name} must give an int, not {_named(chunks)}") from None
        if found < 0:
            raise ValueError(f"{name} must not be negative: {found}")
        return found


class _CutDataSet(BaseDataSet):
    """Data that qjam cuts itself: the number of slices may stay open until `bind`."""

    _bound: int | None = None
    _array: npt.NDArray[Any] | None = None  # the data, if it is an array; it may be a map of a file

    def __init__(self, data: Any, count: int, slice_size: int | None) -> None:
        super().__init__(slice_size)
        if count == 0:
            raise ValueError(f"data is empty, {_EMPTY}")
        self._data = data
        self._count = count
        self._bindings: dict[int, BaseDataSet] = {}

    @abstractmethod
    def _cut(self, start: int, stop: int) -> Any:
        """The chunks from `start` up to `stop`, as one slice."""

    def chunks(self) -> int:
        return self._count

    def raw_data(self) -> Any:
        return self._data

    def bind(self, slices: int) -> BaseDataSet:
        wanted = min(_counted("slices", slices), self._count)
        if self.slice_size is not None or self._bound is not None:
            return self
        if wanted not in self._bindings:
            bound = copy.copy(self)
            # Not its own _bindings: they would be a circle, and the data stay until the garbage collector comes.
            vars(bound).update(_bound=wanted, _slices_known=_Known({}, {}, {}), _bindings={})
            vars(bound).pop("_in_file", None)
            # Two threads may come here at once; both must get the same object.
            self._bindings.setdefault(wanted, bound)
        return self._bindings[wanted]

    def in_file(self) -> file_slices.InFile | None:
        if self._array is None:
            return None
        if "_in_file" not in vars(self):
            self._in_file = file_slices.find(self._array, self)
        return self._in_file

    def release(self) -> None:
        for one in (self, *self._bindings.values()):
            leases.release(one)

    def _hash_all(self, slices: range) -> None:
        """Hash large slices in threads: qjam sends nothing before it knows all hashes."""
        self.in_file()
        array = self._array
        if array is not None and _is_bare(array) and array.nbytes >= PARALLEL_HASH * len(slices):
            with ThreadPoolExecutor(min(HASH_THREADS, len(slices))) as pool:
                list(pool.map(self.hash, slices))
        super()._hash_all(slices)

    def slice(self, index: int) -> Any:
        index = self._index(index)
        if self.slice_size is not None:
            start = index * self.slice_size
            return self._cut(start, min(start + self.slice_size, self._count))
        slices = len(self)
        return self._cut(index * self._count // slices, (index + 1) * self._count // slices)

    def __len__(self) -> int:
        return super().__len__() if self.slice_size is not None else self._bound or 1

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: chunks={self._count}, slices={len(self)}>"


class ListDataSet(_CutDataSet):
    """The elements of a list or tuple; a slice is a shorter list or tuple. The slices of a range are lists."""

    def __init__(self, data: list[Any] | tuple[Any, ...] | range, slice_size: int | None = None) -> None:
        """Raises TypeError or ValueError for other data, empty data, or an invalid `slice_size`."""
        if not isinstance(data, (list, tuple, range)):
            raise TypeError(f"data must be a list, a tuple or a range, not {_named(data)}{_hint(data)}")
        super().__init__(data, len(data), slice_size)

    def _cut(self, start: int, stop: int) -> Any:
        part = self._data[start:stop]
        return list(part) if isinstance(part, range) else part


class NumpyMatrixDataSet(_CutDataSet):
    """The rows of an array; a slice is a read-only view of some of them, of shape (rows, ...), not a copy.

    With `row_major=False` the columns; a slice has the shape (all rows, columns, ...).
    """

    def __init__(self, data: npt.NDArray[Any], slice_size: int | None = None, row_major: bool = True) -> None:
        """Raises TypeError or ValueError for other data, no rows, or an invalid `slice_size`."""
        if not isinstance(data, np.ndarray):
            raise TypeError(f"data must be a numpy array, not {_named(data)}{_hint(data)}")
        axis = 0 if row_major else 1
        if data.ndim <= axis:
            raise ValueError(
                f"data has {data.ndim} dimensions and so no {'rows' if row_major else 'columns'} to cut: "
                f"pass an array of at least {axis + 1}; for one value alone use params"
            )
        super().__init__(data, data.shape[axis], slice_size)
        self._array = data
        self._row_major = row_major

    def _cut(self, start: int, stop: int) -> Any:
        part = self._data[start:stop] if self._row_major else self._data[:, start:stop]
        return _frozen(part)


class NumpyMatrixFileDataSet(_CutDataSet):
    """The rows of a matrix in a file, which may be larger than memory; a slice is an array of some rows.

    A `.npy` file is mapped into memory, and slices are views of the map; hosts on this machine map the file too, and
    qjam sends them nothing, if only the user and root can write to it. Any other file is text, one row a line, without
    `#` comments and empty lines: one pass finds where the rows are, and each slice then reads only its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        slice_size: int | None = None,
        *,
        delimiter: str | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        """`delimiter` (None: a comma if the first row has one, else white space) and `dtype` (None: float64) are for
        text files only.

        Raises OSError if the file cannot be read, TypeError or ValueError if it holds no matrix or an argument is
        invalid.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be the name of a file, not {_named(path)}")
        # The same file later, even if the program changes its working directory.
        self._file = os.path.abspath(os.fspath(path))
        self._stamp = _content_stamp(self._file)
        self._matrix: npt.NDArray[Any] | TextMatrix
        if _is_npy(self._file):
            if delimiter is not None or dtype is not None:
                raise ValueError(f"{self._file} is a .npy file; delimiter and dtype are for text files only")
            self._array = self._matrix = _mapped(self._file)
        else:
            self._matrix = TextMatrix(self._file, delimiter, np.dtype(dtype))
        if len(self._matrix) == 0:
            raise ValueError(f"{self._file} has no rows, {_EMPTY}")
        super().__init__(path, len(self._matrix), slice_size)

    def _cut(self, start: int, stop: int) -> Any:
        if _content_stamp(self._file) != self._stamp:
            raise RuntimeError(
                f"{self._file} has changed since its data set was made; "
                "make a new NumpyMatrixFileDataSet to work on what it holds now"
            )
        return _frozen(self._matrix[start:stop])


def DataSet(data: Any, *, slice_size: int | None = None) -> BaseDataSet:
    """The data set of a list, tuple, range or array (cut by rows); returns a data set unchanged.

    `slice_size`: elements or rows per slice. None: as many slices as there are workers.

    Raises TypeError or ValueError, which say what is accepted, for other or empty data.
    """
    if isinstance(data, BaseDataSet):
        if slice_size is not None:
            raise ValueError("data is a data set already: pass slice_size where you make it")
        if len(data) == 0:
            raise ValueError(f"data is empty ({type(data).__name__}.chunks() is 0), {_EMPTY}")
        return data
    if isinstance(data, (list, tuple, range)):
        return ListDataSet(data, slice_size)
    if isinstance(data, np.ndarray):
        return NumpyMatrixDataSet(data, slice_size)
    raise TypeError(f"data must be {_ACCEPTED}, not {_named(data)}{_hint(data)}")


def _content_stamp(file: str) -> tuple[int, ...]:
    *found, _ = stamp(file)  # without the time that a link to the file, or another mode, changes too
    return tuple(found)


def _is_npy(file: str) -> bool:
    with open(file, "rb") as content:
        return content.read(6) == b"\x93NUMPY"


def _mapped(file: str) -> npt.NDArray[Any]:
    try:
        matrix: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file} cannot be mapped as an array: {error}") from error
    if matrix.ndim == 0:
        raise ValueError(f"{file} holds one value, not a matrix; use params for it")
    return matrix


def _is_bare(array: npt.NDArray[Any]) -> bool:
    """Whether encoding its slices runs no user code and copies nothing."""
    return type(array) in (np.ndarray, np.memmap) and array.flags.c_contiguous and not array.dtype.hasobject


def _frozen(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Make the new view `part` read-only, as it is in a worker: its content must keep matching its hash."""
    if isinstance(part, np.memmap):
        part = part.view(np.ndarray)
    part.flags.writeable = False
    return part


def _content_hash(encoded: codec.Encoded) -> str:
    import xxhash  # here, for user modules that import qjam are loaded on hosts that lack it

    # Over exactly the bytes that qjam sends: the engine hashes them again as they go.
    content = xxhash.xxh3_128()
    for piece in flat.pieces(encoded):
        content.update(piece)
    return content.hexdigest()


def _counted(name: str, value: Any) -> int:
    right = f"{name} must be an int of at least 1" + (" or None" if name == "slice_size" else "")
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{right}, not {_named(value)}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{right}, not {number}")
    return number


def _named(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return f"{value!r} ({type(value).__name__})"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _hint(data: Any) -> str:
    """A suggestion of what the user may have meant."""
    if data is None:
        return "; leave the data set out of run() to call mapfunc(params, None) once on each worker"
    if isinstance(data, str):
        return (
            "; for its lines pass data.splitlines(), for its characters list(data), "
            "for a matrix in a file NumpyMatrixFileDataSet(path)"
        )
    if isinstance(data, (bytes, bytearray, memoryview)):
        return "; pass numpy.frombuffer(data, dtype=...)"
    if isinstance(data, dict):
        return "; pass list(data.items())"
    if isinstance(data, (set, frozenset)):
        return "; pass sorted(data)"
    if hasattr(data, "to_numpy"):
        return "; pass data.to_numpy()"
    if isinstance(data, Iterator):
        return "; pass list(data)"
    if hasattr(data, "__array__") and not isinstance(data, np.generic):
        return "; pass numpy.asarray(data)"
    if isinstance(data, (bool, int, float, complex, np.generic)):
        return "; for one value alone use params"
    return ""
