"""Tells from the frames on the stack whether code runs because a module is being imported."""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Optional

# The file name of python's import system, whichever finders and loaders stand between its frames.
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"

in_worker = False  # whether this process is a worker, or a fork of one


def importing(frame: Optional[FrameType]) -> Optional[FrameType]:
    """The top level of the module whose import `frame` is a part of, of the innermost one; a frame of the import system
    where no module's code runs yet; None if nothing is being imported.
    """
    module = None
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return module or frame
        if frame.f_code.co_name == "<module>":
            module = frame
        frame = frame.f_back
    return None


def check_not_importing() -> None:
    """Raise RuntimeError if this is a worker, and the caller, which makes a Master, is a part of an import."""
    module = importing(inspect.currentframe()) if in_worker else None
    if module is not None:
        raise RuntimeError(
            f"a worker imports {module.f_globals.get('__name__')}, which makes a Master at its top level "
            f'({module.f_code.co_filename}, line {module.f_lineno}): write `if __name__ == "__main__":` above what '
            "only the program is to do, or put it into a function"
        )
