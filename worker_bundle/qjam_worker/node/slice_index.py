"""All slices that a node has: in its store, and in files for as long as these do not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Union

from qjam_worker.ipc.file_slices import FileSlice, has_changed, identify
from qjam_worker.wire.refs import Ref

from .store import Store


class SliceIndex:
    """All slices that a node has: in its store, and in files for as long as these do not change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._places: dict[Ref, FileSlice] = {}  # by ref
        self._jobs: dict[int, set[Ref]] = {}  # whose slices these are
        self.have, self.pin, self.unpin = store.have, store.pin, store.unpin

    def __contains__(self, ref: Ref) -> bool:
        if ref in self._store:
            return True
        place = self._places.get(ref)
        return place is not None and not has_changed(place)

    def where(self, ref: Ref) -> tuple[Union[str, FileSlice], int]:
        """The place of a slice that is here: path and size of its flat form, or a place in a file."""
        place = self._places.get(ref)
        if place is None or ref in self._store:
            return self._store.path(ref), self._store.size(ref)
        return place, place.size

    def learn(self, job: int, file: dict[str, Any], refs: Mapping[int, Optional[Ref]]) -> None:
        """A job has slices in a file, which may be here as well. ValueError when they cannot be in it."""
        path, heads = file["path"], file["heads"]
        try:
            identity, its_stamp = identify(path)
        except (OSError, ValueError):  # a path with a zero in it
            return
        if identity != file["identity"]:
            return
        for index, head, offset, size in file["parts"]:
            ref = refs.get(index)
            if ref is None or offset + size > its_stamp[2]:
                raise ValueError(f"slice {index} of job {job} cannot lie in {path} at {offset}")
            self._places[ref] = FileSlice(path, offset, size, heads[head], its_stamp)
            self._jobs.setdefault(job, set()).add(ref)

    def forget(self, job: int) -> None:
        """Nobody will ask for the job again; a round of another one may be using its slices."""
        refs = self._jobs.pop(job, set())
        for ref in refs.difference(*self._jobs.values()):
            if not self._store.is_pinned(ref):
                del self._places[ref]
