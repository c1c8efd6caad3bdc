"""Where a worker writes its results: small ones to its slot, each large one to a file."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from typing import Callable, NoReturn

from qjam_worker.ipc.files import Files, NoRoom, map_file, remove
from qjam_worker.ipc.slots import SLOT, SLOTS, result_prefix
from qjam_worker.values import codec, flat

Where = tuple[str, int, int]  # path, offset, size of a flat value


class ResultWriter:
    """Writes the results of one task after the other. `give_up` ends a process that cannot write."""

    def __init__(self, files: Files, index: int, give_up: Callable[[OSError], NoReturn]) -> None:
        self._files, self._give_up = files, give_up
        self._prefix = result_prefix(index, os.getpid())
        self.slot_path = files.find(SLOTS)
        self._slot = map_file(self.slot_path, (index + 1) * SLOT, write=True)[index * SLOT :]
        self._slot_used = 0
        self._longest_file = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._made = 0
        self._written: dict[str, memoryview] = {}  # files with results of this task or of the last one
        self._reusable: dict[str, memoryview] = {}  # of these, those that may be written to again
        self._untold: list[str] = []  # names of the files that this task has made

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
        self._untold.append(f"{self._prefix}{self._made}")
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
