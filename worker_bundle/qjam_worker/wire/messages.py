"""What a message may say: its kinds, the header and the number of buffers of each, and whether a header is one."""

from __future__ import annotations

import enum
import reprlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

from .refs import Ref, is_ref

MAX_BUFFERS = 65536


class WireError(ValueError):
    """Frames that are not a message of this protocol version, or a header that cannot be one."""


class Kind(enum.IntEnum):
    """What a message is; the number is what stands on the wire."""

    HELLO = 1
    WELCOME = 2
    JOB = 3
    TASK = 4
    STATE = 5
    REFS = 6
    CREDIT = 7
    RESULT = 8
    ERROR = 9
    CANCEL = 10
    LOG = 11
    PING = 12
    PONG = 13
    BYE = 14
    SHARE = 15
    RELEASE = 16
    DATA = 17
    CALLS = 18
    RETURNS = 19
    RECALL = 20
    GET = 21
    FORGET = 22


MAX_INT = 1 << 53  # no whole number that counts something is as large
MAX_SLICES = 1 << 20  # of a data set
MAX_WORKERS = 1 << 16  # of a node
MAX_TEXT = 1 << 20  # characters; a traceback is cut at a quarter of that
MAX_NAME = 4096  # of a ref, a node, a module
MAX_REASON = 8192  # characters of why a node leaves, or of a note to the user, that are passed on
# An attempt at a slice is late when it takes this many times as long as is typical; master and nodes go by it.
LATE = 2.0


class Field(NamedTuple):
    """What a field may hold: values of exactly these types (True is no int here) that pass the test."""

    types: frozenset[type]
    test: Callable[[Any], bool]
    wanted: str  # the same in words
    needed: bool = True

    def fits(self, value: Any) -> bool:
        return type(value) in self.types and self.test(value)


_LISTS = frozenset([list, tuple])  # a sender may give a tuple where the receiver finds a list
_INTS: frozenset[type] = frozenset([int])
_STRS: frozenset[type] = frozenset([str])


def _one(wanted: str, test: Callable[[Any], bool], *types: type) -> Field:
    return Field(frozenset(types), test, wanted)


def _many(wanted: str, test: Callable[[Any], bool]) -> Field:
    return Field(_LISTS, test, wanted)


def _some(wanted: str, test: Callable[[Any], bool]) -> Field:
    return Field(_LISTS, lambda items: bool(items) and test(items), f"{wanted}, not empty")


def _or_none(field: Field) -> Field:
    test = field.test
    return Field(field.types | {type(None)}, lambda value: value is None or test(value), f"{field.wanted} or None")


def _optional(field: Field) -> Field:
    return field._replace(needed=False)


def _are_counts(items: Sequence[Any]) -> bool:
    return not items or (_INTS.issuperset(map(type, items)) and min(items) >= 0)


def _are_workers(items: Sequence[Any]) -> bool:
    return len(items) <= MAX_WORKERS and _are_counts(items)


def _are_names(items: Sequence[Any]) -> bool:
    return _STRS.issuperset(map(type, items)) and max(map(len, items), default=0) <= MAX_NAME


def _columns(items: Sequence[Any], count: int) -> Sequence[Sequence[Any]] | None:
    """Rows of `count` items as columns; None for what are no such rows."""
    if not _LISTS.issuperset(map(type, items)) or {count}.symmetric_difference(map(len, items)):
        return None
    return list(zip(*items))


def _are_slices(items: Sequence[Any]) -> bool:
    columns = _columns(items, 2)
    return columns is not None and _are_counts(columns[0]) and _are_names(columns[1])


def _are_parts_of_refs(items: Sequence[Any]) -> bool:
    columns = _columns(items, 3)
    if columns is None:
        return False
    refs, offsets, ends = columns
    return all(map(_is_ref, refs)) and _are_counts(offsets) and _are_counts([end for end in ends if end is not None])


def _is_ref(value: Any) -> bool:
    return is_ref(value, MAX_NAME)


def _are_parts(items: Sequence[Any]) -> bool:
    columns = _columns(items, 4)
    return columns is not None and all(map(_are_counts, columns))


def _are_in_file(value: dict[Any, Any]) -> bool:
    return _misfit(value, FILE) is None and all(head < len(value["heads"]) for _, head, _, _ in value["parts"])


