"""The node's side of one worker: a place in the pool, which one process after another fills."""

from __future__ import annotations

import signal
from typing import Any, Optional

from qjam_worker.ipc.files import remove
from qjam_worker.ipc.mailbox import DONE, SENT, TASK, Mailbox
from qjam_worker.ipc.pipes import Channel

from .fork_server_client import send_signal
from .results import Slot


class WorkerHandle:
    """What the node knows of a worker, and its ends of the pipes."""

    mailbox: Mailbox
    mailbox_path: str
    status: memoryview  # the words of its mailbox
    slot: Slot

    def __init__(self, index: int) -> None:
        self.index = index
        self.pid: Optional[int] = None
        self.channel: Optional[Channel] = None
        self.modules: Optional[Channel] = None  # where its imports are answered
        self.outputs: list[int] = []  # its stdout and stderr
        self.reusable_files: list[str] = []  # files of its results that the process may write to again
        self.files_in_reuse: list[str] = []  # of these, those that it was given with its task
        self.outbox: list[dict[str, Any]] = []  # messages for its next task: a busy worker does not read
        self.sent_count = 0  # messages that the process was sent
        self.ready = False
        self.last_answer: Optional[dict[str, Any]] = None  # of a process that leaves, until the next one is there
        self.failures = 0
        self.said = b""  # what the process has printed last before it was ready
        self.seq = 0  # the number of its task; 0 when idle
        self.jobs: set[int] = set()  # that the process knows
        self.kill_at: Optional[float] = None

    def __repr__(self) -> str:
        return f"<worker {self.index} pid={self.pid} {'busy' if self.seq else 'idle' if self.ready else 'starting'}>"

    @property
    def idle(self) -> bool:
        return self.ready and not self.seq

    def begin(self, channel: Channel, modules: Channel) -> None:
        """A new process fills the place."""
        self.channel, self.modules = channel, modules
        self.outbox.clear()
        for path in (*self.reusable_files, *self.files_in_reuse):
            remove(path)
        self.reusable_files.clear()
        self.files_in_reuse = []
        self.ready, self.pid, self.said = False, None, b""
        self.jobs.clear()

    def forget_task(self) -> None:
        """Before there is a process that could take the task of the last one for its own."""
        self.sent_count = self.status[TASK] = self.status[SENT] = self.status[DONE] = 0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message through the pipe."""
        assert self.channel is not None
        self.sent_count += 1
        self.channel.send(message)

    def answered(self) -> bool:
        """Whether the answer to its task lies in the mailbox."""
        return self.seq != 0 and bool(self.status[DONE] == self.seq)

    def take_back(self, used: list[Optional[str]]) -> None:
        """Remove the files that it might have written to again and has not."""
        for path in set(self.files_in_reuse).difference(filter(None, used)):
            remove(path)
        self.files_in_reuse = []

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the process a signal."""
        if self.pid is not None:
            send_signal(self.pid, number)
