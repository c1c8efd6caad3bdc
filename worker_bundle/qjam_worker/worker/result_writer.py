"""Where a worker writes its results: small ones to its slot, each large one to a file."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from typing import Callable, NoReturn

from qjam_worker.ipc.files import Files, NoRoom, map_file, remove
from qjam_worker.ipc.slots import SLOT, SLOTS, out_slot, result_prefix
from qjam_worker.values import codec, flat

Where = tuple[str, int, int]  # path, offset, size of a flat value


class ResultWriter:
    """Writes the results of one task after the other. `give_up` ends a process that cannot write."""

    def __init__(self, files: Files, index: int, give_up: Callable[[OSError], NoReturn]) -> None:
        self._files, self._index, self._give_up = files, index, give_up
        self._pid = os.getpid()
        self.slot_path, self._slot = self._find_slot()
        self._slot_used = 0
        self._longest_file = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._made = 0
        self._written: dict[str, memoryview] = {}  # files with results of this task or of the last one
        self._reusable: dict[str, memoryview] = {}  # of these, those that may be written to again
        self._untold: list[str] = []  # names of the files that this task has made

    def _find_slot(self) -> tuple[str, memoryview]:
        """A slot of its own, if there is one; else its part of the file that has all of them."""
        for name, first in ((out_slot(self._index), 0), (SLOTS, self._index * SLOT)):
            for path in self._files.paths(name):
                if os.path.exists(path):
                    return path, map_file(path, first + SLOT, write=True)[first:]
        raise FileNotFoundError(f"there is no slot for worker {self._index}")

    def begin(self) -> None:
        """A task begins."""
        self._slot_used = 0
        self._untold.clear()

    def reuse(self, paths: Iterable[str]) -> None:
        """These files of the last task may be written to again."""
        self._reusable = {path: self._written[path] for path in paths if path in self._written}
        self._written = {}

    def put(self, encoded: codec.Encoded) -> Where:
        """Write a result. Raises NoRoom."""
        offset = self._slot_used
        size = flat.put(encoded, self._slot[offset:])
        if size is not None:
            self._slot_used += (size + 63) & ~63
            return self.slot_path, offset, size
        size = flat.size(encoded)
        for path, view in self._reusable.items():
            if len(view) == size:
                self._written[path] = self._reusable.pop(path)
                flat.write(encoded, view)
                return path, 0, size
        self._made += 1
        self._untold.append(f"{result_prefix(self._index, self._pid)}{self._made}")
        try:
            mapped = self._files.create(self._untold[-1], size)
        except OSError as error:
            if isinstance(error, NoRoom) and resource.getrlimit(resource.RLIMIT_FSIZE) == self._longest_file:
                raise
            self._give_up(error)
        flat.write(encoded, mapped.view)
        self._written[mapped.path] = mapped.view
        return mapped.path, 0, size

    def discard(self) -> None:
        """Remove the files of this task: an error or an interrupt came, and nobody will read them."""
        for path in [path for name in self._untold for path in self._files.paths(name)]:
            remove(path)
