"""Where the params of a node's rounds lie: in a slot that is used again, in a file, or in the store."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Optional

from qjam_worker.ipc.files import Files, remove
from qjam_worker.ipc.slots import SLOT
from qjam_worker.values import codec, flat
from qjam_worker.wire.refs import Ref

from .results import MAX_REUSED_BYTES
from .store import Store


@dataclass
class ParamsLocation:
    """The params of one round: a slot or a file with its `view`, or a `ref`, whose content is in the store."""

    path: str
    size: int
    view: Optional[memoryview] = None
    ref: Optional[Ref] = None
    held: set[int] = field(default_factory=set)  # workers whose user code may still use the file


class ParamsLocations:
    """The params of all rounds of a node, by round number."""

    def __init__(self, files: Files, store: Store) -> None:
        self._files = files
        self._store = store
        self._places: dict[int, ParamsLocation] = {}
        self._free: list[ParamsLocation] = []  # slots
        self._spare: Optional[ParamsLocation] = None  # a file that can be written again: no worker uses it
        self._made = 0

    def keep(self, number: int, ref: Optional[Ref], buffers: list[Any]) -> None:
        """Write the params that came with a task to shared memory, or note the ref that has them. Raises NoRoom."""
        if ref is not None:
            self._places[number] = ParamsLocation("", 0, ref=ref)
            return
        encoded = codec.Encoded(bytes(buffers[0]), [memoryview(buffer).cast("B") for buffer in buffers[1:]], False)
        place = self._free.pop() if self._free else self._new_slot()
        assert place.view is not None
        size = flat.put(encoded, place.view)
        if size is None:
            self._free.append(place)
            place = self._large(encoded)
        else:
            self._drop_spare()  # no more large params may come
            place.size = size
        self._places[number] = place

    def _large(self, encoded: codec.Encoded) -> ParamsLocation:
        place = self._file(flat.size(encoded))
        assert place.view is not None
        flat.write(encoded, place.view)
        return place

    def _file(self, size: int) -> ParamsLocation:
        spare = self._spare
        if spare is not None and spare.size == size and os.path.exists(spare.path):
            self._spare = None
            return spare
        self._drop_spare()
        self._made += 1
        mapped = self._files.create(f"params{self._made}", size)
        return ParamsLocation(mapped.path, size, mapped.view)

    def _drop_spare(self) -> None:
        if self._spare is not None:
            remove(self._spare.path)
            self._spare = None

    def _new_slot(self) -> ParamsLocation:
        self._made += 1
        mapped = self._files.create(f"slot{self._made}", SLOT)
        return ParamsLocation(mapped.path, SLOT, mapped.view)

    def see_to_slots(self) -> None:
        """Forget slots whose files user code, or somebody who tidies up, has removed: a new process cannot map them."""
        self._free = [place for place in self._free if os.path.exists(place.path)]

    def where(self, number: int, worker: int) -> tuple[str, int]:
        """Path and size of the flat params, for a worker to map."""
        place = self._places[number]
        if place.ref is not None:
            return self._store.path(place.ref), self._store.size(place.ref)
        if place.size > SLOT:
            place.held.add(worker)
        return place.path, place.size

    def returned(self, number: Optional[int], worker: int) -> None:
        """A worker has done its task and kept nothing of the params."""
        place = None if number is None else self._places.get(number)
        if place is not None and place.held:
            place.held.discard(worker)

    def release(self, number: int) -> None:
        """The round is over: free or remove what its params lie in."""
        place = self._places.pop(number, None)
        if place is None:
            return
        if place.ref is not None:
            self._store.drop(place.ref)
        elif place.size <= SLOT:
            self._free.append(place)
        elif self._spare is None and not place.held and place.size <= MAX_REUSED_BYTES:
            self._spare = place
        else:
            remove(place.path)

    def clear(self) -> None:
        """Unmap everything."""
        self._places.clear()
        self._free.clear()
        self._spare = None
