"""What the user may want to know while all goes on: the logger "qjam"."""

from __future__ import annotations

import contextlib
import logging

logger = logging.getLogger("qjam")


def say(text: str, level: int = logging.WARNING) -> None:
    """Log it; a filter or a handler of the user's that raises ends nothing of ours."""
    with contextlib.suppress(Exception):
        logger.log(level, text)
