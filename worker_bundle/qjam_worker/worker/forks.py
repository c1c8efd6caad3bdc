"""Child processes that user code forks."""

from __future__ import annotations

import os
from typing import NoReturn

from .exceptions import print_exception


def has_children() -> bool:
    """Whether user code has forked, as far as the system tells: a child process has maps too."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def end_as_a_fork(error: BaseException) -> NoReturn:
    """End a child process of user code that has not caught this, as python ends."""
    try:
        print_exception(error)
    finally:
        os._exit(1)
