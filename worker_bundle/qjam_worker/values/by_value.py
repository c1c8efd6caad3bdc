"""Pickles what the other end cannot import: classes, functions and modules of a script or notebook go by value.

cloudpickle does most of it. Added here: classes that are known by a key (see `definitions`), and what functions take
along (see `functions`).
"""

from __future__ import annotations

import enum
import functools
import hashlib
import io
import itertools
import pickle
import sys
import types
from collections.abc import Collection
from typing import Any, Callable, NamedTuple, Optional

import cloudpickle

from . import definitions, functions, pickles

# What a pickle has of a class: all of it; its key, and all of it beside, as it is now or as it was at first; its key.
_DEFINE, _REFER, _REFER_TO_FIRST, _NAME = range(4)
_MAX_CODES = 4096

_ages = itertools.count(1)


class Pickled(NamedTuple):
    """A pickle. `buffers`: its out-of-band buffers. `classes`: those that it defines. `has_code`: it holds byte code,
    which only one version of python can run.
    """

    data: bytes
    buffers: list[memoryview]
    classes: list[type]
    has_code: bool


def dumps(
    value: Any,
    *,
    lasting: bool = False,
    keep: Optional[Callable[[list[memoryview]], Optional[Callable[[pickle.PickleBuffer], bool]]]] = None,
) -> Pickled:
    """Pickle a value. The classes that it is made of are known at the other end, or come with it.

    `lasting`: they come as they were when they first came with a value that was to last. `keep`: makes what puts
    buffers into a list, or leaves them to the pickle; None: all of them leave it.
    """
    mode = _REFER_TO_FIRST if lasting else _REFER
    if keep is not None:
        kept: list[memoryview] = []
        made = _dump(value, mode, keep(kept))
        return made._replace(data=pickles.with_versions(made.data), buffers=kept)
    buffers: list[pickle.PickleBuffer] = []
    made = _dump(value, mode, buffers.append)
    return made._replace(data=pickles.with_versions(made.data), buffers=[buffer.raw() for buffer in buffers])


def dumps_code(value: Any, changed: Collection[int] = ()) -> Pickled:
    """Pickle functions, for the code of a job, and define the classes that they use.

    `changed`: ids of functions that go by value because others that import their names would get different ones.
    """
    made = _dump(value, _DEFINE, changed=changed)
    return made._replace(data=pickles.with_versions(made.data))


