"""Alarms beside a plain dict that is looked through."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qjam.dispatch.timers import Alarms

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
    alarms: Alarms[str] = Alarms()
    plain: dict[str, float] = {}
    for what, key, at in steps:
        if what == "set":
            alarms.set(key, at)
            plain[key] = at
        elif what == "drop":
            alarms.drop(key)
            plain.pop(key, None)
        else:
            due = sorted((moment, name) for name, moment in plain.items() if moment <= at)
            assert alarms.due(at) == [name for _, name in due]
            plain = {name: moment for name, moment in plain.items() if moment > at}
        assert alarms.first == min(plain.values(), default=None)
        assert len(alarms) == len(plain)
        assert all(alarms.get(name) == moment for name, moment in plain.items())


def test_what_is_set_again_and_again_leaves_nothing_behind() -> None:
    alarms: Alarms[int] = Alarms()
    for number in range(10_000):
        alarms.set(number, 1e9 - number)
        alarms.drop(number)
    assert len(alarms._heap) < 100
    assert alarms.first is None
