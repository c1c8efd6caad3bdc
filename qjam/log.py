"""Messages to the user while a program runs: the logger "qjam"."""

from __future__ import annotations

import contextlib
import logging

logger = logging.getLogger("qjam")


def say(text: str, level: int = logging.WARNING) -> None:
    """Log `text`. An exception in a user's log filter or handler is ignored: it must not end the caller's thread."""
    with contextlib.suppress(Exception):
        logger.log(level, text)
