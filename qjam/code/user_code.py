"""Describes a user's module or function so that workers can load it, and reads the source of modules they import."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Callable, Hashable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import cloudpickle
import msgpack

Reduce = Callable[[Any, Any], Any]

_MAIN = ("__main__", "__mp_main__")  # __mp_main__: the script in a child that multiprocessing spawned
_INSTALLED = ("site-packages", "dist-packages")
_ENVIRONMENT = tuple(
    os.path.join(os.path.realpath(path), "")
    for path in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(site.getsitepackages() if hasattr(site, "getsitepackages") else ()),
        site.getusersitepackages(),
    }
)

PYTHON = ".".join(map(str, sys.version_info[:2]))  # only this version can read our byte code


class UserCode(NamedTuple):
    """Code to map with. Equal keys mean equal code.

    `header`: what a JOB tells the nodes. `code`: the pickled functions if workers cannot import them. `reduce`: the
    user-defined reduce, if there is one.
    """

    key: Hashable
    header: dict[str, Any]
    code: bytes | None
    reduce: Reduce | None


class Sources:
    """The user code for `run`, and the source of the project modules that workers import.

    The epoch is a number that grows with each edit: `user_code` checks whether a file that was sent to workers has
    changed. When they get a new epoch, workers drop all project modules and load them again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # pickling a function may run user code
        self._sent: dict[str, tuple[int, int]] = {}  # path: (time of change, size)
        self._known: dict[tuple[str, str | None, Reduce | None], UserCode] = {}
        self._shadowing: list[str] | None = None
        self._epoch = 1

    def user_code(self, module: Any) -> UserCode:
        """Return the UserCode of a module with mapfunc(params, slice), or of a function f(params, slice).

        Raises TypeError, which names `module`, for anything else.
        """
        with self._lock:
            self._notice_edits()
            if isinstance(module, ModuleType):
                return self._from_module(module)
            if callable(module):
                return self._from_function(module)
        raise TypeError(
            f"module must be a module with mapfunc(params, slice), or a function f(params, slice), "
            f"not {module!r} ({type(module).__name__})"
        )

    def forget(self) -> None:
        """Look for every module again. Called after an import failed: the user may correct it."""
        with self._lock:
            self._next_epoch()

    def lookup(self, name: str) -> bytes:
        """Return what a worker needs to load a module, as msgpack: {"source", "path", "package"}, or None if the module
        does not belong to the user's project.
        """
        found = _find(name) if _is_name(name) else None
        if found is not None:
            path, stamp = found["path"], found.pop("stamp")
            if path:
                with self._lock:
                    self._sent[path] = stamp
        packed: bytes = msgpack.packb(found, unicode_errors="surrogatepass")
        return packed

    def _notice_edits(self) -> None:
        if any(_stamp(path) != stamp for path, stamp in self._sent.items()):
            self._next_epoch()

    def _next_epoch(self) -> None:
        self._sent.clear()
        self._known.clear()
        self._shadowing = None
        self._epoch += 1

    def _from_module(self, module: ModuleType) -> UserCode:
        mapfunc = getattr(module, "mapfunc", None)
        if not callable(mapfunc):
            raise TypeError(f"module: {module.__name__} has no function mapfunc(params, slice)")
        reduce = getattr(module, "reduce", None)
        if reduce is functools.reduce or not callable(reduce):  # the module has `from functools import reduce`
            reduce = None
        if not _has_source(module.__name__):
            return self._by_value(mapfunc, reduce)
        return self._by_name(module.__name__, None, reduce)

    def _from_function(self, function: Callable[..., Any]) -> UserCode:
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if isinstance(function, FunctionType) and module and _has_source(module) and _resolve(module, name) is function:
            return self._by_name(module, name, None)
        return self._by_value(function, None)

    def _by_value(self, mapfunc: Callable[..., Any], reduce: Reduce | None) -> UserCode:
        if "__mp_main__" in sys.modules:
            cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])
        try:
            code = cloudpickle.dumps((mapfunc, reduce))
        except Exception as error:  # pickling runs user code, which may raise anything
            name = getattr(mapfunc, "__name__", repr(mapfunc))
            raise TypeError(f"module: the function {name} cannot be sent to workers: {error}") from error
        digest = hashlib.sha256(code).hexdigest()[:32]
        header = {
            "epoch": self._epoch,
            "reduce": reduce is not None,
            "code": digest,
            "python": PYTHON if b"CodeType" in code else None,  # a builtin, for example, works in any version
            "shadows": self._shadows(),
        }
        return UserCode((self._epoch, digest), header, code, reduce)

    def _shadows(self) -> list[str]:
        """Names of standard library modules that are modules of the user's project here."""
        if self._shadowing is None:
            self._shadowing = [
                name for name in sys.stdlib_module_names & sys.modules.keys() if name not in _MAIN and _find(name)
            ]
        return self._shadowing

    def _by_name(self, module: str, function: str | None, reduce: Reduce | None) -> UserCode:
        known = self._known.get((module, function, reduce))
        if known is None:
            header = {
                "epoch": self._epoch,
                "module": module,
                "function": function,
                "reduce": reduce is not None,
                "shipped": _find(module) is not None,
                "code": None,
                "shadows": self._shadows(),
            }
            known = UserCode((self._epoch, module, function, reduce), header, None, reduce)
            self._known[module, function, reduce] = known
        return known


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def _has_source(name: str) -> bool:
    """Whether workers can import the module by name. False for a script, a notebook or a module made at run time."""
    if name in _MAIN or name not in sys.modules:
        return False
    spec = getattr(sys.modules[name], "__spec__", None)
    return spec is not None and (spec.has_location or spec.origin == "built-in")


