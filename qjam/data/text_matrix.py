"""A matrix in a text file: one pass finds the rows, access parses them."""

from __future__ import annotations

import builtins
from array import array
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


class TextMatrix:
    """Rows of numbers in a text file; `matrix[start:stop]` reads and parses only these rows."""

    _EVERY = 64  # rows per stored offset: little memory, and few lines to skip

    def __init__(self, file: str, delimiter: str | None, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._dtype = dtype
        self._offsets = array("q")
        self._count = 0
        first = b""
        with open(file, "rb") as lines:
            offset = _skip_mark(lines)
            for line in lines:
                if _is_row(line):
                    if self._count % self._EVERY == 0:
                        self._offsets.append(offset)
                    first = first or line
                    self._count += 1
                offset += len(line)
        self._delimiter = "," if delimiter is None and b"," in first else delimiter
        # Text that holds no numbers fails here, not in the middle of a run.
        self._columns = self._parsed(0, 1).shape[1] if self._count else 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: builtins.slice) -> npt.NDArray[Any]:
        start, stop, _ = rows.indices(self._count)
        found = self._parsed(start, stop)
        if found.shape[1] != self._columns:
            raise ValueError(f"{self._where(start, stop)}: {found.shape[1]} columns, where row 0 has {self._columns}")
        return found

    def _parsed(self, start: int, stop: int) -> npt.NDArray[Any]:
        with open(self._file, "rb") as lines:
            lines.seek(self._offsets[start // self._EVERY])
            skip = start % self._EVERY
            wanted = islice(filter(_is_row, lines), skip, skip + stop - start)
            text = (line.decode("latin-1") for line in wanted)
            try:
                return np.loadtxt(text, dtype=self._dtype, delimiter=self._delimiter, ndmin=2)
            except ValueError as error:
                raise ValueError(f"{self._where(start, stop)} cannot be read: {error}") from error

    def _where(self, start: int, stop: int) -> str:
        rows = f"row {start}" if stop == start + 1 else f"rows {start} to {stop - 1}"
        return f"{self._file}: {rows} (counted from 0)"


def _is_row(line: bytes) -> bool:
    text = line.lstrip()
    return bool(text) and not text.startswith(b"#")


def _skip_mark(lines: BinaryIO) -> int:
    """The offset of the text, after a UTF-8 byte order mark if there is one."""
    if lines.read(3) == b"\xef\xbb\xbf":
        return 3
    return lines.seek(0)
