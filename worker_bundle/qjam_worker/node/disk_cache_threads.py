"""Has `Kept` read and write in threads of its own: a node waits for no disk."""

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

# Threads that read: one checks 4 to 5 GB/s.
READERS = min(4, usable_cores())
# Seconds, at the end, for what is not written yet; what then lacks is sent to the next program, which keeps it.
LINGER = 2.0
# Seconds for the threads to see that they are to stop.
STOP = 0.5
LOWEST_PRIORITY = 19

Item = tuple[str, str, int]  # ref, file, size


class Found(NamedTuple):
    """What came of a look for a slice: where it is, or None; `round` is the one that wanted it last."""

    ref: str
    round: Optional[int]
    path: Optional[str] = None
    size: int = 0


class DiskCacheThreads:
    """Looks for slices and keeps them. `fileno` is readable when `found` or `notes` has something. `most`: bytes of
    slices that may be held back.
    """

    def __init__(self, kept: DiskCache, most: int) -> None:
        self.kept = kept
        self.most = most
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()  # for the user
        self._wake_fd, self._bell_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(self._bell_fd, False)
        self._rounds: dict[str, Optional[int]] = {}  # of the refs that are looked for
        self._read: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Found] = queue.SimpleQueue()
        self._write: queue.SimpleQueue[Optional[Item]] = queue.SimpleQueue()
        self._arrived: list[Optional[Item]] = []
        self._held_back = 0
        self._readers: list[threading.Thread] = []
        self._writers: list[threading.Thread] = []
        self._damaged = 0
        self._full = False

    def fileno(self) -> int:
        return self._wake_fd

    def look(self, ref: str, round_: Optional[int]) -> bool:
        """Look for a slice that a round wants; False when it is not kept, else `found` will tell of it."""
        if ref not in self._rounds:
            if ref not in self.kept or not self._start(self._readers, READERS, self._reading):
                return False
            self._read.put(ref)
        self._rounds[ref] = round_
        return True

    def found(self) -> list[Found]:
        """What has been looked for since the last call."""
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
        """Have a copy of a slice written, if its file is there still when that begins: with `write`, or when there are
        many. What comes meanwhile would take longer (512 MiB 0.34 s and not 0.29 s, on 2 cores).
        """
        self._arrived.append((ref, path, size))
        self._held_back += size
        if self._held_back > self.most:
            self.write()

    def write(self) -> None:
        """Begin to write: all that is to come has come."""
        if self._arrived and self._start(self._writers, 1, self._writing):
            for item in self._arrived:
                self._write.put(item)
            self._arrived.clear()
            self._held_back = 0

    def close(self) -> None:
        """End the threads; what is still to be kept has LINGER seconds, here: one of the lowest priority may get no
        time on a busy machine.
        """
        self.kept.until = -math.inf
        for _ in self._readers:
            self._read.put(None)
        for _ in self._writers:
            self._write.put(None)
        deadline = time.monotonic() + STOP
        for thread in (*self._readers, *self._writers):
            thread.join(max(0.0, deadline - time.monotonic()))  # one that is stuck in the disk is left behind
        self.kept.until = time.monotonic() + LINGER
        with suppress(queue.Empty):
            while True:
                self._arrived.append(self._write.get_nowait())
        with suppress(Stopped, OSError):
            for item in filter(None, self._arrived):
                self._put(item)
        self.kept.close()
        if not any(thread.is_alive() for thread in (*self._readers, *self._writers)):
            os.close(self._bell_fd)
        os.close(self._wake_fd)

    # In the threads

    def _start(self, threads: list[threading.Thread], count: int, run: Callable[[], None]) -> bool:
        """Have as many threads; whether there is one. The interpreter starts none when it is on its way out."""
        with suppress(RuntimeError):
            while len(threads) < count:
                thread = threading.Thread(target=run, name="qjam-keep", daemon=True)
                thread.start()
                threads.append(thread)
        return bool(threads)

    def _reading(self) -> None:
        while (ref := self._read.get()) is not None:
            try:
                path, size = self.kept.take(ref) or (None, 0)
            except Stopped:
                return
            except Damaged as error:
                path, size = None, 0
                self._tell_damaged(str(error))
            except Exception as error:  # noqa: BLE001  whatever it is: a round waits for an answer
                path, size = None, 0
                self._say(f"{ref} cannot be looked for: {error!r}")
            self._found.put(Found(ref, None, path, size))
            self._ring()

    def _tell_damaged(self, text: str) -> None:
        """Of the first one, the second, the fourth ...: a disk that fails must not fill a log as well."""
        self._damaged += 1
        if self._damaged & (self._damaged - 1) == 0:
            so_far = f" ({self._damaged} so far)" if self._damaged > 1 else ""
            self._say(f"{text}; it was removed, and is fetched again{so_far}")

    def _writing(self) -> None:
        with suppress(OSError):  # one of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        try:
            self.kept.trim()
            while (item := self._write.get()) is not None:
                try:
                    self._put(item)
                except Stopped:
                    self._write.put(item)
                    return
        except OSError as error:
            self._say(f"slices are kept no longer: {error}")

    def _put(self, item: Item) -> None:
        if not self.kept.put(*item) and not self._full:
            self._full = True
            self._say(f"{self.kept.folder} has no room for more slices (keep_data); the others are not kept")

    def _say(self, text: str) -> None:
        self.notes.put(text)
        self._ring()

    def _ring(self) -> None:
        with suppress(OSError):  # it is full of rings, or nobody listens any more
            os.write(self._bell_fd, b"!")
