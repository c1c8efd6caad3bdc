"""Reads and writes the disk cache in threads, so that the node never waits for a disk."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Optional

from qjam_worker.ipc.cores import usable_cores

from .disk_cache import Damaged, DiskCache, Stopped

# Threads that read and check slices, 4 to 5 GB/s each.
READERS = min(4, usable_cores())
# Seconds at the end of the node to write slices that are not on disk yet; the master sends the others to the next
# program, whose nodes write them.
LINGER = 2.0
# Seconds for the threads to stop.
STOP = 0.5
LOWEST_PRIORITY = 19

Item = tuple[str, str, int]  # ref, file, size


class Found(NamedTuple):
    """The answer to `look`: where the slice lies, or None. `round`: the last one that looked for it."""

    ref: str
    round: Optional[int]
    path: Optional[str] = None
    size: int = 0


class DiskCacheThreads:
    """Looks for slices on disk and writes new ones. `fileno` is readable when `found` or `notes` has something.

    `most`: bytes of new slices that may wait for `write`.
    """

    def __init__(self, cache: DiskCache, most: int) -> None:
        self.cache = cache
        self.most = most
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()  # for the user
        self._wake_fd, self._wake_write_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(self._wake_write_fd, False)
        self._rounds: dict[str, Optional[int]] = {}  # by the ref that is being looked for
        self._read: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Found] = queue.SimpleQueue()
        self._write: queue.SimpleQueue[Optional[Item]] = queue.SimpleQueue()
        self._arrived: list[Optional[Item]] = []
        self._held_back = 0
        self.waiting: set[str] = set()  # refs that are still to be written
        self._readers: list[threading.Thread] = []
        self._writers: list[threading.Thread] = []
        self._damaged = 0
        self._full = False

    def fileno(self) -> int:
        return self._wake_fd

    def release(self, ref: str) -> None:
        """The node uses this slice no longer."""
        self.cache.release(ref)

    def look(self, ref: str, round_: Optional[int]) -> bool:
        """Look for a slice that a round needs; False if it is not on disk, else `found` gives the answer later."""
        if ref not in self._rounds:
            if ref not in self.cache or not self._start(self._readers, READERS, self._reading):
                return False
            self._read.put(ref)
        self._rounds[ref] = round_
        return True

    def found(self) -> list[Found]:
        """The answers since the last call."""
        with suppress(BlockingIOError):
            while os.read(self._wake_fd, 4096):
                pass
        found = []
        with suppress(queue.Empty):
            while True:
                one = self._found.get_nowait()
                found.append(one._replace(round=self._rounds.pop(one.ref)))
        return found

    def keep(self, ref: str, path: str, size: int) -> None:
        """Have a copy of a slice written after the next `write`, or at once if many wait; unless its file is gone then.

        Writing while slices arrive would slow these down (512 MiB took 0.34 s instead of 0.29 s, on 2 cores).
        """
        self.waiting.add(ref)
        self._arrived.append((ref, path, size))
        self._held_back += size
        if self._held_back > self.most:
            self.write()

    def write(self) -> None:
        """Begin to write: no slices are on their way now."""
        if self._arrived and self._start(self._writers, 1, self._writing):
            for item in self._arrived:
                self._write.put(item)
            self._arrived.clear()
            self._held_back = 0

    def close(self) -> None:
        """End the threads, and write what is left for LINGER seconds at most. In this thread: the writer has the lowest
        priority, and may get no time on a busy machine.
        """
        self.cache.until = -math.inf
        for _ in self._readers:
            self._read.put(None)
        for _ in self._writers:
            self._write.put(None)
        deadline = time.monotonic() + STOP
        for thread in (*self._readers, *self._writers):
            thread.join(max(0.0, deadline - time.monotonic()))  # one that waits for a disk is left behind
        self.cache.until = time.monotonic() + LINGER
        with suppress(queue.Empty):
            while True:
                self._arrived.append(self._write.get_nowait())
        with suppress(Stopped, OSError):
            for item in filter(None, self._arrived):
                self._put(item)
        self.cache.close()
        if not any(thread.is_alive() for thread in (*self._readers, *self._writers)):
            os.close(self._wake_write_fd)
        os.close(self._wake_fd)

    # In the threads

    def _start(self, threads: list[threading.Thread], count: int, run: Callable[[], None]) -> bool:
        """Start threads until there are `count`; whether there is one. An interpreter that is ending starts none."""
        with suppress(RuntimeError):
            while len(threads) < count:
                thread = threading.Thread(target=run, name="qjam-keep", daemon=True)
                thread.start()
                threads.append(thread)
        return bool(threads)

    def _reading(self) -> None:
        while (ref := self._read.get()) is not None:
            try:
                path, size = self.cache.take(ref) or (None, 0)
            except Stopped:
                return
            except Damaged as error:
                path, size = None, 0
                self._tell_damaged(str(error))
            except Exception as error:  # noqa: BLE001  a round waits for an answer, whatever happens
                path, size = None, 0
                self._say(f"{ref} cannot be looked for: {error!r}")
            self._found.put(Found(ref, None, path, size))
            self._wake()

    def _tell_damaged(self, text: str) -> None:
        """Say it of the first one, the second, the fourth, the eighth...: a failing disk must not fill the log."""
        self._damaged += 1
        if self._damaged & (self._damaged - 1) == 0:
            so_far = f" ({self._damaged} so far)" if self._damaged > 1 else ""
            self._say(f"{text}; it was removed, and is fetched again{so_far}")

    def _writing(self) -> None:
        with suppress(OSError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        try:
            self.cache.trim()
            while (item := self._write.get()) is not None:
                try:
                    self._put(item)
                except Stopped:
                    self._write.put(item)
                    return
                self.waiting.discard(item[0])
                self._wake()
        except OSError as error:
            self.waiting.clear()
            self._say(f"slices are kept no longer: {error}")

    def _put(self, item: Item) -> None:
        if not self.cache.put(*item) and not self._full:
            self._full = True
            self._say(f"{self.cache.folder} has no room for more slices (keep_data); the others are not kept")

    def _say(self, text: str) -> None:
        self.notes.put(text)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # the pipe is full, which wakes the node too, or it is closed
            os.write(self._wake_write_fd, b"!")
