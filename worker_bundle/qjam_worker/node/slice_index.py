"""Which slices a node has, in its store or in files of this host, and where."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Optional, Union

from qjam_worker.ipc.file_slices import FileSlice, has_changed, identify, is_safe
from qjam_worker.wire.refs import Ref

from .store import Store


class SliceIndex:
    """All slices of a node: those in its store, and those in users' files, for as long as the files do not change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._places: dict[Ref, FileSlice] = {}  # by ref
        self.have, self.pin, self.unpin = store.have, store.pin, store.unpin

    def __contains__(self, ref: Ref) -> bool:
        if ref in self._store:
            return True
        place = self._places.get(ref)
        return place is not None and not has_changed(place)

    def where(self, ref: Ref) -> tuple[Union[str, FileSlice], int]:
        """Where a slice lies that is here: path and size of its flat form, or a place in a user's file."""
        place = self._places.get(ref)
        if place is None or ref in self._store:
            return self._store.path(ref), self._store.size(ref)
        return place, place.size

    def learn(self, data: int, file: dict[str, Any], refs: Mapping[int, Optional[Ref]]) -> None:
        """The slices of a data set lie in a file, which this host may have too. ValueError if they cannot lie in it."""
        path, heads = file["path"], file["heads"]
        try:
            path = os.path.realpath(path)
            if not is_safe(path):
                return
            identity, its_stamp = identify(path)
        except (OSError, ValueError):  # ValueError: a path with a null byte
            return
        if identity != file["identity"]:
            return
        for index, head, offset, size in file["parts"]:
            ref = refs.get(index)
            if ref is None or offset + size > its_stamp[2]:
                raise ValueError(f"slice {index} of data {data} cannot lie in {path} at {offset}")
            self._places[ref] = FileSlice(path, offset, size, heads[head], its_stamp)

    def drop(self, ref: Ref) -> Optional[FileSlice]:
        """Nobody names the slice any more: forget its place in a user's file, and give it, if it has one."""
        return self._places.pop(ref, None)
