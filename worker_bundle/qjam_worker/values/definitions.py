"""The classes that travel by value, because the other end cannot import them, as those of a script.

A class has one home, the process that made it. All others hold copies, known by the key that its home gave it. Its home
takes nothing back: what comes there is the class itself, as it is now. A copy is changed only when its home has changed
the class, so that what user code keeps on it lasts.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Callable, Optional

from . import pickles
from .header import Buffer

_MAX_KEPT = 1024  # copies that are kept though nothing refers to them, with the state that user code keeps on them


class Definition:
    """What this process knows of a class that travels by value.

    `at_home`: it was made here. `pickle`: the class as it came, None where whoever needs it has it with the code of a
    job; `age`: a number that grows with each change of the pickle; `digest`: of the pickle that was made last.
    """

    __slots__ = ("age", "at_home", "data", "digest", "first", "key", "names", "pickle", "vars")

    def __init__(self, key: str, at_home: bool) -> None:
        self.key = key
        self.at_home = at_home
        self.pickle: Optional[bytes] = None
        self.age = 0
        self.digest: Optional[bytes] = None
        self.first: Optional[tuple[int, bytes]] = None  # age and pickle that come with values that are to last
        self.vars: dict[str, Any] = {}  # attributes at that time
        self.data: Optional[bytes] = None  # a digest of the attributes that are data, as they came
        self.names: frozenset[str] = frozenset()  # of all attributes that came


class _Loading(threading.local):
    """What this thread is loading: the pickle of a class, or the code of a job; and the keys of what it defines."""

    pickle: Optional[bytes] = None
    age = 0
    keys: frozenset[str] = frozenset()


_definitions: weakref.WeakKeyDictionary[type, Definition] = weakref.WeakKeyDictionary()
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_kept: OrderedDict[str, type] = OrderedDict()
_lasting: weakref.WeakSet[type] = weakref.WeakSet()
_lock = threading.RLock()
_loading = _Loading()
_settled: Optional[frozenset[str]] = None  # in a worker: keys of the classes that the code of its job has brought


def known(cls: type) -> Optional[Definition]:
    """The definition of a class that has travelled before."""
    return _definitions.get(cls)


def define(cls: type) -> Definition:
    """The definition of a class that travels by value; one that has not travelled before is at home here."""
    with _lock:
        return _definitions.get(cls) or _enter(cls, Definition(uuid.uuid4().hex, at_home=True))


def _enter(cls: type, definition: Definition) -> Definition:
    _definitions[cls] = definition
    _classes[definition.key] = cls
    return definition


def lasts(cls: type, age: int, pickle: bytes) -> tuple[int, bytes]:
    """The class has come with a value that is to last, and with later ones comes as it is now: its age and pickle."""
    definition = define(cls)
    definition.first, definition.vars = (age, pickle), dict(vars(cls))
    _lasting.add(cls)
    return definition.first


def changed() -> list[type]:
    """The classes that have come with values that are to last, and have other attributes now."""
    return [cls for cls in _lasting if not _same(vars(cls), _definitions[cls].vars)] if _lasting else []


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return now.keys() == before.keys() and all(map(operator.is_, now.values(), before.values()))


def in_worker() -> bool:
    """Whether this process passes classes on as they came to it."""
    return _settled is not None


def load_code(data: Buffer) -> tuple[Any, frozenset[str]]:
    """What was pickled as the code of a job, and the keys of the classes that it defines."""
    with _load(None, 0):
        return pickles.loads(data), _loading.keys


def settle(keys: frozenset[str]) -> None:
    """A job runs whose code has defined these classes. Values that are made of them do not define them again."""
    global _settled
    _settled = keys


@contextlib.contextmanager
def _load(pickle: Optional[bytes], age: int) -> Iterator[None]:
    before = _loading.pickle, _loading.age, _loading.keys
    _loading.pickle, _loading.age, _loading.keys = pickle, age, frozenset()
    try:
        yield
    finally:
        _loading.pickle, _loading.age, _loading.keys = before


# What the pickles call


def class_known_as(key: str, name: str, age: int, pickle: Optional[bytes]) -> type:
    """The class with that key, which a value is made of; defined by its pickle where this process lacks it."""
    cls = _classes.get(key)
    definition = None if cls is None else _definitions[cls]
    if definition is None or not (definition.at_home or definition.age >= age or key in (_settled or ())):
        if pickle is None:
            raise LookupError(f"the class {name} is not known here")
        with _load(pickle, age):
            cls = pickles.loads(pickle)
    assert cls is not None
    if not _definitions[cls].at_home:
        _keep(key, cls)
    return cls


def skeleton(key: str, make: Callable[..., type], arguments: Iterable[Any]) -> type:
    """The class with that key, without attributes yet if this process lacks it."""
    with _lock:
        cls = _classes.get(key)
        if cls is None:
            cls = make(*arguments)
            _enter(cls, Definition(key, at_home=False))
    _loading.keys |= {key}
    return cls


def renewed(cls: type, attributes: dict[str, Any], data: dict[str, Any], digest: Optional[bytes]) -> dict[str, Any]:
    """Those of the attributes that came, some of them data with this digest, which a copy is to be given."""
    definition = _definitions[cls]
    if definition.at_home:
        return {}
    for name in definition.names - attributes.keys():
        with contextlib.suppress(AttributeError, TypeError):
            delattr(cls, name)
    same = digest is not None and digest == definition.data
    definition.names, definition.data = frozenset(attributes), digest
    if _loading.pickle is not None:
        definition.pickle, definition.age = _loading.pickle, _loading.age
    _keep(definition.key, cls)
    return {name: item for name, item in attributes.items() if not same or name not in data}


def _keep(key: str, cls: type) -> None:
    with _lock:
        _kept[key] = cls
        _kept.move_to_end(key)
        while len(_kept) > _MAX_KEPT:
            _kept.popitem(last=False)
