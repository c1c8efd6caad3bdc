"""The user code of jobs: mapfunc and reduce, from the user's modules or from a pickle."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Hashable
from typing import Any, Callable, NamedTuple, Optional

from qjam_worker.values import definitions
from qjam_worker.values.header import Buffer

from .application import Code, MapFunction, Reduce, applied
from .user_modules import ShippedModules, check_python

# mapfunc, reduce, and keys of the classes that have come with them.
Loaded = tuple[MapFunction, Optional[Reduce], frozenset[str]]


class Job(NamedTuple):
    """What to map with: the entry that names the code, the file of its pickle if there is one; the name that the master
    has for this host; `function` is equal for jobs that map the same code.
    """

    entry: dict[str, Any]
    code: Optional[tuple[str, int]]  # path and size
    host: str
    function: Hashable

    @classmethod
    def described(cls, message: dict[str, Any]) -> Job:
        """As the node describes it."""
        entry = message["entry"]
        function = entry["epoch"], entry["code"], entry.get("module"), entry.get("function")
        return cls(entry, message["code"], message["host"], function)


class CodeLoader:
    """Loads the code of a job when it is first needed. `map_file` maps a file of so many bytes."""

    def __init__(self, modules: ShippedModules, map_file: Callable[[str, int], memoryview]) -> None:
        self.jobs: dict[int, Job] = {}
        self.epoch = 0  # of the user's modules that are loaded
        self._codes: dict[int, Code] = {}
        self._modules = modules
        self._map_file = map_file
        self._pid = os.getpid()

    def forget(self, number: int) -> None:
        """Nobody needs the job any more."""
        self.jobs.pop(number, None)
        self._codes.pop(number, None)

    def code(self, number: int) -> Code:
        """The functions of a job; importing user code may raise anything."""
        code = self._codes.get(number) or self._load(number, self.jobs[number])
        definitions.settle(code.classes)
        return code

    def function(self, entry: dict[str, Any], code: Optional[Buffer]) -> tuple[Callable[..., Any], frozenset[str]]:
        """A function that is called as it is, and keys of the classes that have come with it."""
        function, _, classes = self._functions(entry, None if code is None else lambda: code)
        return function, classes

    def _load(self, number: int, job: Job) -> Code:
        place = job.code
        mapfunc, reduce, classes = self._functions(job.entry, None if place is None else lambda: self._map_file(*place))
        reduce = None if reduce is None else self._guarded(reduce)
        code = self._codes[number] = applied(self._guarded(mapfunc), reduce, job.entry)._replace(classes=classes)
        return code

    def _functions(self, entry: dict[str, Any], code: Optional[Callable[[], Buffer]]) -> Loaded:
        if entry["epoch"] != self.epoch:
            self._modules.begin(entry["shadows"], entry["here"])
            self.epoch = entry["epoch"]
        loaded = self._by_name(entry) if code is None else self._by_value(entry, code())
        self._stay_the_worker()
        return loaded

    def _by_value(self, entry: dict[str, Any], code: Buffer) -> Loaded:
        check_python(entry["python"], "this function")
        (mapfunc, reduce), classes = definitions.load_code(code)
        return mapfunc, reduce, classes

    def _by_name(self, entry: dict[str, Any]) -> Loaded:
        load: Callable[[str], Any] = self._modules.load if entry["shipped"] else importlib.import_module
        module = load(entry["module"])
        if entry["function"] is not None:
            return functools.reduce(getattr, entry["function"].split("."), module), None, frozenset()
        return module.mapfunc, getattr(module, "reduce", None) if entry["reduce"] else None, frozenset()

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A child process that user code has forked may return from it, but must not answer in its parent's place."""

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            self._stay_the_worker()
            return result

        return call

    def _stay_the_worker(self) -> None:
        if os.getpid() != self._pid:
            os._exit(0)
