"""Shows what user code printed on the workers, line by line."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import TextIO

# A line longer than this is shown in pieces, so that output without line ends cannot fill the memory.
MAX_LINE = 64 * 1024


class Printer:
    """A thread that prints, so that a terminal that blocks delays nothing else.

    It calls `shown(node, bytes)` when it has written text; the node may then send more.
    """

    def __init__(self, echo: bool, shown: Callable[[str, int], None]) -> None:
        self._echo = echo
        self._shown = shown
        self._queue: queue.SimpleQueue[tuple[str, str, int, int, bytes] | threading.Event | None] = queue.SimpleQueue()
        self._begun: dict[tuple[str, int, int], bytes] = {}
        self._hosts: dict[str, str] = {}
        self._taken = self._done = 0  # pieces; one thread counts each
        self._thread: threading.Thread | None = None
        self._closing = threading.Lock()  # nothing may be queued behind the end
        self._closed = False

    def put(self, node: str, host: str, worker: int, stream: int, data: bytes) -> None:
        """Queue what a worker has written to its stream 1 (stdout) or 2 (stderr)."""
        with self._closing:
            if self._closed:
                return  # the master is closed; workers that still print are about to be killed
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qjam-print", daemon=True)
                self._thread.start()
            self._taken += 1
            self._queue.put((node, host, worker, stream, data))

    def flush(self) -> None:
        """Block until everything that was queued is shown, unfinished lines too: a round is over."""
        if (self._taken == self._done and not self._begun) or threading.current_thread() is self._thread:
            return
        reached = threading.Event()
        with self._closing:
            if self._thread is None:
                return
            self._queue.put(reached)
        reached.wait()

    def close(self) -> None:
        """Show the rest, unfinished lines too, and end the thread."""
        with self._closing:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._queue.put(None)
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                self._end_lines()
                item.set()
                continue
            node, host, worker, stream, data = item
            self._hosts[node] = host
            self._write(stream, self._lines(node, worker, stream, data))
            self._done += 1
            self._shown(node, len(data))
        self._end_lines()

    def _end_lines(self) -> None:
        """Show the unfinished lines as they are."""
        for (node, worker, stream), rest in self._begun.items():
            self._write(stream, [_prefix(self._hosts[node], worker), rest, b"\n"])
        self._begun.clear()

    def _lines(self, node: str, worker: int, stream: int, data: bytes) -> list[bytes]:
        """The complete lines, each with its prefix; an unfinished one is kept."""
        key = (node, worker, stream)
        text = self._begun.pop(key, b"") + data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        whole, newline, rest = text.rpartition(b"\n")
        prefix = _prefix(self._hosts[node], worker)
        parts = [prefix, whole.replace(b"\n", b"\n" + prefix), b"\n"] if newline else []
        if len(rest) >= MAX_LINE:
            parts += [prefix, rest, b"\n"]
        elif rest:
            self._begun[key] = rest
        return parts

    def _write(self, stream: int, parts: list[bytes]) -> None:
        target: TextIO | None = sys.stdout if stream == 1 else sys.stderr
        if not (self._echo and parts and target):
            return
        text = b"".join(parts).decode("utf-8", "replace")
        try:
            try:
                target.write(text)
            except UnicodeEncodeError:
                coding = target.encoding or "ascii"
                target.write(text.encode(coding, "backslashreplace").decode(coding))
            target.flush()
        except Exception:  # noqa: BLE001, S110  it is closed, or takes no text: the work goes on
            pass


def _prefix(host: str, worker: int) -> bytes:
    return f"[{host}] ".encode() if worker < 0 else f"[{host} {worker}] ".encode()
