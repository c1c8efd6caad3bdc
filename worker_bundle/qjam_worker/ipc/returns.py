"""What calls came to, in a ring of shared memory for each worker: it outlives the process that has written it.

The file begins with 64-bit words:

word    written by          says                                             read by
CALL    worker, before      the call that it runs; 0: none                   node; worker, on SIGINT
        each call
STOP    node, before        the call that is to be stopped                   worker, as it begins a
        SIGINT                                                               call and on SIGINT
YIELD   node                the number of the task in which the worker       worker, after each call
                            shall take no more calls
WROTE   worker, after the   how many bytes it has written in all             node
        record
READ    node                how many bytes it has read in all                worker, when the ring is full
IDLE    worker              whether it waits for more calls, awake           node, before it wakes a worker

Then come records: call, how it ended (values.outcomes), number of bytes, and these. None goes across the end of the
ring.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from qjam_worker.values.outcomes import IN_FILE

CALL, STOP, YIELD, WROTE, READ, IDLE = range(6)
WORDS = 64  # bytes
RING = 256 * 1024  # bytes of records
MAX_RECORD = RING // 4
RETURNS = WORDS + RING  # bytes

_HEAD = struct.Struct("=QII")


def returns_name(worker: int) -> str:
    """The name of its file."""
    return f"returns{worker}"


class Return(NamedTuple):
    """How a call ended."""

    call: int
    how: int
    data: bytes


class Ring:
    """Both sides of one worker's ring: one process puts, the other takes."""

    def __init__(self, view: memoryview) -> None:
        self.words = view[:WORDS].cast("q")
        self._view = view[WORDS:RETURNS]

    def put(self, call: int, how: int, data: bytes) -> bool:
        """Write a record; False when there is no room for it now."""
        words, size = self.words, _HEAD.size + ((len(data) + 7) & ~7)
        wrote = words[WROTE]
        left = RING - wrote % RING
        skip = left if left < size else 0
        if wrote + skip + size - words[READ] > RING:
            return False
        if skip >= _HEAD.size:
            _HEAD.pack_into(self._view, wrote % RING, 0, 0, 0)
        at = (wrote + skip) % RING
        _HEAD.pack_into(self._view, at, call, how, len(data))
        at += _HEAD.size
        self._view[at : at + len(data)] = data
        words[WROTE] = wrote + skip + size
        return True

    def take(self) -> list[Return]:
        """All records that have come since the last time. ValueError where user code has written over them."""
        words, view = self.words, self._view
        read, wrote = words[READ], words[WROTE]
        if not 0 <= read <= wrote <= read + RING:
            raise ValueError(f"{wrote} bytes of returned calls were written and {read} read")
        found = []
        while read < wrote:
            at = read % RING
            left = RING - at
            if left < _HEAD.size:
                read += left
                continue
            call, how, size = _HEAD.unpack_from(view, at)
            if call == 0:
                read += left
                continue
            at += _HEAD.size
            if how > IN_FILE or size > MAX_RECORD or at + size > RING:
                raise ValueError("the records of returned calls make no sense")
            found.append(Return(call, how, bytes(view[at : at + size])))
            read += _HEAD.size + ((size + 7) & ~7)
        if read > wrote:
            raise ValueError("the records of returned calls make no sense")
        words[READ] = wrote
        return found

    def clear(self) -> None:
        """Another process begins to write. Nobody may use it meanwhile."""
        for word in range(len(self.words)):
            self.words[word] = 0
