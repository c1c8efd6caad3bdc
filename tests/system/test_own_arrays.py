"""Arrays in a result are the caller's own, whatever they lie in: they can be written to, and nobody else sees it."""

from __future__ import annotations

import sys
import textwrap

import pytest

from own_programs import hosts, script  # noqa: F401
from ssh_hosts import home, ssh_host  # noqa: F401

WRAPPED = """
    import collections, dataclasses, enum, types, warnings
    import numpy as np
    import pandas as pd
    from qjam import DataSet, Master, TaskError

    @dataclasses.dataclass
    class Holder:
        array: np.ndarray
        more: object = None

    class Slotted:
        __slots__ = ("array",)
        def __init__(self, array): self.array = array

    class Words(dict): pass
    class Row(list): pass
    Pair = collections.namedtuple("Pair", "a b")

    class Sub(np.ndarray): pass

    def wrap(a):
        return [
            a, [a], (a, {"a": a}), Holder(a), Holder(a, Holder(a)), Slotted(a), Pair(a, 1), collections.deque([a]),
            Words(a=a), Row([a]), collections.OrderedDict(a=a), collections.defaultdict(list, a=a),
            types.SimpleNamespace(a=a),
            np.array([a, None], dtype=object), pd.DataFrame(a), pd.Series(a.ravel()),
            (pd.DataFrame(a), [pd.DataFrame(a)]),
            np.asfortranarray(a) if a.flags.writeable else a.T, a[::2], a.view(Sub), np.ma.masked_array(a),
            Holder(a.T), Holder(a[::2]), Holder(a.view(Sub)), pd.DataFrame({"x": a[0], "y": a[1]}),
            Holder(a.astype("M8[s]")),
            pd.DataFrame(a).set_index(0), pd.DataFrame(a, index=pd.date_range("2020", periods=len(a))),
            np.zeros(3, [("f", "f8", 3)]), Holder(a[0, :0]), np.array(7.0), Holder(np.array(7.0)),
            Holder(np.broadcast_to(a[0], (3, a.shape[1]))),
        ]

    def arrays(value, found):
        # Every array below a value.
        if isinstance(value, np.ndarray):
            found.append(value)
            if value.dtype == object:
                for item in value: arrays(item, found)
        elif isinstance(value, (pd.DataFrame, pd.Series)):
            for block in value._mgr.blocks: arrays(block.values, found)
        elif isinstance(value, pd.api.extensions.ExtensionArray):
            arrays(value._ndarray, found)
        elif isinstance(value, dict):
            for item in value.values(): arrays(item, found)
        elif isinstance(value, (list, tuple, collections.deque)):
            for item in value: arrays(item, found)
        elif isinstance(value, Slotted):
            arrays(value.array, found)
        elif hasattr(value, "__dict__"):
            arrays(vars(value), found)
        return found

    def check(results):
        seen = []
        for result in results:
            found = {id(array): array for array in arrays(result, [])}
            for array in found.values():
                assert array.flags.writeable, (type(result), array.dtype)
                if array.dtype != object:
                    array[...] = array[...] if array.dtype.names else np.zeros(1, array.dtype)
                    assert not any(np.shares_memory(array, other) for other in seen), type(result)
                    seen.append(array)
        return len(seen)
    """


def wrapped(source: str) -> str:
    return textwrap.dedent(WRAPPED) + textwrap.dedent(source)


@pytest.fixture(autouse=True)
def _pandas_everywhere(monkeypatch):
    monkeypatch.setenv("QJAM_REMOTE_PYTHON", sys.executable)


def test_arrays_inside_any_object_are_the_callers_own(script):
    source = """
    def by_slice(params, part): return {"all": wrap(part)}
    def by_params(params, part): return {"all": wrap(params)}
    def by_itself(params, part): return {"all": wrap(np.ones(params.shape))}

    with Master(HOSTS) as master:
        for shape in ((4, 3), (400, 300)):
            data = DataSet(np.ones(shape), slice_size=shape[0])
            for function in (by_slice, by_params, by_itself):
                first, second = (master.run(function, np.ones(shape), data)["all"] for _ in range(2))
                counts = {check([item]) for item in first + second}
                check([[first[3]], [second[3]], [first[-1]], [second[14]], [first[0]], [second[0]]])
                again = master.run(function, np.ones(shape), data)["all"]
                print((again[0] == 1).all(), (again[3].array == 1).all(), (again[14].to_numpy() == 1).all())
                assert 0 not in counts
    """
    assert script(wrapped(source)) == ["True True True"] * 6


def test_data_frames_can_be_set_in_place(script):
    source = """
    def work(params, part): return {"frame": pd.DataFrame(part, columns=list("abc")), "series": pd.Series(part[0])}

    with Master(HOSTS) as master:
        result = master.run(work, None, DataSet(np.arange(12.0).reshape(4, 3), slice_size=4))
        frame, series = result["frame"], result["series"]
        frame.iloc[0, 0] = 100.0
        frame.loc[1, "b"] += 1
        series[0] = 7
        frame._mgr.blocks[0].values[...] = 5
        print((frame == 5).all().all(), series.tolist())
    """
    assert script(wrapped(source)) == ["True [7.0, 1.0, 2.0]"]


def test_reduced_results_and_exceptions_are_the_callers_own_too(script, tmp_path):
    (tmp_path / "first_of.py").write_text(
        "import collections\n"
        "def mapfunc(params, part): return collections.deque([part])\n"
        "def reduce(a, b): return collections.deque([*a, *b])\n"
        "def fails(params, part): raise ValueError(part, {'part': part})\n"
    )
    source = """
    import first_of

    with Master(HOSTS) as master:
        for rows in (4, 4000):
            data = DataSet(np.ones((8 * rows, 3)), slice_size=rows)
            for _ in range(2):
                result = master.run(first_of, None, data)
                print(len(result), check([[array] for array in result]))
            try:
                master.run(first_of.fails, None, data)
            except TaskError as error:
                print(check([error.__cause__.args[:1]]))
    """
    assert script(wrapped(source)) == ["8 8", "8 8", "1"] * 2
