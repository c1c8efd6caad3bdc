"""Who holds data, and what is heard of it when they do no longer."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from qjam import DataSet
from qjam.data import leases
from qjam.data.leases import Lease, Leases
from qjam.engine.call_queue import CallQueue


def made() -> tuple[Leases, list[tuple[tuple[str, ...], bool]]]:
    heard: list[tuple[tuple[str, ...], bool]] = []

    def let_go(lease: Lease, at_once: bool) -> None:
        assert not lease.held
        heard.append((lease.key, at_once))

    return Leases(let_go), heard


def of(its: Leases, holder: Any, *refs: str) -> Lease:
    return its.of(holder, list(refs), lambda: 7)


def test_a_lease_lasts_as_long_as_its_holder_without_the_help_of_the_garbage_collector() -> None:
    its, heard = made()
    gc.disable()
    try:
        for holder, refs in ((np.zeros(3), ("a",)), (DataSet([1, 2]), ("b", "c")), (DataSet(range(5)).bind(3), ("d",))):
            lease = of(its, holder, *refs)
            assert of(its, holder, *refs) is lease
            assert (lease.held, lease.nbytes) == (True, 7)
        del holder
    finally:
        gc.enable()
    assert sorted(heard) == [(("a",), False), (("b", "c"), False), (("d",), False)]
    assert not its._leases


def test_the_slices_of_a_data_set_die_with_it() -> None:
    its, heard = made()
    gc.disable()
    try:
        data = DataSet(range(5))
        of(its, data.bind(3), "a")
        assert data.bind(3).bind(2) is data.bind(3)
        del data
    finally:
        gc.enable()
    assert heard == [(("a",), False)]


def test_an_array_that_has_other_slices_lets_go_of_the_old_ones() -> None:
    its, heard = made()
    array = np.zeros(3)
    first, second = of(its, array, "a"), of(its, array, "b")
    assert (first.held, second.held, heard) == (False, True, [(("a",), False)])


def test_a_data_set_is_released_in_all_masters() -> None:
    (one, heard), (other, heard_too) = made(), made()
    data = DataSet(range(5))
    for its in (one, other):
        of(its, data.bind(3), "a")
        of(its, data.bind(2), "b")
    data.release()
    assert sorted(heard) == sorted(heard_too) == [(("a",), True), (("b",), True)]
    data.release()
    leases.release([])
    assert len(heard) == 2
    assert of(one, data.bind(3), "a").held


def test_who_holds_data_does_not_hold_the_master() -> None:
    its, heard = made()
    array = np.zeros(3)
    of(its, array, "a")
    del its
    gc.collect()
    del array
    assert heard == []


def test_the_garbage_collector_may_come_while_the_queue_is_locked() -> None:
    woken: list[bool] = []
    calls = CallQueue(lambda: woken.append(True), pytest.fail)
    its = Leases(lambda lease, at_once: calls.slip(lambda: None))
    array = np.zeros(3)
    of(its, array, "a")
    with calls._lock, calls._waking:
        del array  # would wait for ever
    assert (len(calls.posted), woken) == (1, [True])
    calls.close()
