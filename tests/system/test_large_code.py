"""Functions and params that carry much are told of once."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from qjam import Master

MB = 1_000_000


@pytest.fixture(scope="module")
def master():
    with Master(1) as master:
        yield master


def told(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "qjam"]
    caplog.clear()
    return found


def test_a_closure_of_more_than_100_mb_is_told_of_once(master, caplog):
    held = np.ones(101 * MB, np.uint8)

    def work(params, part):
        return int(held[params])

    with caplog.at_level(logging.WARNING, "qjam"):
        assert [master.run(work, i) for i in range(2)] == [1, 1]
    (text,) = told(caplog)
    assert "work carries more than 100 MB" in text
    assert "DataSet" in text
    held = held[: 99 * MB]
    with caplog.at_level(logging.WARNING, "qjam"):
        assert master.run(lambda params, part: int(held[0])) == 1
    assert told(caplog) == []


@pytest.mark.parametrize("wrap", [lambda array: array, lambda array: {"a": [array]}], ids=["array", "inside"])
def test_params_of_more_than_100_mb_are_told_of_once(caplog, wrap):
    with Master(1) as master, caplog.at_level(logging.WARNING, "qjam"):
        assert master.run(lambda params, part: 1, wrap(np.ones(99 * MB, np.uint8))) == 1
        assert told(caplog) == []
        for run in (master.run, lambda *given: master.submit(*given).result(), master.run):
            assert run(lambda params, part: 1, wrap(np.ones(101 * MB, np.uint8))) == 1
        (text,) = told(caplog)
    assert "params take more than 100 MB" in text
    assert "DataSet" in text
