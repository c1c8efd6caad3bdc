"""The node's store: refs (slices, code, params) in files that its workers map, bounded in bytes."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Optional

from qjam_worker.ipc import huge_pages
from qjam_worker.ipc.files import Files, remove
from qjam_worker.wire.refs import Ref


class StoredRef:
    """The content of one ref: the first `have` of `size` bytes are in the file.

    The file is open only while it is being filled: there may be many slices, and few descriptors in the user's own
    process. Huge pages (`large`) are filled through maps, which takes a third of the time of pwrite.
    """

    __slots__ = ("fd", "have", "large", "path", "size")

    def __init__(self, path: str, size: int, fd: int, large: bool = False) -> None:
        self.path = path
        self.size = size
        self.have = 0
        self.fd: Optional[int] = fd
        self.large = large

    def write(self, data: memoryview) -> None:
        assert self.fd is not None
        while data:
            write = huge_pages.write if self.large else os.pwrite
            written = write(self.fd, data, self.have)
            self.have += written
            data = data[written:]
        if self.have == self.size:
            self.close()

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class OnDisk(StoredRef):
    """A ref in a file on disk. It does not count against the limit: the system can drop its pages at any time."""

    __slots__ = ()

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = self.have = size
        self.fd = None


class Store:
    """Refs in files that workers map. Beyond `limit` bytes the least recently used ones that no round needs go."""

    def __init__(self, files: Files, limit: int) -> None:
        self.files = files
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[Ref, StoredRef] = OrderedDict()
        self._pins: dict[Ref, int] = {}
        self._made = 0

    def __contains__(self, ref: Ref) -> bool:
        entry = self._entries.get(ref)
        return entry is not None and entry.have == entry.size

    def have(self, ref: Ref) -> int:
        """How many leading bytes of the ref are here: a broken transfer resumes there."""
        entry = self._entries.get(ref)
        return 0 if entry is None else entry.have

    def path(self, ref: Ref) -> str:
        """The file of a ref; the ref is used now."""
        self._entries.move_to_end(ref)
        return self._entries[ref].path

    def size(self, ref: Ref) -> int:
        """The bytes of a ref."""
        return self._entries[ref].size

    def read(self, ref: Ref) -> bytes:
        """A copy of the bytes of a ref that are here."""
        entry = self._entries[ref]
        with open(entry.path, "rb") as file:
            return file.read(entry.have)

    def pin(self, ref: Ref) -> None:
        """A round needs the ref: keep it."""
        self._pins[ref] = self._pins.get(ref, 0) + 1

    def is_pinned(self, ref: Ref) -> bool:
        """Whether a round needs the ref."""
        return ref in self._pins

    def unpin(self, ref: Ref) -> None:
        """The round needs it no longer."""
        left = self._pins.pop(ref, 0) - 1
        if left > 0:
            self._pins[ref] = left

    def write(self, ref: Ref, offset: int, total: int, data: memoryview) -> list[str]:
        """Append one block. Bytes that are here already are ignored (they came twice), as is a block that leaves a gap.

        Gives the paths of the files that had to go to make room. Raises NoRoom, and ValueError for impossible offsets.
        """
        dropped: list[str] = []
        entry = self._entries.get(ref)
        size = total if entry is None else entry.size
        if total != size or offset < 0 or offset + len(data) > total:
            raise ValueError(f"block [{offset}, {offset + len(data)}) of {ref}: its length is {size}, not {total}")
        if entry is None:
            dropped = self._make_room(total)
            self._made += 1
            path, fd, large = self.files.open(f"ref{self._made}", total)
            entry = self._entries[ref] = StoredRef(path, total, fd, large)
            self.bytes += total
            if total == 0:
                entry.close()
        if offset <= entry.have < offset + len(data):  # it was asked for twice, and overlaps
            entry.write(data[entry.have - offset :])
        return dropped

    def adopt(self, ref: Ref, path: str, size: int) -> None:
        """Add a ref whose content is a file on disk. The file is removed with the ref."""
        self.drop(ref)
        self._entries[ref] = OnDisk(path, size)

    def drop(self, ref: Ref) -> None:
        """Remove a ref and its file; the maps of workers stay valid."""
        entry = self._entries.pop(ref, None)
        if entry is not None:
            entry.close()
            self.bytes -= 0 if isinstance(entry, OnDisk) else entry.size
            remove(entry.path)

    def clear(self) -> None:
        """Drop everything."""
        for ref in list(self._entries):
            self.drop(ref)

    def _make_room(self, size: int) -> list[str]:
        dropped: list[str] = []
        while self.bytes + size > self.limit:
            ref = next((ref for ref in self._entries if self._can_go(ref)), None)
            if ref is None:
                break
            dropped.append(self._entries[ref].path)
            self.drop(ref)
        return dropped

    def _can_go(self, ref: Ref) -> bool:
        return ref not in self._pins and not isinstance(self._entries[ref], OnDisk)