def _resolve(module: str, name: str | None) -> Any:
    """Return the object that `name` refers to in the module; None if there is none."""
    if not name or "<" in name:
        return None
    try:
        return functools.reduce(getattr, name.split("."), sys.modules[module])
    except AttributeError:
        return None


def _is_name(name: str) -> bool:
    """Whether `name` can be a module name. A node sends it, so it must not be a path to some file."""
    return all(name.split(".")) and not any(mark in name for mark in "/\\:\0")


def _find(name: str) -> dict[str, Any] | None:
    """Find a module of the user's project without importing it; None if it is not one.

    The file's stamp is from before it was read, so that an edit during the reading is noticed later.
    """
    spec = _spec(name)
    if spec is None:
        return None
    package = spec.submodule_search_locations is not None
    if spec.origin is None or not spec.has_location:
        if package and _is_ours(name, list(spec.submodule_search_locations or ())):
            return {"source": b"", "path": "", "package": True, "stamp": None}
        return None
    if not _is_ours(name, [spec.origin]) or not spec.origin.endswith(".py"):
        return None
    stamp = _stamp(spec.origin)
    try:
        with open(spec.origin, "rb") as file:
            return {"source": file.read(), "path": spec.origin, "package": package, "stamp": stamp}
    except OSError:
        return None


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    loaded = getattr(sys.modules.get(name), "__spec__", None)
    if isinstance(loaded, importlib.machinery.ModuleSpec):
        return loaded
    parent, _, _ = name.rpartition(".")
    path = None
    if parent:
        above = _spec(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        path = list(above.submodule_search_locations)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(name, path) if find is not None else None
        if isinstance(spec, importlib.machinery.ModuleSpec):
            return spec
    return None


def _is_ours(name: str, paths: list[str]) -> bool:
    """Whether a module belongs to the user's project: it is neither in the standard library nor installed. qjam itself
    counts as part of the project, because user modules may import it.
    """
    if name.partition(".")[0] == "qjam":
        return True
    real = [os.path.join(os.path.realpath(path), "") for path in paths]
    return bool(real) and not any(
        path.startswith(_ENVIRONMENT) or any(part in path.split(os.sep) for part in _INSTALLED) for path in real
    )
