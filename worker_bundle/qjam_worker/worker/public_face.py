"""What answers to the name `qjam` in a worker: `current_task` is here, all else is in the qjam that the master sends.

User code asks for `current_task` inside mapfunc, on hosts where qjam is not installed. User modules have
`from qjam import DataSet, Master` at their top: such a name loads the real package, which answers to the name from then
on.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Callable, Optional

from qjam_worker.task import Task, current_task

NAME = "qjam"


class StandIn(ModuleType):
    """The module `qjam` until something of it is wanted that is not here; `load` then gives the real one."""

    def __init__(self, load: Callable[[], ModuleType]) -> None:
        super().__init__(NAME)
        self.Task, self.current_task = Task, current_task
        self._load = load

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # python asks modules for __wrapped__, __file__ and the like
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        return getattr(self._load(), name)


class PublicFace(MetaPathFinder, Loader):
    """Finds the stand-in; loads the real package when one of its modules is imported."""

    def __init__(self) -> None:
        self._steps_aside = False

    def install(self) -> None:
        """Come before all other finders."""
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if fullname == NAME:
            return None if self._steps_aside else ModuleSpec(fullname, self, is_package=True)
        if fullname.startswith(f"{NAME}.") and isinstance(sys.modules.get(NAME), StandIn):
            self._load_real()
            # It may have imported this one. While that stands in sys.modules, python would execute it once more.
            loaded = sys.modules.pop(fullname, None)
            return importlib.util.find_spec(fullname) if loaded is None else ModuleSpec(fullname, _Loaded(loaded))
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(self._load_real)

    def exec_module(self, module: ModuleType) -> None: ...

    def _load_real(self) -> ModuleType:
        """The real qjam. When it cannot be imported, this raises what that raises, and the stand-in remains."""
        stand_in = sys.modules.get(NAME)
        if not isinstance(stand_in, StandIn):
            return importlib.import_module(NAME)
        self._steps_aside = True
        del sys.modules[NAME]
        try:
            return importlib.import_module(NAME)
        except BaseException:
            sys.modules[NAME] = stand_in
            raise
        finally:
            self._steps_aside = False


class _Loaded(Loader):
    """Gives a module that is loaded already, as it is."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
