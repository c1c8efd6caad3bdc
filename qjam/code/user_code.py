"""Describes a user's module or function so that workers can load it, and what they need of the modules it imports."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import logging
import operator
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import msgpack

from qjam.log import say
from qjam_worker.values import by_value
from qjam_worker.values.functions import PYTHON

from . import project
from .loaded import Loaded, loaded, observe_imports, patched_from_file
from .state import Watch, state_of

Reduce = Callable[[Any, Any], Any]

_MAIN = ("__main__", "__mp_main__")  # __mp_main__: the script in a child that multiprocessing spawned
LARGE = 100_000_000  # bytes of code or params from which on the user is told of a better way
_OFTEN = 5  # times that the state of a module changes between rounds before the user is told what this costs

observe_imports()


class UserCode(NamedTuple):
    """Code to map with. Equal keys mean equal code.

    `header`: what a JOB tells the nodes. `code`: the pickled functions if workers cannot import them. `reduce`: the
    user-defined reduce, if there is one. `classes`: those that the pickle defines, which results may be made of.
    """

    key: Hashable
    header: dict[str, Any]
    code: bytes | None
    reduce: Reduce | None
    classes: Sequence[type] = ()

    def collecting(self, each: int | None = None) -> UserCode:
        """The same code, whose results come in a list: one for each slice. `each`: it is called with the items of a
        slice, each slice but the last has so many, and there is one result for each item.
        """
        header = {**self.header, "reduce": False, "collect": True, **({} if each is None else {"each": each})}
        return UserCode((self.key, "collect", each), header, self.code, operator.concat)


class _Sent:
    """What workers know of a module, and how to see that it is out of date."""

    def __init__(self, name: str, module: ModuleType | None, known: Loaded | None, found: project.Found) -> None:
        self.name, self.module, self.known, self.found = name, module, known, found
        self.watch = Watch(module) if module is not None and known is not None else None

    def is_current(self) -> bool:
        """Whether the module here, if it is loaded, still is the one that was sent."""
        here = sys.modules.get(self.name)
        if here is None:  # nor was it loaded then; or it was taken out, and its functions are still used
            return True
        if here is not self.module or (self.known is not None and loaded(here) is not self.known):
            return False
        return self.watch is None or self.watch.is_unchanged()

    def is_on_disk(self) -> bool:
        """Whether the file, too, is as before, where that counts: where the module is not loaded here, and where the
        loaded one has become what its file is now, without a reload. If only the file has changed, the user is told.
        """
        stamp = project.stamp(self.found.path)
        if self.module is None or self.known is None:
            return stamp == self.found.stamp
        if stamp == self.known.seen:
            return True
        self.known.seen = stamp
        if patched_from_file(self.module):
            return False
        say(
            f"{self.found.path} has changed on disk since {self.name} was loaded here. Workers run it as it is loaded; "
            f"importlib.reload({self.name}) takes the file as it is now"
        )
        return True


class Sources:
    """The user code for `run`, and the project modules that workers import.

    What runs on workers is what is loaded here: source as it was when it was loaded, and state that was set since. The
    epoch is a number that grows whenever something that was sent is out of date. When they get a new epoch, workers
    drop all project modules and load them again. `ship`: installed packages that count as the project's.
    """

    def __init__(
        self,
        ship: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        project.check_shippable(ship)
        self._ship = frozenset(ship)
        self._lock = threading.RLock()  # pickling a function may run user code
        self._sent: dict[str, _Sent] = {}
        self._trees: dict[str, project.Tree] = {}
        self._missing: set[str] = set()  # modules that were not found,
        self._searched: dict[str, project.Stamp] = {}  # and the folders where they could appear
        self._known: dict[tuple[str, str | None, Reduce | None], UserCode] = {}
        self._imports = _import_system()
        self._surroundings: dict[str, Any] | None = None
        self._told: set[str] = set()
        self._changes = 0
        self._clock, self._cpu_clock = clock, cpu_clock
        self._look_again = 0.0
        self._epoch = 1

    def epoch(self) -> int:
        """The epoch that user code has now: another one whenever a module that was sent has changed."""
        with self._lock:
            self._notice_changes()
            return self._epoch

    def user_code(self, module: Any, reduce: Reduce | None = None) -> UserCode:
        """Return the UserCode of a module with mapfunc(params, slice), or of a function f(params, slice).

        `reduce`: what is called in place of the module's reduce.

        Raises TypeError, which names `module`, for anything else.
        """
        with self._lock:
            self._notice_changes()
            if isinstance(module, ModuleType):
                return self._from_module(module, reduce)
            if callable(module):
                return self._from_function(module) if reduce is None else self._by_value(module, reduce)
        raise TypeError(
            f"module must be a module with mapfunc(params, slice), or a function f(params, slice), "
            f"not {module!r} ({type(module).__name__})"
        )

    def forget(self) -> None:
        """Look for every module again. Called after an import failed: the user may correct it."""
        with self._lock:
            self._next_epoch()

    def hint(self, name: str) -> str:
        """Return what to do about a module that a host lacks; "" if it is not here either."""
        top = name.partition(".")[0]
        with self._lock:
            spec = project.spec_of(top)
            if spec is None or project.belongs(spec, self._ship):
                return ""
        ship = f', or, if {top} is a package of your own, send it: Master(..., ship=["{top}"])'
        return (
            f"; {top} is installed here and not on that host. Install it there, or name a python that has it: "
            f"HostSpec(python=...){ship if project.is_pure(spec) else ''}"
        )

    def lookup(self, name: str) -> bytes:
        """Return what a worker needs to load a module, as msgpack: a dict (user_modules.Shipped), or None if the module
        does not belong to the user's project. For "package/" the files of that package.
        """
        with self._lock:
            if name.endswith("/"):
                tree = self._trees.get(name[:-1])
                found = None if tree is None else _described(files=list(tree.contents()))
            else:
                found = self._found(name) if _is_name(name) else None
        packed: bytes = msgpack.packb(found, unicode_errors="surrogatepass")
        return packed

    # What is sent

    def _found(self, name: str) -> dict[str, Any] | None:
        spec = project.spec_of(name)
        if spec is None:
            self._is_missing(name)
            return None
        if not project.belongs(spec, self._ship):
            return None
        try:
            return self._described(name, spec)
        except OSError as error:
            return _described(refused=f"{name}: {error}")

    def _described(self, name: str, spec: importlib.machinery.ModuleSpec) -> dict[str, Any]:
        module = sys.modules.get(name)
        observed = name.partition(".")[0] != "qjam" and module is not None
        known = loaded(module, self._ship) if observed and module is not None else None
        found = known.found if known is not None else project.read(spec)
        if observed and known is None:
            self._tell(f"{found.path} changed after {name} was loaded and before qjam was; workers run the file")
        state = b"" if module is None or known is None else self._state(module, known)
        if found.source is None:
            return _described(
                refused=f"{name} is {_kind(found.path)} for this machine's python and cannot be sent: {found.path}. "
                "Install it on the host, for the python that runs there; HostSpec(python=...) names another one"
            )
        self._sent[name] = _Sent(name, module, known, found)
        tree = self._tree(name, spec).digest if found.package and "." not in name and name != "qjam" else ""
        return _described(found.source, found.path, found.package, found.folders, tree, state)

    def _state(self, module: ModuleType, known: Loaded) -> bytes:
        name = module.__name__
        state, stays = state_of(module, known.baseline)
        if known.found.source is None:
            stays = [(path, f"{name} has no source") for path, _ in known.baseline.changes(module, name)]
        for path, why in stays:
            self._tell(
                f"{name}.{path} was set here after {name} was loaded, and cannot be sent to workers: {why}. They have "
                f"what {name} sets when it is imported"
            )
        return state

    def _tree(self, name: str, spec: importlib.machinery.ModuleSpec) -> project.Tree:
        if name not in self._trees:
            tree = self._trees[name] = project.tree(spec)
            if tree.left_out:
                self._tell(
                    f"package {name}: hosts get no more than {project.MAX_DATA:,} bytes of package data, and so not "
                    f"{', '.join(tree.left_out[:5])}"
                )
        return self._trees[name]

    def _is_missing(self, name: str) -> None:
        self._missing.add(name)
        above = project.spec_of(name.rpartition(".")[0]) if "." in name else None
        folders = sys.path if above is None else list(above.submodule_search_locations or ())
        for folder in folders:
            self._searched.setdefault(folder or ".", project.stamp(folder or "."))

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            say(text)

    # What is out of date

    def _notice_changes(self) -> None:
        changed = next((sent for sent in self._sent.values() if not sent.is_current()), None)
        if changed is not None and changed.watch is not None:
            self._count_changes(changed.name)
        if changed is not None or (sys.path, sys.meta_path, sys.path_hooks) != self._imports or not self._is_on_disk():
            self._next_epoch()

    def _is_on_disk(self) -> bool:
        """Whether all that comes from files is as before. Looked at so seldom that it takes a fiftieth of the time."""
        now = self._clock()
        if now < self._look_again:
            return True
        began = self._cpu_clock()
        same = all(sent.is_on_disk() for sent in self._sent.values()) and not self._has_appeared()
        self._look_again = now + 50 * (self._cpu_clock() - began)
        return same

    def _has_appeared(self) -> bool:
        """Whether a module that was missing can be found now."""
        changed = [folder for folder, stamp in self._searched.items() if project.stamp(folder) != stamp]
        if not changed:
            return False
        self._searched.update((folder, project.stamp(folder)) for folder in changed)
        importlib.invalidate_caches()
        return any(project.spec_of(name) is not None for name in self._missing)

    def _count_changes(self, name: str) -> None:
        self._changes += 1
        if self._changes == _OFTEN:
            say(
                f"module {name} changes from round to round here, so workers load it anew each time; what changes goes "
                "faster in params",
                logging.INFO,
            )

    def _next_epoch(self) -> None:
        self._sent.clear()
        self._trees.clear()
        self._known.clear()
        self._missing.clear()
        self._searched.clear()
        self._surroundings = None
        self._imports = _import_system()
        self._epoch += 1

    # Jobs

    def _from_module(self, module: ModuleType, other_reduce: Reduce | None) -> UserCode:
        mapfunc = getattr(module, "mapfunc", None)
        if not callable(mapfunc):
            raise TypeError(f"module: {module.__name__} has no function mapfunc(params, slice)")
        if other_reduce is not None:
            return self._by_value(mapfunc, other_reduce)
        reduce = getattr(module, "reduce", None)
        if reduce is functools.reduce or not callable(reduce):  # the module has `from functools import reduce`
            reduce = None
        if not _is_importable(module):
            return self._by_value(mapfunc, reduce)
        return self._by_name(module.__name__, None, reduce)

    def _from_function(self, function: Callable[..., Any]) -> UserCode:
        name = getattr(function, "__qualname__", None)
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        if isinstance(function, FunctionType) and _is_importable(module) and _resolve(module, name) is function:
            return self._by_name(function.__module__, name, None)
        return self._by_value(function, None)

    def _by_value(self, mapfunc: Callable[..., Any], reduce: Reduce | None) -> UserCode:
        try:
            pickled = by_value.dumps_code((mapfunc, reduce))
        except Exception as error:  # pickling runs user code, which may raise anything
            name = getattr(mapfunc, "__name__", repr(mapfunc))
            raise TypeError(f"module: the function {name} cannot be sent to workers: {error}") from error
        if len(pickled.data) > LARGE:
            self._tell(
                f"the function {getattr(mapfunc, '__qualname__', repr(mapfunc))} carries more than {LARGE // 10**6} MB "
                "in its closure, defaults or globals, which are pickled at every call, and sent again when one has "
                "changed: make them a DataSet, which is sent once, or let a module load them on the workers"
            )
        digest = hashlib.sha256(pickled.data).hexdigest()[:32]
        header = {
            **self._common(),
            "reduce": reduce is not None,
            "code": digest,
            "python": PYTHON if pickled.has_code else None,  # a builtin, for example, works in any version
        }
        return UserCode((self._epoch, digest), header, pickled.data, reduce, pickled.classes)

    def _by_name(self, module: str, function: str | None, reduce: Reduce | None) -> UserCode:
        known = self._known.get((module, function, reduce))
        if known is None:
            spec = project.spec_of(module)
            header = {
                **self._common(),
                "module": module,
                "function": function,
                "reduce": reduce is not None,
                "shipped": spec is not None and project.belongs(spec, self._ship),
                "code": None,
            }
            known = UserCode((self._epoch, module, function, reduce), header, None, reduce)
            self._known[module, function, reduce] = known
        return known

    def _common(self) -> dict[str, Any]:
        """What all jobs of an epoch have in common. `here`: how this machine's workers find modules."""
        if self._surroundings is None:
            here = {"path": [os.path.abspath(folder) for folder in sys.path], "finders": self._finders()}
            shadows = project.standard_names_of_the_project(self._ship)
            self._surroundings = {"epoch": self._epoch, "shadows": shadows, "here": here}
        return self._surroundings

    def _finders(self) -> bytes:
        """The user's own finders and path hooks, pickled; b"" if there are none."""
        finders, hooks = project.own_finders()
        if not finders and not hooks:
            return b""
        try:
            return by_value.dumps_code((finders, hooks)).data
        except Exception as error:  # noqa: BLE001  a user's __reduce__ may raise anything
            self._tell(f"workers cannot use the finders of sys.meta_path and sys.path_hooks: {error}")
            return b""


