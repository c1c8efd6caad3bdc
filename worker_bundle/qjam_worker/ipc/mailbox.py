"""A worker's mailbox: shared memory in which a node and a worker leave each other messages.

It has two messages, the task and the answer, and 64-bit words:

word       written by           says                                    read by
RUNNING    worker, as it        the number of the task that it runs;    worker, on SIGINT; node, when the process has
           begins and ends      0: none                                 ended
SLICE      worker, before       the slice that it maps or folds; -1:    worker, when user code has raised; node, when
           each slice           none                                    the process has ended: this slice is at fault
CANCELLED  node, before SIGINT  the number of the task that the         worker, as it begins a task and on SIGINT
                                worker shall stop
SENT       node, before TASK    how many messages the worker must have  worker, before it does the task
                                read from its pipe before that task
TASK       node, after the      the number of the task in the mailbox;  worker, whenever it is woken
           message              it grows with each task
DONE       worker, after the    the number of the task whose answer     node, when a worker has woken it or has ended
           answer               is in the mailbox
ALONE      node, before it      whether no other worker has a task      worker, after it: it may then wait awake for
           wakes the worker                                             the next one

The side that reads a number finds the message complete that was written before it. When a process has ended, the node
sets all words but SLICE to 0.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

import msgpack

RUNNING, SLICE, CANCELLED, TASK, SENT, DONE, ALONE = range(7)
# Seconds for which a worker that has nothing to do stays awake, where it was not left without work for as long before.
# To fall asleep and to be woken takes longer than a small task. With several at a time they would take the cores from
# each other.
AWAKE = 0.0005
_MESSAGES = 8  # from here on three words for each message: version, size, unused
_WORDS = 128  # bytes
TEXT = 8192  # bytes of the longest message; a longer one goes through a pipe
MAILBOX = _WORDS + 2 * TEXT  # bytes
ONE = struct.pack("=Q", 1)  # adds one to an eventfd


def mailbox_name(worker: int) -> str:
    """The name of its file."""
    return f"mailbox{worker}"


def counter() -> int:
    """The descriptor of a new eventfd(2), which os.eventfd makes only from python 3.10 on."""
    fd = ctypes.CDLL(None, use_errno=True).eventfd(0, os.O_CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(fd)


class Message:
    """A message in a mailbox. It is packed and read only when it differs from the last one, as it seldom does."""

    def __init__(self, words: memoryview, place: int, text: memoryview) -> None:
        self._words = words
        self._version, self._size = place, place + 1
        self._text = text
        self._pack = msgpack.Packer(unicode_errors="surrogatepass").pack
        self._last: Any = None
        self._read = 0  # the version that was read last

    def write(self, message: Any) -> bool:
        """Leave a message for the other side; False when it is too long. Do not change it afterwards."""
        if message == self._last:
            return True
        packed = self._pack(message)
        if len(packed) > TEXT:
            return False
        self._text[: len(packed)] = packed
        self._words[self._size] = len(packed)
        self._words[self._version] += 1
        self._last = message
        return True

    def read(self) -> Any:
        """The message that the other side has left last. ValueError when there is none."""
        version = self._words[self._version]
        if version != self._read:
            size = self._words[self._size]
            self._last = msgpack.unpackb(self._text[:size], strict_map_key=False, unicode_errors="surrogatepass")
            self._read = version
        return self._last


class Mailbox:
    """The words and the two messages of one worker's mailbox."""

    def __init__(self, view: memoryview) -> None:
        self.words = view[:_WORDS].cast("q")
        self.task = Message(self.words, _MESSAGES, view[_WORDS : _WORDS + TEXT])
        self.answer = Message(self.words, _MESSAGES + 3, view[_WORDS + TEXT : MAILBOX])
