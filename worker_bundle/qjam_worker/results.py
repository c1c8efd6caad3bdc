"""Results that a node holds between its workers and the master: where the bytes lie, how small ones are folded."""

from __future__ import annotations

from typing import Any, Optional

from . import codec, flat
from .reducing import STAYS, default_reduce
from .store import Files, remove

# A value of at most this size is copied through a slot that is used again and again; a larger one gets a file of
# its own, which user code may hold on to. 256 KiB: a copy takes about 25 us, making and mapping a file about 60.
SLOT = 256 * 1024


class Held:
    """A result: flat bytes (the node's own, or a mapped file's), or a value that the node has folded itself.

    `plain`: there is no pickle inside, so the node may open it. `path`: the file to remove when it is used up.
    """

    __slots__ = ("flat", "path", "plain", "value")

    def __init__(self, flat: Optional[memoryview], plain: bool, path: Optional[str] = None, value: Any = None) -> None:
        self.flat = flat
        self.plain = plain
        self.path = path
        self.value = value

    @property
    def small(self) -> bool:
        """Whether a node may spend its own time on it."""
        return self.flat is None or len(self.flat) <= SLOT

    def opened(self) -> Any:
        """The value of a plain result; its arrays are views."""
        if self.flat is not None and self.value is None:
            self.value = codec.decode(*flat.read(self.flat), allow_pickle=False)
        return self.value

    def frames(self) -> list[Any]:
        """Header and buffers, for the wire."""
        if self.flat is not None:
            header, buffers = flat.read(self.flat)
            return [header, *buffers]
        encoded = codec.encode(self.value)
        return [encoded.header, *encoded.buffers]

    def in_file(self, files: Files, name: str) -> tuple[str, int]:
        """Path and size of a file that holds it flat, for a worker to map; one is made if there is none. NoRoom."""
        if self.path is None:
            pieces = [self.flat] if self.flat is not None else flat.segments(codec.encode(self.value))
            data = b"".join(pieces)
            mapped = files.create(name, len(data))
            mapped.view[:] = data
            self.flat, self.path = mapped.view, mapped.path
        assert self.flat is not None
        return self.path, len(self.flat)

    def release(self) -> None:
        """It is used up."""
        if self.path is not None:
            remove(self.path)


def fold_small(left: Held, right: Held) -> Any:
    """What two small results without pickles in them make together; STAYS where a worker has to fold them."""
    if not (left.plain and right.plain and left.small and right.small):
        return STAYS
    try:
        total = default_reduce(left.opened(), right.opened())
    except Exception:  # noqa: BLE001  a worker finds the same, and reports it as any error of user code
        return STAYS
    left.release()
    right.release()
    return Held(None, True, value=total)