def _are_roots(items: Sequence[Any]) -> bool:
    for item in items:
        if type(item) not in _LISTS or len(item) != 3:
            return False
        lo, hi, frames = item
        if not (type(lo) is type(hi) is type(frames) is int and lo >= 0 <= hi and frames > 0):
            return False
    return len(items) > 0


def _are_large(items: Sequence[Any]) -> bool:
    columns = _columns(items, 2)
    return columns is not None and _are_counts(columns[0]) and all(map(NAMES.fits, columns[1]))


COUNT = _one("a whole number from 0 on", range(MAX_INT).__contains__, int)
FLAG = _one("a bool", lambda value: True, bool)
SECONDS = _one("a number from 0 on", lambda value: 0 <= value < MAX_INT, float, int)
TEXT = _one("a text", lambda value: len(value) <= MAX_TEXT, str)
NAME = _one("a name", lambda value: len(value) <= MAX_NAME, str)
COUNTS = _many("a list of whole numbers from 0 on", _are_counts)
REF = _one("[kind, key]", _is_ref, list, tuple, Ref)
NAMES = _many("a list of names", _are_names)
NSLICES = _one("a number of slices", range(1, MAX_SLICES + 1).__contains__, int)

ENTRY = {
    "epoch": COUNT, "reduce": FLAG, "code": _or_none(NAME), "shadows": _optional(NAMES), "module": _optional(NAME),
    "function": _optional(_or_none(NAME)), "shipped": _optional(FLAG), "python": _optional(_or_none(NAME)),
    "collect": _optional(FLAG), "each": _optional(COUNT),
}  # fmt: skip

FILE = {
    "path": NAME, "identity": _one("bytes", lambda value: True, bytes),
    "heads": _many("a list of bytes", lambda items: frozenset([bytes]).issuperset(map(type, items))),
    "parts": _many("a list of [index, head, offset, size]", _are_parts),
}  # fmt: skip

# The fields that somebody reads. More may be there, and are kept.
HEADERS: dict[Kind, dict[str, Field]] = {
    Kind.HELLO: {"workers": _one("a number of workers", range(1, MAX_WORKERS + 1).__contains__, int), "credit": COUNT},
    Kind.WELCOME: {"node": NAME, "host": NAME, "speculation": FLAG},
    Kind.JOB: {
        "job": COUNT, "entry": _one("what to map with", lambda value: _misfit(value, ENTRY) is None, dict),
        "forget": COUNTS,
    },
    Kind.DATA: {
        "data": COUNT, "nslices": NSLICES, "slices": _some("a list of [index, ref]", _are_slices), "forget": COUNTS,
        "file": _optional(_one("slices in a file", _are_in_file, dict)),
    },
    Kind.TASK: {
        "job": COUNT, "data": _or_none(COUNT), "round": COUNT, "indices": COUNTS, "nslices": _optional(NSLICES),
        "params": _one("inline, ref or have", frozenset(["inline", "ref", "have"]).__contains__, str),
        "attempts": _optional(COUNTS),
    },
    Kind.STATE: {"state": _one("the word for a state", lambda value: value in STATES, str)},
    Kind.REFS: {"ref": REF, "offset": COUNT, "total": COUNT, "gone": _optional(FLAG)},
    Kind.GET: {"round": _or_none(COUNT), "refs": _some("a list of [ref, offset, end or None]", _are_parts_of_refs)},
    Kind.CREDIT: {"bytes": COUNT},
    Kind.RESULT: {
        "round": COUNT, "roots": _many("a list of [lo, hi, frames], not empty", _are_roots), "seconds": SECONDS,
    },
    Kind.ERROR: {
        "round": COUNT, "what": _one("task, room or node", frozenset(["task", "room", "node"]).__contains__, str),
        "text": TEXT, "worker": _or_none(COUNT), "slice": _or_none(COUNT), "summary": TEXT,
    },
    Kind.CANCEL: {"round": COUNT, "indices": _optional(COUNTS)},
    Kind.LOG: {"worker": COUNT, "stream": _one("1 or 2", (1, 2).__contains__, int)},
    Kind.PING: {"t": SECONDS},
    Kind.PONG: {"t": SECONDS},
    Kind.BYE: {"reason": TEXT},
    Kind.RELEASE: {"data": COUNTS, "forget": COUNTS},
    Kind.SHARE: {"round": COUNT, "count": COUNT, "seconds": SECONDS, "for": NAME},
    Kind.CALLS: {
        "ids": COUNTS, "of": COUNTS, "new": COUNTS,
        "large": _optional(_many("a list of [position, keys]", _are_large)),
    },
    Kind.FORGET: {"functions": COUNTS, "arguments": NAMES},
    Kind.RETURNS: {
        "ids": COUNTS, "how": COUNTS, "frames": COUNTS, "begun": COUNTS, "left": COUNT, "recalled": _optional(FLAG),
    },
    Kind.RECALL: {"count": COUNT, "cancelled": COUNTS},
}  # fmt: skip