def _dump(
    value: Any, mode: int, take_buffer: Optional[Callable[[Any], Any]] = None, changed: Collection[int] = ()
) -> Pickled:
    if "__mp_main__" in sys.modules:
        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])
    file = io.BytesIO()
    pickler = _Pickler(file, mode, take_buffer, changed)
    pickler.dump(value)
    return Pickled(file.getvalue(), [], pickler.classes, pickler.has_code)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(
        self, file: io.BytesIO, mode: int, take_buffer: Optional[Callable[[Any], Any]], changed: Collection[int]
    ) -> None:
        super().__init__(file, 5, take_buffer)
        self.mode = mode
        self.changed = changed
        self.classes: list[type] = []
        self.has_code = False
        self.inner: set[int] = set()  # ids of code objects whose lines stand among those of an outer one
        self.pickles: dict[type, tuple[int, bytes]] = {}  # of classes: age, pickle

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind is types.CodeType:
            return self.reduce_code(value)
        if kind is types.FunctionType:
            if value in _OURS:
                return NotImplemented
            if id(value) in self.changed:
                return self._dynamic_function_reduce(value)
            reduced = super().reducer_override(value)
            by_value = reduced is not NotImplemented and functions.is_singledispatch(value)
            return functions.reduce_singledispatch(value) if by_value else reduced
        if issubclass(kind, type):
            return self.reduce_class(value)
        if kind is functions.CACHED and not _goes_by_name(value):
            return functions.reduce_cached(value)
        if issubclass(kind, functools.cached_property):
            return functions.reduce_cached_property(value)
        if kind is functions.Globals:
            return functions.globals_of, (value.get("__name__", ""), dict(value))
        if kind is types.ModuleType and sys.modules.get(value.__name__, value) is not value:
            return reduce_module(value)
        return NotImplemented

    def _dynamic_function_reduce(self, function: types.FunctionType) -> Any:
        if self.mode == _DEFINE:
            self.globals_ref.setdefault(id(function.__globals__), functions.Globals())
        return super()._dynamic_function_reduce(function)

    def reduce_class(self, cls: type) -> Any:
        definition = definitions.known(cls)
        if definition is not None and not definition.at_home and definitions.in_worker():
            return self.refer(cls, definition.age, definition.pickle)
        if definition is None or self.mode == _DEFINE:
            reduced = super().reducer_override(cls)
            if not isinstance(reduced, tuple) or len(reduced) != 6:  # others can import it
                return reduced
            if self.mode == _DEFINE:
                return self.define(cls, *reduced)
        if self.mode == _REFER_TO_FIRST:
            first = definitions.define(cls).first or definitions.lasts(cls, *self.pickled(cls))
            return self.refer(cls, *first)
        return self.refer(cls, *self.pickled(cls)) if self.mode == _REFER else self.refer(cls, 0, None)

    def define(self, cls: type, make: Any, arguments: Any, state: Any, _: None, __: None, set_state: Any) -> Any:
        """The class within the pickle, with the globals of the functions beside it."""
        self.classes.append(cls)
        attributes = {
            name: item
            for name, item in state[0].items()
            if type(item) is not types.MemberDescriptorType and name != "__slotnames__"  # copyreg's, once it has looked
        }
        if not issubclass(cls, enum.Enum):
            kind, name, bases, namespace, *rest = arguments
            # A NamedTuple needs its module and takes no slots; before 3.1 cloudpickle does otherwise.
            namespace = {"__module__": cls.__module__, **namespace}
            namespace.pop("__slots__", None)
            if vars(cls).get("__slots__"):  # only what is made with slots has them
                namespace["__slots__"] = vars(cls)["__slots__"]
                attributes.pop("__slots__", None)
            arguments = (kind, name, bases, namespace, *rest)
        skeleton = (definitions.define(cls).key, make, arguments)
        return definitions.skeleton, skeleton, (set_state, (attributes, state[1])), None, None, fill

    def refer(self, cls: type, age: int, pickle: Optional[bytes]) -> Any:
        """Its key, and a pickle of its own for those who lack it."""
        if self.mode == _NAME:
            age, pickle = 0, None
        return definitions.class_known_as, (definitions.define(cls).key, cls.__qualname__, age, pickle)

    def pickled(self, cls: type) -> tuple[int, bytes]:
        """The age and the pickle of a class, which has all classes that it uses."""
        if cls not in self.pickles:
            definition = definitions.define(cls)
            made = _dump(cls, _DEFINE)
            digest = hashlib.sha256(made.data).digest()
            if digest != definition.digest:
                definition.digest, definition.age = digest, next(_ages)
            self.pickles.update(dict.fromkeys(made.classes, (definition.age, pickles.with_versions(made.data))))
        return self.pickles[cls]

    def reduce_code(self, code: types.CodeType) -> Any:
        self.has_code = True
        found = _codes.get(id(code))
        if found is None:
            if len(_codes) >= _MAX_CODES:
                _codes.clear()
            arguments = self.dispatch_table[types.CodeType](code)[1]
            found = (code, arguments, functions.cell(code.co_filename), functions.source_lines(code))
            _codes[id(code)] = found
        self.inner.update([id(item) for item in code.co_consts if type(item) is types.CodeType])
        _, arguments, cell, lines = found
        lines = "" if id(code) in self.inner else lines
        return functions.code, (arguments, code.co_filename, cell, code.co_firstlineno, lines, functions.PYTHON)


_codes: dict[
    int, tuple[types.CodeType, Any, str, str]
] = {}  # by id: the code, which keeps the id its own, and its parts


def reduce_module(module: types.ModuleType) -> Any:
    """Of a module whose name another one has by now: a module that holds the same."""
    state = {name: item for name, item in vars(module).items() if not name.startswith("__")}
    return types.ModuleType, (module.__name__, module.__doc__), state


def _goes_by_name(value: Any) -> bool:
    """Whether a wrapper is found under its name in a module that others can import."""
    module = sys.modules.get(getattr(value, "__module__", ""))
    if module is None or module.__name__ in (*pickles.MAIN, *cloudpickle.list_registry_pickle_by_value()):
        return False
    try:
        found: Any = functools.reduce(getattr, value.__qualname__.split("."), module)
    except AttributeError:
        return False
    return found is value


def fill(cls: type, state: tuple[Callable[[type, Any], Any], tuple[dict[str, Any], Any]]) -> None:
    """Give a copy the attributes that its class has at home: code in any case, data if one of these has changed."""
    set_state, (attributes, slots) = state
    data = {name: item for name, item in attributes.items() if not isinstance(item, functions.KINDS)}
    try:
        digest = hashlib.sha256(_dump(data, _NAME).data).digest()
    except Exception:  # noqa: BLE001  a class of the user's may raise anything: the data count as changed
        digest = None
    set_state(cls, (definitions.renewed(cls, attributes, data, digest), slots))


_OURS = {definitions.skeleton, definitions.class_known_as, fill, functions.code}  # what pickles call most
