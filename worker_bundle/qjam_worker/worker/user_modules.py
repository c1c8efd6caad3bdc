"""Modules of the user's project, whose source the master sends when a worker imports them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, Callable, Optional

# Asks the master for a module by its full name: {"source": bytes, "path": str, "package": bool}, or None if it is not a
# module of the user's project.
Ask = Callable[[str], Optional[dict[str, Any]]]

_STANDARD = frozenset(getattr(sys, "stdlib_module_names", sys.builtin_module_names))


class ShippedModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finder and loader of the user's own modules. It comes first: a module of the project wins over one of that name
    on the host.

    It asks for a name only once, not for names of the standard library, and for submodules only if their package was
    shipped.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._found: dict[str, dict[str, Any]] = {}
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

    def forget(self, shadows: Iterable[str]) -> None:
        """Forget every shipped module, as their source has changed. `shadows`: names of the standard library that
        modules of the user's project have.
        """
        for name in self._found:
            sys.modules.pop(name, None)
        self._found.clear()
        self._absent.clear()
        self._shadows = frozenset(shadows)
        for name in self._shadows:
            sys.modules.pop(name, None)
        linecache.clearcache()

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if not self._may_be_shipped(fullname):
            return None
        module = self._ask(fullname)
        if module is None:
            self._absent.add(fullname)
            return None
        self._found[fullname] = module
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=module["path"], is_package=module["package"])
        spec.has_location = bool(module["path"])
        return spec

    def _may_be_shipped(self, fullname: str) -> bool:
        if fullname in self._absent:
            return False
        top = fullname.partition(".")[0]
        if fullname != top:
            return top in self._found
        return top == self._wanted or top not in _STANDARD or top in self._shadows

    def is_package(self, fullname: str) -> bool:
        return bool(self._found[fullname]["package"])

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._found[fullname]["source"])

    def get_code(self, fullname: str) -> Any:
        module = self._found[fullname]
        return compile(module["source"], module["path"] or f"<{fullname}>", "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.get_code(module.__name__), module.__dict__)
