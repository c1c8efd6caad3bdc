"""The worker bundle: the package qjam_worker as a zip file, which is sent to hosts."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import qjam_worker

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can store


class Bundle(NamedTuple):
    """A zip file with the package qjam_worker. `hash`: its sha256 in hexadecimal digits."""

    hash: str
    data: bytes


def build() -> Bundle:
    """Pack the qjam_worker that is installed here. Equal sources make equal bytes: hosts cache it by hash."""
    folder = Path(qjam_worker.__path__[0])
    files = [path for path in folder.rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    sources = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, source in sorted(sources.items()):
            member = zipfile.ZipInfo(f"qjam_worker/{name}", _EPOCH)
            archive.writestr(member, source, zipfile.ZIP_DEFLATED, 9)
    data = packed.getvalue()
    return Bundle(hashlib.sha256(data).hexdigest(), data)
