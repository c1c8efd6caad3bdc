"""How many cores a process may use."""

from __future__ import annotations

import os

import pytest

from qjam_worker.ipc import cores


def test_usable_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= cores.usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_usable_cores_follow_the_affinity_of_the_process() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_usable_cores_are_all_cores_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores.usable_cores() == 5