def _import_system() -> tuple[list[Any], ...]:
    return list(sys.path), list(sys.meta_path), list(sys.path_hooks)


def _described(
    source: bytes = b"",
    path: str = "",
    package: bool = False,
    folders: Collection[str] = (),
    tree: str = "",
    state: bytes = b"",
    refused: str = "",
    files: Collection[tuple[str, bytes]] = (),
) -> dict[str, Any]:
    return {
        "source": source,
        "path": path,
        "package": package,
        "folders": list(folders),
        "tree": tree,
        "state": state,
        "refused": refused,
        "files": list(files),
    }


def _kind(path: str) -> str:
    return "an extension module" if project.is_extension(path) else "byte code without source"


def _is_importable(module: ModuleType | None) -> bool:
    """Whether workers can import just this module by its name. False for a script, a notebook, a module made at run
    time, and for one whose name another module has by now.
    """
    if module is None or module.__name__ in _MAIN or sys.modules.get(module.__name__) is not module:
        return False
    spec = getattr(module, "__spec__", None)
    return spec is not None and (spec.has_location or spec.origin == "built-in" or project.has_source(spec))


def _resolve(module: ModuleType | None, name: str | None) -> Any:
    """Return the object that `name` refers to in the module; None if there is none."""
    if not name or "<" in name:
        return None
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        return None


def _is_name(name: str) -> bool:
    """Whether `name` can be a module name. A node sends it, so it must not be a path to some file."""
    return all(name.split(".")) and not any(mark in name for mark in "/\\:\0")