# What a STATE has beside its word.
STATES: dict[str, dict[str, Field]] = {
    "ready": {"workers": _some("a list of pids", _are_workers)},
    "replaced": {"worker": COUNT, "pid": COUNT},
    "lost": {
        "worker": COUNT, "how": TEXT, "pid": COUNT, "round": _optional(COUNT), "slice": _optional(_or_none(COUNT)),
        "slices": _optional(COUNTS),
    },
    "shared": {"round": COUNT, "for": NAME, "indices": COUNTS, "attempts": _optional(COUNTS)},
    "note": {"text": TEXT},
}  # fmt: skip

# How many buffers a kind may have, where not none.
BUFFERS: dict[Kind, range] = {
    Kind.TASK: range(MAX_BUFFERS + 1),
    Kind.REFS: range(1, MAX_BUFFERS + 1),
    Kind.RESULT: range(1, MAX_BUFFERS + 1),
    Kind.ERROR: range(2),
    Kind.LOG: range(1, 2),
    Kind.CALLS: range(MAX_BUFFERS + 1),
    Kind.RETURNS: range(MAX_BUFFERS + 1),
}


class _Plan(NamedTuple):
    """How a kind is checked, laid out for speed: it is done at both ends of each message of a round."""

    needed: list[tuple[str, frozenset[type], Callable[[Any], bool]]]
    others: dict[str, Field]
    buffers: range


def _plan(kind: Kind) -> _Plan:
    fields = HEADERS[kind]
    needed = [(name, field.types, field.test) for name, field in fields.items() if field.needed]
    others = {name: field for name, field in fields.items() if not field.needed}
    return _Plan(needed, others, BUFFERS.get(kind, range(1)))


_PLANS = [_plan(Kind.HELLO), *map(_plan, Kind)]  # by number (0 is none): to hash an enum's member takes longer
_STATE = Kind.STATE
_ABSENT = object()
_repr = reprlib.Repr()
_repr.maxlevel = 2


def _misfit(header: dict[str, Any], fields: dict[str, Field]) -> str | None:
    """What is wrong with the fields of a header; None when nothing is."""
    for name, field in fields.items():
        if name not in header:
            if field.needed:
                return f"lacks {name!r}; it has {shown(list(header))}"
        elif not field.fits(header[name]):
            return f"has {shown(header[name])} as {name!r}, which must be {field.wanted}"
    return None


def shown(value: Any) -> str:
    """A value in an error's text: never long."""
    try:
        return f"{_repr.repr(value)} ({type(value).__name__})"
    except ValueError:  # an int of thousands of digits
        return f"a {type(value).__name__}"


def check(kind: Kind, header: Any, count: int) -> None:
    """WireError unless `header` is a dict with str keys and the fields of `kind`, with which so many buffers go."""
    if type(header) is not dict:
        raise WireError(f"the header of {kind.name} is a {type(header).__name__}, it must be a dict")
    needed, others, buffers = _PLANS[kind]
    for name, types, test in needed:
        value = header.get(name, _ABSENT)
        if type(value) not in types or not test(value):
            raise WireError(f"the header of {kind.name} {_misfit(header, HEADERS[kind])}")
    if kind is _STATE:
        others = STATES[header["state"]]
    if others and (wrong := _misfit(header, others)) is not None:
        raise WireError(f"the header of {kind.name} {wrong}")
    if not _STRS.issuperset(map(type, header)):
        raise WireError(f"the header of {kind.name} has the keys {shown(list(header))}: keys must be str")
    if count not in buffers:
        raise WireError(f"{kind.name} has {count} buffers")
