"""The queue of calls of a host: a named pipe of records, which the node writes and whichever worker is free reads.

A record is read by one worker and whole: reads and writes are of whole records, and shorter than what the kernel moves
at once. So no call waits behind another one that takes long, and what the node reads itself no worker has begun.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Sequence
from typing import NamedTuple, Optional

CAPACITY = 256 * 1024  # bytes that the pipe is to hold; it has 64 KiB where the system refuses
_RECORD = struct.Struct("=QIIIIII")
SIZE = _RECORD.size  # divides PIPE_BUF
_AT_ONCE = 4096 // SIZE  # records that the kernel writes whole or not at all (PIPE_BUF)
_READ = 64 * 1024


class Record(NamedTuple):
    """One call: where in the arenas its arguments lie, and the description of its function."""

    call: int
    function: int
    arena: int
    offset: int
    size: int
    function_arena: int
    function_offset: int


class CallPipe:
    """The node's ends of the pipe at `path`, which it makes."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(self._fd, 1031, CAPACITY)  # F_SETPIPE_SZ
        except OSError:
            pass  # the user has too many large pipes

    def __len__(self) -> int:
        """The number of calls that no worker has read."""
        waiting = bytearray(4)
        fcntl.ioctl(self._fd, termios.FIONREAD, waiting)
        return int.from_bytes(waiting, "little") // SIZE

    def put(self, records: Sequence[Record]) -> int:
        """Write the records, as far as there is room for them; how many."""
        for first in range(0, len(records), _AT_ONCE):
            some = records[first : first + _AT_ONCE]
            try:
                os.write(self._fd, b"".join([_RECORD.pack(*record) for record in some]))
            except BlockingIOError:  # all of these or none
                return first
        return len(records)

    def drain(self) -> list[Record]:
        """Take out all that no worker has read."""
        data = b""
        try:
            while some := os.read(self._fd, _READ):
                data += some
        except BlockingIOError:
            pass
        return [Record(*fields) for fields in _RECORD.iter_unpack(data)]

    def close(self) -> None:
        """Close it; the file is removed with its directory."""
        os.close(self._fd)


class CallSource:
    """A worker's end of the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def take(self) -> Optional[Record]:
        """The next call; None when there is none."""
        try:
            data = os.read(self._fd, SIZE)
        except BlockingIOError:
            return None
        return Record(*_RECORD.unpack(data)) if data else None
