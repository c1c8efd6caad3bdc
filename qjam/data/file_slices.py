"""Find the slices of a data set that lie in a file, byte for byte as qjam would send them: hosts can map that file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qjam_worker.ipc.file_slices import identify
from qjam_worker.values import codec


class InFile(NamedTuple):
    """A file and the slices in it. `parts`: for each slice the index of its codec header in `heads`, offset, size."""

    path: str
    identity: bytes
    heads: list[bytes]
    parts: dict[int, tuple[int, int, int]]

    def announcement(self, indices: Iterable[int]) -> dict[str, Any]:
        """The message to a node about some slices."""
        parts = [[index, *self.parts[index]] for index in indices if index in self.parts]
        return {"path": self.path, "identity": self.identity, "heads": self.heads, "parts": parts}


class _Mapping(NamedTuple):
    """A range of memory, and the part of a file that is mapped there."""

    start: int
    end: int
    offset: int
    inode: int
    path: str


def find(array: npt.NDArray[Any], slices: Iterable[npt.NDArray[Any]]) -> InFile | None:
    """The slices that lie in the file that `array` is a read-only map of; None if it is no such map."""
    mapping = _mapping(array)
    if mapping is None:
        return None
    try:
        identity, (_, inode, *_) = identify(mapping.path)
    except OSError:
        return None
    if inode != mapping.inode:  # another file has this path by now
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
        if mapping.start <= address and address + buffer.nbytes <= mapping.end:  # else encode() has copied it
            offset = mapping.offset + address - mapping.start
            parts[index] = heads.setdefault(encoded.header, len(heads)), offset, buffer.nbytes
    return InFile(mapping.path, identity, list(heads), parts) if parts else None


def _mapping(array: npt.NDArray[Any]) -> _Mapping | None:
    """The read-only shared map that the array lies in, as the kernel tells.

    np.memmap.filename would not do: it stays the same when another file takes that name.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap):
        return None
    address = array.ctypes.data
    try:
        with open("/proc/self/maps", "rb") as lines:
            for line in lines:
                memory, mode, offset, _, inode, *path = line.rstrip(b"\n").split(None, 5)
                start, end = (int(number, 16) for number in memory.split(b"-"))
                if start <= address < end:
                    if mode != b"r--s" or not path:
                        return None
                    return _Mapping(start, end, int(offset, 16), int(inode), os.fsdecode(path[0]))
    except OSError:
        pass
    return None
