"""Which slices of a data set lie in a file, just as they would be sent: hosts that see it need not be sent them."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qjam_worker.ipc.file_slices import identify
from qjam_worker.values import codec

# A line of /proc/self/maps, of a file that is mapped shared and only to be read: start, end, offset, inode, path.
_MAP = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r--s ([0-9a-f]+) \S+ (\d+) +(/.*)$", re.MULTILINE)


class InFile(NamedTuple):
    """A file, and the slices in it: the number of a header of the codec's, offset and size of the one buffer."""

    path: str
    identity: bytes
    heads: list[bytes]
    parts: dict[int, tuple[int, int, int]]

    def told(self, indices: Iterable[int]) -> dict[str, Any]:
        """What a node is told of some slices."""
        parts = [[index, *self.parts[index]] for index in indices if index in self.parts]
        return {"path": self.path, "identity": self.identity, "heads": self.heads, "parts": parts}


class _Mapping(NamedTuple):
    """Where memory is mapped from a file."""

    start: int
    end: int
    offset: int
    path: str


def find(array: npt.NDArray[Any], slices: Iterable[npt.NDArray[Any]]) -> InFile | None:
    """The slices that lie in the file that `array` is a read-only map of; None when it is none."""
    mapping = _mapping(array)
    if mapping is None:
        return None
    try:
        identity, _ = identify(mapping.path)
    except OSError:
        return None
    heads: dict[bytes, int] = {}
    parts = {}
    for index, part in enumerate(slices):
        if not (part.flags.c_contiguous or part.flags.f_contiguous):
            continue
        encoded = codec.encode(part)
        if len(encoded.buffers) != 1 or not encoded.plain:
            continue
        buffer = encoded.buffers[0]
        address = np.frombuffer(buffer, np.uint8).ctypes.data
        if mapping.start <= address and address + buffer.nbytes <= mapping.end:  # else it was copied to be sent
            offset = mapping.offset + address - mapping.start
            parts[index] = heads.setdefault(encoded.header, len(heads)), offset, buffer.nbytes
    return InFile(mapping.path, identity, list(heads), parts) if parts else None


def _mapping(array: npt.NDArray[Any]) -> _Mapping | None:
    """What the kernel says of an array's memory. It knows where a map that was made long ago comes from, and whether
    its file still has that path.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap):
        return None
    address = array.ctypes.data
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            text = lines.read()
    except OSError:
        return None
    for match in _MAP.finditer(text):
        start, end, offset = (int(number, 16) for number in match.groups()[:3])
        if start <= address < end:
            path = match[5]
            return _Mapping(start, end, offset, path) if _inode(path) == int(match[4]) else None
    return None


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None
