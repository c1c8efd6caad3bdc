"""Exceptions of user code in words, for the master and for whoever reads what a worker prints."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from typing import Any, Optional

# What the master is told of an exception at the most: characters of traceback and summary, bytes of its pickle, and
# calls, of which there may be millions where user code has raised the recursion limit.
MAX_TEXT, MAX_SUMMARY, MAX_PICKLE, LAST_CALLS = 256 * 1024, 4096, 16 * 1024 * 1024, 1000


def describe(error: BaseException, memory_limit: int = 0) -> dict[str, Any]:
    """What the master is told of an exception: text always, and the pickled exception if it survives the journey.

    `memory_limit`: the one that is kept; 0 where there is none.
    """
    if memory_limit and isinstance(error, SystemError) and "without" in str(error):
        # "error return without exception set": CPython 3.11 had no memory for the exception
        error = MemoryError(str(error)).with_traceback(error.__traceback__)
    try:
        found = _description(error)
    except BaseException as failure:  # noqa: BLE001  no memory is left for it, or the exception is a trap
        found = _short_description(error, failure)
    if memory_limit and isinstance(error, MemoryError):
        found["summary"] += f" (memory_limit is {memory_limit:,} bytes)"
    return found


def _short_description(error: BaseException, failure: BaseException) -> dict[str, Any]:
    try:
        trace = "".join(traceback.format_tb(_user_part(error), limit=-LAST_CALLS))[-MAX_TEXT:]
        text = str(error)[:MAX_SUMMARY]
    except BaseException:  # noqa: BLE001  as above
        trace, text = "", f"its text cannot be had: {type(failure).__name__}"
    summary = f"{type(error).__name__}: {text}"
    return {"text": f"{trace}{summary}", "summary": summary, "pickled": None}


def _description(error: BaseException) -> dict[str, Any]:
    text = "".join(traceback.format_exception(type(error), error, _user_part(error), limit=-LAST_CALLS))
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 2]}\n[...]\n{text[-MAX_TEXT // 2 :]}"
    try:
        pickled: Optional[bytes] = pickle.dumps(error)
        pickle.loads(pickled or b"")
    except BaseException:  # noqa: BLE001  whatever a user's __reduce__ or __init__ raises: the text goes alone
        pickled = None
    if pickled is not None and len(pickled) > MAX_PICKLE:
        pickled = None
    return {"text": text, "summary": _summary(error)[:MAX_SUMMARY], "pickled": pickled}


def _summary(error: BaseException) -> str:
    return traceback.format_exception_only(type(error), error)[-1].strip()


def _user_part(error: BaseException) -> Any:
    """The traceback from the first frame on that is not this package's."""
    here = os.path.dirname(os.path.dirname(__file__))
    position = error.__traceback__
    while position is not None and position.tb_frame.f_code.co_filename.startswith(here):
        position = position.tb_next
    return position


def print_exception(error: BaseException) -> None:
    """As python does when it ends, without the calls that are this package's."""
    traceback.print_exception(type(error), error, _user_part(error), limit=-LAST_CALLS)
    sys.stderr.flush()
