"""The worker bundle: what is copied to a host, made from the qjam_worker that is installed here."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import qjam_worker

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can tell


class Bundle(NamedTuple):
    """A zip file with the package qjam_worker, and the sha256 of it in hexadecimal digits."""

    hash: str
    data: bytes


def build() -> Bundle:
    """Equal sources give equal bytes, so that a host that has the bundle of this hash need not be sent it."""
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
