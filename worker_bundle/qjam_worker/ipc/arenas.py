"""Mapped files in which a node leaves the arguments of many small calls for its workers, one behind the other."""

from __future__ import annotations

import os
from collections import OrderedDict

from .files import Files, map_file, remove

ARENA = 1 << 20  # bytes; what is larger has an arena to itself
MAX_SPARE = 4  # free arenas that are kept to be written again
MAX_MAPPED = 16  # arenas that a worker keeps mapped


class _Arena:
    __slots__ = ("path", "used", "users", "view")

    def __init__(self, path: str, view: memoryview) -> None:
        self.path, self.view = path, view
        self.used = self.users = 0  # bytes; what lies in it and is still needed


def arena_name(number: int) -> str:
    """The name of its file."""
    return f"arena{number}"


class Arenas:
    """The node's side. An arena is written again when nobody needs anything in it any more."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._arenas: dict[int, _Arena] = {}
        self._spare: list[int] = []
        self._current = 0  # 0: none
        self._made = 0

    def __len__(self) -> int:
        return len(self._arenas)

    def put(self, data: bytes, users: int = 1) -> tuple[int, int]:
        """Write `data`, which so many will free: the number of the arena and the offset. Raises NoRoom."""
        number = self._with_room(len(data))
        arena = self._arenas[number]
        offset = arena.used
        arena.view[offset : offset + len(data)] = data
        arena.used += (len(data) + 7) & ~7
        arena.users += users
        return number, offset

    def free(self, number: int) -> None:
        """One of those who needed something in an arena does so no longer."""
        arena = self._arenas[number]
        arena.users -= 1
        if arena.users:
            return
        arena.used = 0
        if number == self._current:
            return
        if len(arena.view) == ARENA and len(self._spare) < MAX_SPARE:
            self._spare.append(number)
        else:
            del self._arenas[number]
            remove(arena.path)

    def _with_room(self, size: int) -> int:
        if size > ARENA // 4:
            return self._new(size)
        current = self._arenas.get(self._current)
        if current is None or current.used + size > len(current.view):
            before, self._current = self._current, self._spare.pop() if self._spare else self._new(ARENA)
            if current is not None and not current.users:
                self._spare.append(before)
        return self._current

    def _new(self, size: int) -> int:
        mapped = self._files.create(arena_name(self._made + 1), size)
        self._made += 1
        self._arenas[self._made] = _Arena(mapped.path, mapped.view)
        return self._made

    def clear(self) -> None:
        """Unmap them."""
        self._arenas.clear()
        self._spare.clear()
        self._current = 0


class MappedArenas:
    """A worker's side."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._views: OrderedDict[int, memoryview] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> memoryview:
        """So many bytes of an arena. They are overwritten when the call has returned. Raises OSError."""
        view = self._views.get(number)
        if view is None:
            path = self._files.find(arena_name(number))
            view = self._views[number] = map_file(path, os.stat(path).st_size)
            if len(self._views) > MAX_MAPPED:
                self._views.popitem(last=False)
        return view[offset : offset + size]
