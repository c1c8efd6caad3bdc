"""Names the limit of which too little is left, where an OSError says only that it is so."""

from __future__ import annotations

import errno
import resource


def told(error: BaseException) -> str:
    """Type and text of an error; where descriptors have run out, also how many this process may have."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        text += f" (this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} open files: ulimit -n)"
    return text
