"""Results that must last while mapfunc is called again keep their type and state."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

from qjam import DataSet, Master
from qjam_worker.worker.detach import detached


class Tagged(list):
    """A list with an attribute, and a constructor of its own."""

    def __init__(self, tag: str, *items: Any) -> None:
        super().__init__(items)
        self.tag = tag


class Pair(tuple):
    """A tuple whose constructor takes its items one by one."""

    def __new__(cls, left: Any, right: Any) -> Any:
        return super().__new__(cls, (left, right))

    def __getnewargs__(self) -> tuple[Any, Any]:
        return self[0], self[1]


class Adding(dict):
    """Its update adds."""

    def update(self, *others: Any) -> None:
        for other in others:
            for key, value in dict(other).items():
                self[key] = self.get(key, 0) + value


class Point(NamedTuple):
    x: float
    y: Any


@dataclasses.dataclass
class Record:
    values: np.ndarray
    name: str


VALUES = [
    collections.Counter("banana"),
    collections.OrderedDict([("b", 1), ("a", 2)]),
    collections.defaultdict(list, a=[1]),
    collections.deque([1, 2], maxlen=5),
    Tagged("tag", 1, 2),
    Pair(1, [2]),
    Adding(a=1),
    Point(1.0, {"a": [1]}),
    time.localtime(0),
    os.stat("/"),
    bytearray(b"abc"),
    {1, 2},
    np.ma.array([1, 2], mask=[True, False]),
    np.array([(1, 2.0)], dtype=[("a", int), ("b", float)])[0],
    np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]),
    None,
    3,
    "text",
]


@pytest.mark.parametrize("nest", [lambda v: v, lambda v: [v], lambda v: (1, {"k": v})], ids=["bare", "list", "dict"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_keeps_its_type_and_state(value: Any, nest: Any) -> None:
    copied = detached(nest(value))
    assert repr(copied) == repr(nest(value))
    while type(copied) is not type(value):
        copied = copied[0] if type(copied) is list else copied[1] if type(copied) is tuple else copied["k"]
    if isinstance(value, np.ndarray):
        assert copied.flags.f_contiguous == value.flags.f_contiguous
    else:
        assert getattr(copied, "__dict__", None) == getattr(value, "__dict__", None)


def test_what_may_change_is_a_copy() -> None:
    buffer = np.zeros(3)
    results = detached([collections.deque([buffer]), Record(buffer, "r"), {"k": (buffer, [bytearray(b"0")])}])
    buffer[:] = 1.0
    assert results[0][0].tolist() == results[1].values.tolist() == results[2]["k"][0].tolist() == [0.0] * 3


def test_a_value_that_contains_itself_and_one_that_cannot_be_copied_stay_whole() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    copied = detached(loop)
    assert copied[1] is copied
    assert copied is not loop
    lock = threading.Lock()
    assert detached([lock])[0] is lock


@pytest.fixture(scope="module")
def one():
    with Master(1, echo=False) as master:
        yield master


def test_counters_of_several_slices_on_one_worker_add_up(one: Master, tmp_path, monkeypatch) -> None:
    (tmp_path / "detach_counting.py").write_text(
        "import collections\n"
        "def mapfunc(params, part):\n    return collections.Counter(part)\n"
        "def reduce(a, b):\n    return a + b\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import detach_counting

    words = ["a", "b", "a", "c", "b", "a", "a", "c"]
    total = one.run(detach_counting, None, DataSet(words, slice_size=1))
    assert total == collections.Counter(words)
    assert type(total) is collections.Counter


def test_results_that_reuse_a_buffer_are_as_they_were_returned(one: Master, tmp_path, monkeypatch) -> None:
    (tmp_path / "detach_reusing.py").write_text(
        "import collections\nimport numpy as np\n"
        "buffer = np.zeros(1)\n"
        "def mapfunc(params, part):\n    buffer[0] = part[0]\n    return collections.deque([buffer])\n"
        "def reduce(a, b):\n    return collections.deque([*a, *b])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import detach_reusing

    data = DataSet([1.0, 2.0, 3.0, 4.0, 5.0], slice_size=1)
    for _ in range(2):  # in the second round all slices are there, and the worker gets several at once
        total = one.run(detach_reusing, None, data)
        assert [float(item[0]) for item in total] == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("depth", [100, 400])
def test_a_deep_value_is_copied_whole(depth):
    buffer = np.zeros(3)
    value = [buffer]
    for _ in range(depth):
        value = [value]
    copy = detached(value)
    buffer += 1
    for _ in range(depth):
        (copy,) = copy
    assert copy[0].tolist() == [0, 0, 0]


def test_what_is_too_deep_to_be_sent_is_an_error_that_says_so():
    value = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(TypeError, match="mapfunc or reduce gave a result that cannot be sent back"):
        detached(value)
