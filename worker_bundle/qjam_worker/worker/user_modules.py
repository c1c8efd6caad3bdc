"""Modules of the user's project, whose source the master sends when a worker imports them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import reduce
from types import FunctionType, ModuleType
from typing import Any, Callable, Optional

import msgpack

from qjam_worker.values import functions, pickles

# What the master tells of a module, or of the files of a package. The node checks it.
FIELDS = {
    "source": bytes,
    "path": str,  # of the file on the master's machine; "" if there is none
    "package": bool,
    "folders": list,  # of a package: where its modules lie on the master's machine
    "tree": str,  # of a package at the top: the hash of its files
    "state": bytes,  # what was set on the module after it was loaded there; see set_state
    "refused": str,  # why the module cannot be sent
    "files": list,  # [path in the package, content]
}
Shipped = dict[str, Any]

# Asks the master for a module by its full name, or with "package/" for the files of a package; None if it is not the
# user's.
Ask = Callable[[str], Optional[Shipped]]

_STANDARD = frozenset(getattr(sys, "stdlib_module_names", sys.builtin_module_names))


class ShippedModules(importlib.abc.MetaPathFinder):
    """Finder of the user's own modules. It comes first: a module of the project wins over one of that name on the host.

    It asks for a name only once, not for names of the standard library, and for submodules only if their package was
    shipped. `here`: whether this is the master's machine, where files are read in place. Elsewhere the files of
    packages are laid into `folder`.
    """

    def __init__(self, ask: Ask, folder: str, here: bool) -> None:
        self._ask = ask
        self._folder = folder
        self._here = here
        self._bundle = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
        self._finders = b""
        self._found: dict[str, Shipped] = {}
        self._absent: set[str] = set()
        self._shadows: frozenset[str] = frozenset()
        self._wanted = ""

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def load(self, name: str) -> ModuleType:
        """Import a module that is the project's, as the master says, even if the host has another one of that name."""
        self._wanted = name.partition(".")[0]
        if self._wanted not in self._found:
            sys.modules.pop(self._wanted, None)
        return importlib.import_module(name)

    def begin(self, shadows: Iterable[str], here: dict[str, Any]) -> None:
        """Forget every shipped module, as something has changed. `shadows`: names of the standard library that modules
        of the user's project have. `here`: how the master finds modules, for its own machine.
        """
        for name, module in self._found.items():
            sys.modules.pop(name, None)
            linecache.cache.pop(_in_tracebacks(name, module), None)
        self._found.clear()
        self._absent.clear()
        self._shadows = frozenset(shadows)
        for name in self._shadows:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        if self._here:
            sys.path[:] = [*self._bundle, *(folder for folder in here["path"] if folder not in self._bundle)]
            self._add_finders(here["finders"])

    def _add_finders(self, pickled: bytes) -> None:
        """The finders of the user's own, after all others."""
        if pickled and pickled != self._finders:
            finders, hooks = pickles.loads(pickled)
            sys.meta_path += finders
            sys.path_hooks += hooks
            sys.path_importer_cache.clear()
            self._finders = pickled

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if not self._may_be_shipped(fullname):
            return None
        shipped = self._ask(fullname)
        if shipped is None:
            self._absent.add(fullname)
            return None
        if shipped["refused"]:
            return self._instead(fullname, path, shipped["refused"])
        self._found[fullname] = shipped
        folders = self._folders(fullname, path, shipped) if shipped["package"] else []
        if not shipped["path"] and not shipped["source"]:
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)  # a namespace
        else:
            file = self._file(fullname, path, shipped, folders)
            loader = _Loader(fullname, file, shipped)
            spec = importlib.machinery.ModuleSpec(fullname, loader, origin=file, is_package=shipped["package"])
            spec.has_location = bool(shipped["path"])
        if shipped["package"]:
            spec.submodule_search_locations = folders
        return spec

    def _may_be_shipped(self, fullname: str) -> bool:
        if fullname in self._absent:
            return False
        top = fullname.partition(".")[0]
        if fullname != top:
            return top in self._found
        return top == self._wanted or top not in _STANDARD or top in self._shadows

    def _instead(
        self, fullname: str, path: Optional[Sequence[str]], reason: str
    ) -> Optional[importlib.machinery.ModuleSpec]:
        """What this host has of that name, where the master's cannot be sent."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path)
            if spec is not None and spec.loader is not None and not self._is_placeholder(spec.origin or ""):
                return spec
        raise ImportError(reason, name=fullname)

    def _is_placeholder(self, file: str) -> bool:
        """Whether it is the empty file that stands for an extension module among the files of a package."""
        return file.startswith(self._folder) and file.endswith(".so")

    def _folders(self, fullname: str, path: Optional[Sequence[str]], shipped: Shipped) -> list[str]:
        """Where the modules and files of a package lie on this host: the project's, then those installed here."""
        if self._is_in_place(shipped):
            return list(shipped["folders"])
        parent, _, name = fullname.rpartition(".")
        if not parent:
            folders = [self._laid_out(fullname, shipped["tree"])] if shipped["tree"] else []
        else:
            folders = [os.path.join(folder, name) for folder in path or ()]
        if not shipped["path"]:
            installed = importlib.machinery.PathFinder.find_spec(fullname, path)
            if installed is not None and installed.loader is None:
                folders += [one for one in installed.submodule_search_locations or () if one not in folders]
        return folders

    def _is_in_place(self, shipped: Shipped) -> bool:
        """Whether files of the master's machine can be read where they are: not on another one, nor in a zip file."""
        return self._here and (os.path.isfile(shipped["path"]) if shipped["path"] else not shipped["source"])

    def _laid_out(self, package: str, tree: str) -> str:
        """The folder with the files of a package; the first worker of this host that needs it makes it."""
        place = os.path.join(self._folder, tree, package)
        if not os.path.isdir(place):
            shipped = self._ask(f"{package}/")
            os.makedirs(self._folder, exist_ok=True)
            fresh = tempfile.mkdtemp(dir=self._folder)
            for name, content in shipped["files"] if shipped is not None else ():
                file = os.path.join(fresh, package, name)
                os.makedirs(os.path.dirname(file), exist_ok=True)
                with open(file, "wb") as stream:
                    stream.write(content)
            os.makedirs(os.path.join(fresh, package), exist_ok=True)
            try:
                os.rename(fresh, os.path.join(self._folder, tree))
            except OSError:  # another worker was quicker
                shutil.rmtree(fresh)
        return place

    def _file(self, fullname: str, path: Optional[Sequence[str]], shipped: Shipped, folders: list[str]) -> str:
        """What __file__ says: a file of this host where there is one, or that of the master's machine."""
        original = shipped["path"] or f"<{fullname}>"
        if self._is_in_place(shipped):
            return str(original)
        for folder in folders[:1] if shipped["package"] else path or ():
            file = os.path.join(folder, os.path.basename(original))
            if os.path.isfile(file):
                return file
        return str(original)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one module from the source that the master has sent; the files beside it lie where `path` is."""

    def __init__(self, fullname: str, path: str, shipped: Shipped) -> None:
        super().__init__(fullname, path)
        self._shipped = shipped

    def is_package(self, fullname: str) -> bool:
        return bool(self._shipped["package"])

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._shipped["source"])

    def get_code(self, fullname: str) -> Any:
        name = _in_tracebacks(fullname, self._shipped)
        lines = self.get_source(fullname).splitlines(keepends=True)
        functions.keep_lines(name, lines)
        return compile(self._shipped["source"], name, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if self._shipped["state"]:
            set_state(module, self._shipped["state"])


def _in_tracebacks(fullname: str, shipped: Shipped) -> str:
    """The file that the user knows."""
    return shipped["path"] or f"<{fullname}>"


def set_state(module: ModuleType, packed: bytes) -> None:
    """Set what was set on the module at the master: {"python", "values": [path below the module, pickle or None]}.

    A pickle follows a letter: v for a value, f for the parts of a function whose globals are the module's. None: the
    name was deleted. `python`: the version that can read the pickles; None for any.
    """
    state = msgpack.unpackb(packed)
    check_python(state["python"], f"what was set on module {module.__name__} at the master")
    for path, data in state["values"]:
        *owners, name = path.split(".")
        owner: Any = reduce(getattr, owners, module)
        if data is None:
            delattr(owner, name)
        else:
            value = pickles.loads(memoryview(data)[1:])
            setattr(owner, name, value if data[:1] == b"v" else _function(module, *value))


def _function(
    module: ModuleType, code: Any, name: str, qualname: str, defaults: Any, kwdefaults: Any, attributes: dict[str, Any]
) -> FunctionType:
    function = FunctionType(code, vars(module), name, defaults)
    function.__qualname__, function.__kwdefaults__ = qualname, kwdefaults
    vars(function).update(attributes)
    return function


def check_python(python: Optional[str], what: str) -> None:
    """Raise RuntimeError if only another version of python can read the byte code that has come."""
    if python not in (None, functions.PYTHON):
        raise RuntimeError(
            f"{what} travels as byte code of python {python}, and this host has python {functions.PYTHON}: "
            "put it into a module, which travels as source"
        )
