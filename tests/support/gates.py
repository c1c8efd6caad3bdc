"""Events between processes: user code says that it has come to a point, or waits until it is let on."""

from __future__ import annotations

import os


class Gate:
    """A named pipe. The test makes it and hands its path to user code."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        os.mkfifo(path)
        self.path = str(path)
        # For reading and writing, so that neither end waits for the other to open it, or sees it close.
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._lines = os.fdopen(os.dup(self._fd))

    def heard(self) -> str:
        """Blocks until somebody announces something, and gives it."""
        return self._lines.readline().rstrip("\n")

    def open(self, times: int = 1) -> None:
        """Lets as many callers of `wait_at` on."""
        os.write(self._fd, b"\n" * times)

    def close(self) -> None:
        self._lines.close()
        os.close(self._fd)


def announce(path: str, text: object = "") -> None:
    fd = os.open(path, os.O_RDWR)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def wait_at(path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    os.read(fd, 1)
    os.close(fd)
