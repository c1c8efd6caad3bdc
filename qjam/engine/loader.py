"""Gets refs ready to be sent, in a thread of its own: a data set may run user code, and the engine never does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from qjam_worker.values import codec, flat

from .pending import Pending

STOP_TIMEOUT = 5.0  # seconds


class Blob:
    """The flat form of a value in pieces, the large ones still in the user's memory."""

    def __init__(self, segments: list[Any]) -> None:
        self._segments = [memoryview(segment).cast("B") for segment in segments]
        self._starts = [0, *accumulate(len(segment) for segment in self._segments)]
        self.size = self._starts[-1]

    def range(self, offset: int, size: int) -> list[memoryview]:
        """The bytes [offset, offset + size) as views."""
        end = offset + size
        return [
            segment[max(0, offset - start) : end - start]
            for start, segment in zip(self._starts, self._segments, strict=False)
            if start < end and start + len(segment) > offset
        ]


class Loader:
    """The thread. What it makes is handed to a function, which is called in it."""

    def __init__(self, find_module: Callable[[str], bytes]) -> None:
        self._find_module = find_module
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="qjam-load", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def load(
        self, ref: str, pending: Pending | None, done: Callable[[Blob], None], failed: Callable[[BaseException], None]
    ) -> None:
        """Make the content of a ref of the round `pending`, and call `done` with it, or `failed`."""

        def task() -> None:
            try:
                blob = self._blob(ref, pending)
            except BaseException as error:  # noqa: BLE001  user code: a data set's slice(), which may even sys.exit()
                failed(error)
            else:
                done(blob)

        self._tasks.put(task)

    def stop(self) -> None:
        """End the thread when it has done what it was given; one that is stuck in user code is left behind."""
        self._tasks.put(None)
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # and with it the slice

    def _blob(self, ref: str, pending: Pending | None) -> Blob:
        kind, _, rest = ref.partition(":")
        if kind == "module":
            return Blob([self._find_module(rest.partition(":")[2])])
        if pending is None:
            raise LookupError(f"{ref} is wanted for a round that is over")
        if kind == "params":
            return Blob(flat.pieces(pending.params))
        if kind == "code" and pending.code is not None:
            return Blob([pending.code])
        assert pending.dataset is not None
        return Blob(flat.pieces(codec.encode(pending.dataset.slice_from_hash(ref))))
