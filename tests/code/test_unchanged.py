"""A function that need not be pickled again: it and all that it uses are what they were."""

from __future__ import annotations

import functools
import gc
import math
import operator
import sys
import types
import weakref
from typing import Any

import pytest

from qjam.code.unchanged import watch


def made(source: str, **names: Any) -> Any:
    """A function of a script, with these globals."""
    space = {"__name__": "__main__", **names}
    exec(source, space)
    return space["f"]


@pytest.mark.parametrize(
    "function", [operator.neg, math.sqrt, len, int, dict, functools.reduce, made("def f(x): return x")]
)
def test_what_cannot_change_is_known(function):
    unchanged = watch(function)
    assert unchanged is not None
    assert unchanged(function)


@pytest.mark.parametrize(
    ("before", "after"), [(1, 2), (1.5, 2.5), ("a", "b"), (None, 0), ((1, "a"), (1, "b")), (math, operator), (len, abs)]
)
def test_a_global_that_is_rebound_is_noticed(before, after):
    function = made("def f(x): return K", K=before)
    unchanged = watch(function)
    assert unchanged is not None
    assert unchanged(function)
    function.__globals__["K"] = after
    assert not unchanged(function)
    function.__globals__["K"] = before
    assert unchanged(function)
    del function.__globals__["K"]
    assert not unchanged(function)


def test_a_name_that_appears_later_is_noticed():
    function = made("def f(x): return len(x)")
    unchanged = watch(function)
    assert unchanged is not None
    function.__globals__["len"] = abs
    assert not unchanged(function)


def test_cells_defaults_code_and_attributes_count():
    cell = 1

    def f(x, a=1, *, b=2):
        return x + a + b + cell

    for change in ("cell", "__defaults__", "__kwdefaults__", "__code__", "attribute"):
        unchanged = watch(f)
        assert unchanged is not None
        assert unchanged(f)
        if change == "cell":
            cell = 2
        elif change == "attribute":
            f.extra = 1  # type: ignore[attr-defined]
        elif change == "__code__":
            f.__code__ = f.__code__.replace(co_name="g")
        else:
            setattr(f, change, (7,) if change == "__defaults__" else {"b": 7})
        assert not unchanged(f)


def test_what_nested_code_and_other_functions_use_counts():
    space: dict[str, Any] = {"__name__": "__main__", "K": 1}
    exec("def g(): return K\ndef f(x): return [g() for _ in (lambda: K, )]", space)
    unchanged = watch(space["f"])
    assert unchanged is not None
    assert unchanged(space["f"])
    space["K"] = 2
    assert not unchanged(space["f"])
    space["K"] = 1
    exec("def g(): return -K", space)
    assert not unchanged(space["f"])


def test_functions_that_call_each_other_are_watched_once():
    space: dict[str, Any] = {"__name__": "__main__", "K": 1}
    exec("def f(x): return g(x)\ndef g(x): return f(x) if x else K", space)
    unchanged = watch(space["f"])
    assert unchanged is not None
    assert unchanged(space["f"])
    space["K"] = 2
    assert not unchanged(space["f"])


@pytest.mark.parametrize("value", [[1], {"a": 1}, ([1],), object(), bytearray(b"a"), type("C", (), {})])
def test_what_may_change_unseen_is_not_known(value):
    assert watch(made("def f(x): return K", K=value)) is None
    cell = value
    assert watch(lambda: cell) is None
    assert watch(made("def f(x=K): return x", K=value)) is None


@pytest.mark.parametrize(
    "function", [functools.partial(int, [1]), [].append, "a".upper, type("C", (), {"__call__": len})()]
)
def test_objects_that_are_called_are_pickled_each_time(function):
    assert watch(function) is None


def test_a_function_of_a_module_is_known_by_its_name(monkeypatch):
    module = types.ModuleType("qjam_test_of_unchanged")
    module.__spec__ = sys.__spec__
    exec("def f(x): return x", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    function = module.f
    unchanged = watch(function)
    assert unchanged is not None
    assert unchanged(function)
    module.f = None
    assert not unchanged(function)
    module.f = function
    monkeypatch.setitem(sys.modules, module.__name__, types.ModuleType("another"))
    assert not unchanged(function)


def test_a_partial_is_known_by_what_it_is_made_of():
    function = functools.partial(made("def f(x, y): return x"), 1, y=2)
    unchanged = watch(function)
    assert unchanged is not None
    assert unchanged(function)
    function.keywords["y"] = 3
    assert not unchanged(function)
    function.keywords["y"] = 2
    function.func.__defaults__ = (1,)
    assert not unchanged(function)


def test_a_function_is_not_kept_alive():
    function = made("def f(x): return x")
    gone = weakref.ref(function)
    unchanged = watch(function)
    assert unchanged is not None
    del function.__globals__["f"]
    del function
    gc.collect()
    assert gone() is None
