"""Describes exceptions of user code: for the master, and for the output of a worker."""

from __future__ import annotations

import contextlib
import sys
import traceback
from typing import Any, Optional

from qjam_worker.values import codec, functions

from .application import ItemError

# The most that the master gets of an exception: characters of traceback and summary, encoded bytes, and calls of
# the traceback, which may have millions if user code has raised the recursion limit.
MAX_TEXT, MAX_SUMMARY, MAX_PICKLE, LAST_CALLS = 256 * 1024, 4096, 16 * 1024 * 1024, 1000
_OURS = ("qjam_worker.", "qjam.")


def raised(error: BaseException) -> tuple[BaseException, str]:
    """What user code raised, and at which item, for the summary."""
    if type(error) is ItemError and error.__cause__ is not None:  # isinstance would ask a class of the user's
        return error.__cause__, f" (item {error.item})"
    return error, ""


def describe(error: BaseException, memory_limit: int = 0) -> dict[str, Any]:
    """Text and summary of an exception, and the encoded one if it can be encoded and decoded again.

    `memory_limit`: that of the worker in bytes; 0 without one.
    """
    error, item = raised(error)
    if memory_limit and isinstance(error, SystemError) and "without" in str(error):
        # "error return without exception set": CPython 3.11 had no memory for the MemoryError
        error = MemoryError(str(error)).with_traceback(error.__traceback__)
    try:
        found = _description(error)
    except BaseException as failure:  # noqa: BLE001  no memory is left, or a method of the exception raises
        found = _short_description(error, failure)
    if memory_limit and isinstance(error, MemoryError):
        found["summary"] += f" (memory_limit is {memory_limit:,} bytes)"
    found["summary"] += item
    return found


def _short_description(error: BaseException, failure: BaseException) -> dict[str, Any]:
    trace, text = "", f"its text cannot be read: {type(failure).__name__}"
    with contextlib.suppress(BaseException):  # as above; each alone, as one may be had without the other
        text = str(error)[:MAX_SUMMARY]
    with contextlib.suppress(BaseException):
        trace = "".join(traceback.format_tb(_user_part(error), limit=-LAST_CALLS))[-MAX_TEXT:]
    summary = f"{type(error).__name__}: {text}"
    return {"text": f"{trace}{summary}", "summary": summary, "pickled": None}


def _description(error: BaseException) -> dict[str, Any]:
    lines = traceback.format_exception(type(error), error, _user_part(error), limit=-LAST_CALLS)
    text = functions.with_cells("".join(lines))
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 2]}\n[...]\n{text[-MAX_TEXT // 2 :]}"
    try:
        encoded: Optional[bytes] = codec.encode(error, inline=sys.maxsize).header
        codec.decode(encoded or b"", [])
    except BaseException:  # noqa: BLE001  a user's __reduce__ or __init__ may raise anything: send text only
        encoded = None
    if encoded is not None and len(encoded) > MAX_PICKLE:
        encoded = None
    return {"text": text, "summary": _summary(error)[:MAX_SUMMARY], "pickled": encoded}


def _summary(error: BaseException) -> str:
    return traceback.format_exception_only(type(error), error)[-1].strip()


def _user_part(error: BaseException) -> Any:
    """The traceback from the first frame outside qjam on."""
    position = error.__traceback__
    while position is not None and position.tb_frame.f_globals.get("__name__", "").startswith(_OURS):
        position = position.tb_next
    return position


def print_exception(error: BaseException) -> None:
    """Print it as python does when it ends, without the calls inside this package."""
    lines = traceback.format_exception(type(error), error, _user_part(error), limit=-LAST_CALLS)
    sys.stderr.write(functions.with_cells("".join(lines)))
    sys.stderr.flush()
