"""The refs on their way to one node: loaded ahead, cut into blocks, as many as the node has given credit for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import MODULE, PARAMS, SLICE, Ref

from .commands import Block, Command, Load, Send, Unload

# Bytes of a block: large enough to be fast (one huge frame is half as fast), small enough that a heartbeat or a small
# round waits for it a few milliseconds at most.
BLOCK_BYTES = 4 * 1024 * 1024
# Modules that a node may wait for at a time: each of its workers asks for one.
MODULES = 1000
# Refs are loaded ahead, at most so many, and as long as they take less than this many bytes.
AHEAD_BYTES = 16 * 1024 * 1024
AHEAD = 16


@dataclass
class Transfer:
    """A ref that a round needs; `size` is None until it is loaded."""

    ref: Ref
    round: int
    offset: int
    size: int | None = None
    loading: bool = False


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

    def add(self, number: int, missing: list[tuple[Ref, int]]) -> list[Command]:
        """A round on the node needs refs, of which the node has the first `offset` bytes. Code and params go before
        slices: nothing can start without them.
        """
        known = {transfer.ref for transfer in self._queue}
        for ref, offset in missing:
            if ref in known:
                continue
            if ref.kind == SLICE:
                self._queue.append(Transfer(ref, number, offset))
            else:
                urgent = sum(1 for _ in takewhile(lambda transfer: transfer.ref.kind != SLICE, self._queue))
                self._queue.insert(urgent, Transfer(ref, number, offset))
        return self._load_ahead()

    def loaded(self, ref: Ref, size: int) -> list[Command]:
        """The content of a ref is loaded. ValueError when the node has asked for bytes behind its end."""
        transfer = self.find(ref)
        if transfer is None:
            return [Unload(self.node, ref)]
        if transfer.offset >= size > 0:
            raise ValueError(
                f"it asks for what comes after the first {transfer.offset} bytes of {ref}, which has {size}"
            )
        transfer.size = size
        return self._stream()

    def grant(self, size: int) -> list[Command]:
        """The node accepts this many bytes more."""
        self.credit += size
        return self._stream()

    def taken(self, size: int) -> list[Command]:
        """The node has taken this many bytes and accepts as many again. ValueError when it was sent fewer."""
        if size > self.sent:
            raise ValueError(f"it gives credit back for {size} bytes, and {self.sent} are on their way to it")
        self.sent -= size
        return self.grant(size)

    def check(self, missing: list[tuple[Ref, int]]) -> None:
        """ValueError for a request that no node makes."""
        if len({ref for ref, _ in missing}) < len(missing):
            raise ValueError("it asks for a ref twice")
        modules = sum(ref.kind == MODULE for ref, _ in missing)
        if modules and modules + sum(transfer.ref.kind == MODULE for transfer in self._queue) > MODULES:
            raise ValueError(f"it asks for more than {MODULES} modules at a time")

    def drop(self, transfer: Transfer) -> list[Command]:
        """Give a transfer up and tell the node."""
        return [*self._remove(transfer), *self._stream()]

    def _remove(self, transfer: Transfer) -> list[Command]:
        self._queue.remove(transfer)
        return [Unload(self.node, transfer.ref), gone(self.node, transfer.ref)]

    def end_round(self, number: int, heir: int | None) -> list[Command]:
        """Stop sending what only the ended round needed. `heir`: a round of the same job; it takes over its slices."""
        commands: list[Command] = []
        for transfer in [t for t in self._queue if t.round == number and t.ref.kind != MODULE]:
            if heir is not None and transfer.ref.kind != PARAMS:
                transfer.round = heir
            else:
                commands += self._remove(transfer)
        return commands + self._stream()

    def clear(self) -> list[Command]:
        """The node is gone."""
        commands: list[Command] = [Unload(self.node, transfer.ref) for transfer in self._queue]
        self._queue.clear()
        return commands

    def _load_ahead(self) -> list[Command]:
        """Load the next refs: always the first one, more while they are small."""
        commands: list[Command] = []
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

    def _stream(self) -> list[Command]:
        """As many blocks as the credit allows, one ref after the other."""
        commands: list[Command] = []
        while self._queue and (transfer := self._queue[0]).size is not None:
            while transfer.offset < transfer.size and self.credit > 0:
                size = min(BLOCK_BYTES, transfer.size - transfer.offset, self.credit)
                commands.append(Block(self.node, transfer.ref, transfer.offset, size, transfer.round))
                transfer.offset += size
                self.credit -= size
                self.sent += size
            if transfer.offset < transfer.size:
                break
            self._queue.popleft()
            commands.append(Unload(self.node, transfer.ref))
        return commands + self._load_ahead()


def gone(node: str, ref: Ref) -> Send:
    """Tells a node that a ref will not come."""
    return Send(node, Kind.REFS, {"ref": ref, "offset": 0, "total": 0, "gone": True}, (b"",))
