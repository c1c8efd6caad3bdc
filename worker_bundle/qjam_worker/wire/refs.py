"""Refs: the names of what a node may ask the master for. They are made here, and nowhere else."""

from __future__ import annotations

from typing import Any, NamedTuple

SLICE, CODE, PARAMS, MODULE, ARGUMENT = "slice", "code", "params", "module", "argument"
KINDS = frozenset([SLICE, CODE, PARAMS, MODULE, ARGUMENT])


class Ref(NamedTuple):
    """The name of a slice (`key`: its content hash), of code (its hash), of the params of a round (its number), of a
    module of the user's (epoch and dotted name), or of a part of the arguments of calls (its content hash).
    """

    kind: str
    key: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.key}"


class Part(NamedTuple):
    """The bytes of a ref from `offset` on, up to `end` or, where that is None, to the last one."""

    ref: Ref
    offset: int = 0
    end: int | None = None


def of_slice(content_hash: str) -> Ref:
    """The slice with this hash."""
    return Ref(SLICE, content_hash)


def of_code(code_hash: str) -> Ref:
    """The pickled functions with this hash."""
    return Ref(CODE, code_hash)


def of_params(number: int) -> Ref:
    """The params of a round."""
    return Ref(PARAMS, str(number))


def of_argument(content_hash: str) -> Ref:
    """The part of arguments with this hash."""
    return Ref(ARGUMENT, content_hash)


def of_module(epoch: int, name: str) -> Ref:
    """The source of a module as it is in this epoch; in another one the file may have changed."""
    return Ref(MODULE, f"{epoch}:{name}")


def module_name(ref: Ref) -> str:
    """The dotted name in the ref of a module."""
    return ref.key.partition(":")[2]


def is_ref(value: Any, longest: int) -> bool:
    """Whether a part of a message is a ref whose key is not longer than that."""
    return (
        type(value) in (list, tuple, Ref)
        and len(value) == 2
        and type(value[0]) is type(value[1]) is str
        and value[0] in KINDS
        and len(value[1]) <= longest
    )
