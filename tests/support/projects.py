"""A folder of the user's modules, which only the master can import from: import the fixture `project`."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path

import pytest


class Project:
    """Writes modules and imports them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, source: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def module(self, name: str, source: str):
        self.write(name.replace(".", "/") + ".py", source)
        return importlib.import_module(name)


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    yield Project(folder)
    for name in set(sys.modules) - before:
        del sys.modules[name]
