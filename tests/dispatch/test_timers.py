"""Timers beside a plain dict that is looked through."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qjam.dispatch.timers import Timers

KEYS, MOMENTS = st.sampled_from("abcdef"), st.integers(0, 20).map(float)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, MOMENTS),
        st.tuples(st.just("drop"), KEYS, st.just(0.0)),
        st.tuples(st.just("due"), st.just(""), MOMENTS),
    )
)


@given(STEPS)
def test_alarms_are_what_a_dict_would_be(steps: list[tuple[str, str, float]]) -> None:
    timers: Timers[str] = Timers()
    plain: dict[str, float] = {}
    for what, key, at in steps:
        if what == "set":
            timers.set(key, at)
            plain[key] = at
        elif what == "drop":
            timers.drop(key)
            plain.pop(key, None)
        else:
            due = sorted((moment, name) for name, moment in plain.items() if moment <= at)
            assert timers.due(at) == [name for _, name in due]
            plain = {name: moment for name, moment in plain.items() if moment > at}
        assert timers.first == min(plain.values(), default=None)
        assert len(timers) == len(plain)
        assert all(timers.get(name) == moment for name, moment in plain.items())


def test_what_is_set_again_and_again_leaves_nothing_behind() -> None:
    timers: Timers[int] = Timers()
    for number in range(10_000):
        timers.set(number, 1e9 - number)
        timers.drop(number)
    assert len(timers._heap) < 100
    assert timers.first is None
