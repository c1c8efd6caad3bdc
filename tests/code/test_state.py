"""What was set on a module is noticed, travels, and is set on another module made from the same source."""

from __future__ import annotations

import functools
import textwrap
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjam.code.state import MAX_BYTES, MAX_ITEMS, Snapshot, State, Watch, state_of
from qjam_worker.worker.user_modules import set_state

SOURCE = """
    import types
    NUMBER = 1
    TEXT = "a"
    DICT = {"a": 1}
    LIST = [1, 2]
    SET = {1}
    BYTES = bytearray(b"ab")
    import numpy
    ARRAY = numpy.zeros(3)
    OBJECT = types.SimpleNamespace(rate=1)
    def function(x=1):
        return NUMBER + x
    class Model:
        scale = 1
        table = {"a": 1}
        class Inner:
            depth = 1
        def method(self):
            return self.scale
    """


def made() -> types.ModuleType:
    module = types.ModuleType("stated")
    exec(textwrap.dedent(SOURCE), vars(module))
    return module


def carried(module: types.ModuleType, baseline: Snapshot) -> types.ModuleType:
    """Returns another module of the same source, with what was set on the first."""
    state = state_of(module, baseline)
    assert state.stays == []
    other = made()
    if state.packed:
        set_state(other, state.packed)
    return other


def _add_method(module: Any) -> None:
    module.Model.method = lambda self: 22


def _delete(module: Any) -> None:
    del module.NUMBER
    del module.Model.scale


def _replace_function(module: Any) -> None:
    exec("def function(x=2):\n    return NUMBER + 10 * x", vars(module))


def _wrap_function(module: Any) -> None:
    original = module.function
    module.function = functools.wraps(original)(lambda: 100 + original())


def _change_code(module: Any) -> None:
    module.function.__code__ = (lambda x: x + 50).__code__


def _code(module: Any) -> None:
    module.function.__defaults__ = (5,)


CHANGES: list[tuple[Callable[[Any], None], Callable[[Any], Any]]] = [
    (lambda m: setattr(m, "NUMBER", 2), lambda m: m.NUMBER),
    (lambda m: setattr(m, "NEW", [1]), lambda m: getattr(m, "NEW", None)),
    (lambda m: m.DICT.update(b=2), lambda m: m.DICT),
    (lambda m: (m.DICT.pop("a"), m.DICT.update(b=1)), lambda m: m.DICT),
    (lambda m: m.LIST.reverse(), lambda m: m.LIST),
    (lambda m: m.SET.add(5), lambda m: m.SET),
    (lambda m: m.BYTES.__setitem__(0, 9), lambda m: m.BYTES),
    (lambda m: m.ARRAY.fill(3), lambda m: m.ARRAY.tolist()),
    (lambda m: setattr(m.OBJECT, "rate", 7), lambda m: m.OBJECT.rate),
    (lambda m: setattr(m.Model, "scale", 7), lambda m: m.Model().method()),
    (lambda m: m.Model.table.update(b=2), lambda m: m.Model.table),
    (lambda m: setattr(m.Model.Inner, "depth", 4), lambda m: m.Model.Inner.depth),
    (_add_method, lambda m: m.Model().method()),
    (lambda m: setattr(m.function, "note", 3), lambda m: getattr(m.function, "note", None)),
    (_code, lambda m: m.function()),
    (_change_code, lambda m: m.function(1)),
    (_replace_function, lambda m: m.function()),
    (_wrap_function, lambda m: m.function()),
    (_delete, lambda m: (hasattr(m, "NUMBER"), hasattr(m.Model, "scale"))),
]


@pytest.mark.parametrize(("change", "look"), CHANGES)
def test_a_change_is_noticed_and_carried_over(change: Callable[[Any], None], look: Callable[[Any], Any]) -> None:
    module = made()
    baseline, watch = Snapshot(module, "stated"), Watch(module)
    before = look(made())
    assert watch.is_unchanged()
    change(module)
    assert not watch.is_unchanged()
    assert look(module) != before
    assert look(carried(module, baseline)) == look(module)


def test_a_function_that_was_replaced_uses_the_globals_of_the_module_there() -> None:
    module = made()
    baseline = Snapshot(module, "stated")
    _replace_function(module)
    other: Any = carried(module, baseline)
    other.NUMBER = 1000
    assert other.function() == 1020


def test_nothing_set_is_nothing_sent() -> None:
    module = made()
    assert state_of(module, Snapshot(module, "stated")) == State(b"", [])


def test_what_cannot_travel_is_named_and_the_rest_travels() -> None:
    module: Any = made()
    baseline = Snapshot(module, "stated")
    module.Model.lock = __import__("threading").Lock()
    module.NUMBER = 5
    state = state_of(module, baseline)
    assert [path for path, _ in state.stays] == ["Model.lock"]
    other: Any = made()
    set_state(other, state.packed)
    assert other.NUMBER == 5


def test_of_large_values_a_new_size_is_noticed() -> None:
    module: Any = made()
    module.LARGE = list(range(MAX_ITEMS + 1))
    module.WIDE = np.zeros(MAX_BYTES)
    watch = Watch(module)
    assert watch.is_unchanged()
    module.LARGE.append(1)
    assert not watch.is_unchanged()


def test_the_import_system_sets_no_state() -> None:
    module: Any = made()
    baseline = Snapshot(module, "stated")
    module.part = types.ModuleType("stated.part")
    module.__cached__ = "somewhere"
    assert state_of(module, baseline) == State(b"", [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["NUMBER", "DICT", "LIST", "OBJECT", "NEW", "Model.scale", "Model.new", "Model.Inner.depth"])


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_values_that_are_set_are_carried_over(values: dict[str, Any]) -> None:
    module = made()
    baseline = Snapshot(module, "stated")

    def owner(of: Any, path: str) -> tuple[Any, str]:
        *above, name = path.split(".")
        return functools.reduce(getattr, above, of), name

    for path, value in values.items():
        setattr(*owner(module, path), value)
    other = carried(module, baseline)
    for path, value in values.items():
        assert getattr(*owner(other, path)) == value
