"""The refs on their way to one peer: loaded ahead, cut into blocks, as many as the peer has given credit for.

No I/O: what a sender is to do comes out as commands. The master sends so to its nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import NamedTuple, Union

from .refs import MODULE, PARAMS, SLICE, Part, Ref

# Bytes of a block: large enough to be fast (one huge frame is half as fast), small enough that a heartbeat or a small
# round waits for it a few milliseconds at most.
BLOCK_BYTES = 4 * 1024 * 1024
# Modules that a node may wait for at a time: each of its workers asks for one.
MODULES = 1000
# Refs are loaded ahead, at most so many, and as long as they take less than this many bytes.
AHEAD_BYTES = 16 * 1024 * 1024
AHEAD = 16


class Load(NamedTuple):
    """Load the content of a ref for a node, in the name of a round, then call `loaded`."""

    node: str
    round: int
    ref: Ref


class Block(NamedTuple):
    """Send these bytes of a loaded ref."""

    node: str
    ref: Ref
    offset: int
    size: int
    round: int


class Unload(NamedTuple):
    """Drop the loaded ref: the node no longer needs it."""

    node: str
    ref: Ref


class Gone(NamedTuple):
    """Tell a node that a ref will not come."""

    node: str
    ref: Ref


Step = Union[Load, Block, Unload, Gone]


@dataclass
class Transfer:
    """What a round needs of a ref; `size` is that of all of it, None until it is loaded."""

    ref: Ref
    round: int
    offset: int
    end: int | None = None  # None: all of it
    size: int | None = None
    loading: bool = False

    @property
    def left(self) -> int:
        """The bytes that are to be sent yet."""
        assert self.size is not None
        return (self.size if self.end is None else min(self.end, self.size)) - self.offset

    def widen(self, part: Part) -> None:
        """The node asks again, for more: it had no room for what it was sent, or needs what comes behind."""
        self.offset = min(self.offset, part.offset)
        self.end = None if self.end is None or part.end is None else max(self.end, part.end)


class Transfers:
    """The queue of one node. Methods return the commands that follow."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.credit = 0  # bytes
        self.sent = 0  # bytes for which the node has not given credit back yet
        self._queue: deque[Transfer] = deque()

    def __repr__(self) -> str:
        return f"<Transfers to {self.node}: {[str(transfer.ref) for transfer in self._queue]}, credit {self.credit}>"

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Transfer]:
        return iter(self._queue)

    def find(self, ref: Ref) -> Transfer | None:
        """The transfer of this ref."""
        return next((transfer for transfer in self._queue if transfer.ref == ref), None)

    def add(self, number: int, parts: Iterable[Part]) -> list[Step]:
        """A round on the node needs these. Code and params go before slices: nothing can start without them."""
        known = {transfer.ref: transfer for transfer in self._queue}
        for part in parts:
            if part.ref in known:
                known[part.ref].widen(part)
            elif part.ref.kind == SLICE:
                self._queue.append(Transfer(part.ref, number, part.offset, part.end))
            else:
                urgent = sum(1 for _ in takewhile(lambda transfer: transfer.ref.kind != SLICE, self._queue))
                self._queue.insert(urgent, Transfer(part.ref, number, part.offset, part.end))
        return self._load_ahead()

    def loaded(self, ref: Ref, size: int) -> list[Step]:
        """The content of a ref is loaded. ValueError when the node has asked for bytes behind its end."""
        transfer = self.find(ref)
        if transfer is None:
            return [Unload(self.node, ref)]
        transfer.size = size
        last = transfer.offset if transfer.end is None else transfer.end - 1
        if last >= size > 0:
            raise ValueError(f"it asks for what comes after the first {last} bytes of {ref}, which has {size}")
        return self._stream()

    def grant(self, size: int) -> list[Step]:
        """The node accepts this many bytes more."""
        self.credit += size
        return self._stream()

    def taken(self, size: int) -> list[Step]:
        """The node has taken this many bytes and accepts as many again. ValueError when it was sent fewer."""
        if size > self.sent:
            raise ValueError(f"it gives credit back for {size} bytes, and {self.sent} are on their way to it")
        self.sent -= size
        return self.grant(size)

    def check(self, parts: list[Part]) -> None:
        """ValueError for a request that no node makes."""
        if len({part.ref for part in parts}) < len(parts):
            raise ValueError("it asks for a ref twice")
        if any(part.end is not None and part.end <= part.offset for part in parts):
            raise ValueError("it asks for a part of a ref that has no bytes")
        modules = sum(part.ref.kind == MODULE for part in parts)
        if modules and modules + sum(transfer.ref.kind == MODULE for transfer in self._queue) > MODULES:
            raise ValueError(f"it asks for more than {MODULES} modules at a time")

    def drop(self, transfer: Transfer) -> list[Step]:
        """Give a transfer up and tell the node."""
        return [*self._remove(transfer), *self._stream()]

    def _remove(self, transfer: Transfer) -> list[Step]:
        self._queue.remove(transfer)
        return [Unload(self.node, transfer.ref), Gone(self.node, transfer.ref)]

    def end_round(self, number: int, heir: int | None) -> list[Step]:
        """Stop sending what only the ended round needed. `heir`: a round of the same job; it takes over its slices."""
        commands: list[Step] = []
        for transfer in [t for t in self._queue if t.round == number and t.ref.kind != MODULE]:
            if heir is not None and transfer.ref.kind != PARAMS:
                transfer.round = heir
            else:
                commands += self._remove(transfer)
        return commands + self._stream()

    def clear(self) -> list[Step]:
        """The node is gone."""
        commands: list[Step] = [Unload(self.node, transfer.ref) for transfer in self._queue]
        self._queue.clear()
        return commands

    def _load_ahead(self) -> list[Step]:
        """Load the next refs: always the first one, more while they are small."""
        commands: list[Step] = []
        loaded, before = 0, None
        for position, transfer in enumerate(islice(self._queue, AHEAD)):
            if not transfer.loading:
                if before is not None and (loaded > AHEAD_BYTES or before.size is None):
                    break
                transfer.loading = True
                commands.append(Load(self.node, transfer.round, transfer.ref))
            loaded += (transfer.size or 0) * (position + 2)  # the next ones may be as large
            before = transfer
        return commands

    def _stream(self) -> list[Step]:
        """As many blocks as the credit allows, one ref after the other."""
        commands: list[Step] = []
        while self._queue and (transfer := self._queue[0]).size is not None:
            while transfer.left > 0 and self.credit > 0:
                size = min(BLOCK_BYTES, transfer.left, self.credit)
                commands.append(Block(self.node, transfer.ref, transfer.offset, size, transfer.round))
                transfer.offset += size
                self.credit -= size
                self.sent += size
            if transfer.left > 0:
                break
            self._queue.popleft()
            commands.append(Unload(self.node, transfer.ref))
        return commands + self._load_ahead()
