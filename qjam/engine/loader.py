"""Loads refs to be sent, in a thread of its own: a data set may run user code, and the loop never does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from qjam_worker.values import codec, flat
from qjam_worker.wire.refs import CODE, MODULE, PARAMS, Ref, module_name

from .pending import Pending

STOP_TIMEOUT = 5.0  # seconds


class Blob:
    """The flat form of a value, in pieces; the large ones are still in the user's memory."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = [memoryview(piece).cast("B") for piece in pieces]
        self._starts = [0, *accumulate(len(piece) for piece in self._pieces)]
        self.size = self._starts[-1]

    def range(self, offset: int, size: int) -> list[memoryview]:
        """The bytes [offset, offset + size) as views."""
        end = offset + size
        return [
            piece[max(0, offset - start) : end - start]
            for start, piece in zip(self._starts, self._pieces, strict=False)
            if start < end and start + len(piece) > offset
        ]


class Loader:
    """A thread that loads one ref after the other, and calls back when it has."""

    def __init__(self, find_module: Callable[[str], bytes]) -> None:
        self._find_module = find_module
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="qjam-load", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def load(
        self, ref: Ref, pending: Pending | None, done: Callable[[Blob], None], failed: Callable[[BaseException], None]
    ) -> None:
        """Load a ref of the round `pending`, then call `done` with its content, or `failed`; in the thread."""

        def task() -> None:
            try:
                blob = self._blob(ref, pending)
            except BaseException as error:  # noqa: BLE001  user code: a data set's slice(), which may even sys.exit()
                failed(error)
            else:
                done(blob)

        self._tasks.put(task)

    def stop(self) -> None:
        """End the thread when its tasks are done; one that hangs in user code is left behind."""
        self._tasks.put(None)
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # and with it the slice

    def _blob(self, ref: Ref, pending: Pending | None) -> Blob:
        if ref.kind == MODULE:
            return Blob([self._find_module(module_name(ref))])
        if pending is None:
            raise LookupError(f"{ref} is of a round that is over")
        if ref.kind == PARAMS:
            return Blob(flat.pieces(pending.params))
        if ref.kind == CODE and pending.code is not None:
            return Blob([pending.code])
        assert pending.dataset is not None
        return Blob(flat.pieces(codec.encode(pending.dataset.slice_from_hash(ref.key))))
