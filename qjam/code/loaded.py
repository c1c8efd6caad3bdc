"""Remembers how the modules of the user's project were when they were loaded: their source, and their state.

Python keeps neither, and the files may change at any time. So importing qjam puts an observer before the finders of the
import system. It finds what they find, and takes the source of a module of the project when that is loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import weakref
from collections.abc import Collection, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from qjam_worker import importing

from . import project
from .state import Snapshot

_SourceFileLoader = importlib.machinery.SourceFileLoader
_modules: weakref.WeakKeyDictionary[ModuleType, Loaded] = weakref.WeakKeyDictionary()
_loading: list[tuple[ModuleType, project.Found]] = []  # were half loaded when the observer came, as they import qjam


class Loaded:
    """A loaded module: what was found when it was loaded, and what it held then."""

    def __init__(self, module: ModuleType, found: project.Found) -> None:
        self.found = found
        self.baseline = Snapshot(module, module.__name__)
        self.seen = found.stamp  # of the file, when it was last compared


def loaded(module: ModuleType, ship: Collection[str] = ()) -> Loaded | None:
    """How the module was loaded; None if it is not the project's, or its file changed before qjam could read it."""
    _note_the_half_loaded()
    known = _modules.get(module)
    if known is None:
        spec = getattr(module, "__spec__", None)
        if isinstance(spec, importlib.machinery.ModuleSpec) and project.belongs(spec, ship):
            known = _note(module, spec)
    return known


def patched_from_file(module: ModuleType) -> bool:
    """Whether the module's functions have become those of its file, without a reload: autoreload patches in place."""
    known = _modules.pop(module, None)
    spec = getattr(module, "__spec__", None)
    if known is None or not isinstance(spec, importlib.machinery.ModuleSpec):
        return False
    if not _fits(module, known.found) and _note(module, spec) is not None:
        return True
    _modules[module] = known
    return False


def _note(module: ModuleType, spec: importlib.machinery.ModuleSpec) -> Loaded | None:
    try:
        found = project.read(spec)
    except OSError:
        return None
    # Another loader may change the code, as that of pytest does.
    if found.source is not None and type(spec.loader) is _SourceFileLoader and not _fits(module, found):
        return None
    _modules[module] = Loaded(module, found)
    return _modules[module]


def _note_the_half_loaded() -> None:
    for entry in list(_loading):
        module, found = entry
        if not _is_loading(module):
            _loading.remove(entry)
            _modules[module] = Loaded(module, found)


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _fits(module: ModuleType, found: project.Found) -> bool:
    """Whether the functions of a module are those of this source."""
    try:
        codes = set(_codes(compile(found.source or b"", found.path, "exec", dont_inherit=True)))
    except (SyntaxError, ValueError):
        return False
    functions = (
        function
        for owner in (module, *(value for value in vars(module).values() if isinstance(value, type)))
        for function in list(vars(owner).values())
        if type(function) is FunctionType and function.__code__.co_filename == found.path
    )
    return all(function.__code__ in codes for function in functions)


def _codes(code: CodeType) -> list[CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [code, *(one for constant in inner for one in _codes(constant))]


class _Observer(importlib.abc.MetaPathFinder):
    """Finds what the finders after it find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        _note_the_half_loaded()
        after = sys.meta_path.index(self) + 1 if self in sys.meta_path else 0
        spec = project.search(sys.meta_path[after:], fullname, path, target)
        if spec is not None and spec.loader is not None and not _is_qjam(fullname) and project.belongs(spec):
            _observe(spec)
        return spec


def _observe(spec: importlib.machinery.ModuleSpec) -> None:
    """Read the source now, and note the module once its loader has loaded it. If that fails, what was there stays."""
    loader: Any = spec.loader
    try:
        found = project.read(spec)
    except OSError:
        return

    def exec_module(module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        loader.exec_module(module)
        _modules[module] = Loaded(module, found)

    if hasattr(loader, "exec_module"):
        try:
            loader.exec_module = exec_module
        except AttributeError:  # it has no attributes of its own
            pass


def _is_qjam(name: str) -> bool:
    return name.partition(".")[0] in ("qjam", "qjam_worker")


def observe_imports() -> None:
    """From now on remember modules as they are loaded, and those that are here as they are now."""
    if importing.in_worker or any(isinstance(finder, _Observer) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Observer())
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        if not isinstance(spec, importlib.machinery.ModuleSpec) or module.__name__ != spec.name:
            continue
        if not _is_qjam(spec.name) and project.belongs(spec):
            if _is_loading(module):
                _loading.append((module, project.read(spec)))
            else:
                _note(module, spec)
