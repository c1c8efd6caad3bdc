"""How data becomes slices with hashes, for each kind of data set, and what is said about data that cannot."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjam.data import datasets
from qjam.data.datasets import BaseDataSet, DataSet, ListDataSet, NumpyMatrixDataSet, NumpyMatrixFileDataSet
from qjam_worker.values import codec

MATRIX = np.arange(60.0).reshape(20, 3)


class Squares(BaseDataSet):
    """The least that a subclass has to be: no __init__, no slice_size."""

    def chunks(self) -> int:
        return 4

    def slice(self, index: int) -> int:
        return index * index


class Lines(BaseDataSet):
    """A subclass that cuts by slice_size itself."""

    def chunks(self) -> int:
        return 10

    def slice(self, index: int) -> list[str]:
        assert self.slice_size is not None
        start = index * self.slice_size
        return [f"line {i}" for i in range(start, min(start + self.slice_size, 10))]


# What DataSet makes of data


@pytest.mark.parametrize(
    ("data", "kind"),
    [([1], ListDataSet), ((1,), ListDataSet), (range(3), ListDataSet), (MATRIX, NumpyMatrixDataSet)],
)
def test_a_list_a_tuple_a_range_and_an_array_become_their_kind_of_data_set(data: Any, kind: type) -> None:
    assert type(DataSet(data)) is kind


@pytest.mark.parametrize("made", [DataSet([1, 2]), DataSet(MATRIX, slice_size=7), Squares()])
def test_a_data_set_is_given_back_as_it_is(made: BaseDataSet) -> None:
    assert DataSet(made) is made


def test_a_data_set_cannot_be_given_another_slice_size() -> None:
    with pytest.raises(ValueError, match="slice_size where you make it"):
        DataSet(DataSet([1, 2]), slice_size=1)


@pytest.mark.parametrize("data", [[1, 2, 3], (1, 2), range(3), MATRIX])
def test_raw_data_is_the_very_object_that_was_given(data: Any) -> None:
    assert DataSet(data).raw_data() is data
    assert DataSet(data).bind(2).raw_data() is data


# Slicing


def test_a_slice_size_that_is_given_is_kept_and_the_last_slice_has_the_rest() -> None:
    made = DataSet([*range(10)], slice_size=4)
    assert list(made) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert made.slice_size == 4
    assert made.bind(8) is made


def test_a_slice_size_above_the_number_of_chunks_is_one_slice() -> None:
    assert list(DataSet((1, 2, 3), slice_size=10**30)) == [(1, 2, 3)]


def test_a_numpy_integer_is_a_slice_size() -> None:
    assert DataSet([1, 2, 3], slice_size=np.int64(2)).slice_size == 2  # type: ignore[arg-type]


def test_without_a_slice_size_it_is_one_slice_until_it_is_bound() -> None:
    made = DataSet([*range(7)])
    assert list(made) == [[*range(7)]]
    assert list(made.bind(3)) == [[0, 1], [2, 3], [4, 5, 6]]
    assert len(made) == 1


def test_there_are_never_more_slices_than_chunks() -> None:
    made = DataSet([1, 2, 3])
    assert list(made.bind(16)) == [[1], [2], [3]]
    assert made.bind(16) is made.bind(3)


def test_binding_twice_gives_the_same_object_and_keeps_its_hashes() -> None:
    made = DataSet(MATRIX)
    made.hash_list()
    bound = made.bind(4)
    assert made.bind(4) is bound
    assert bound.bind(2) is bound
    assert made.bind(2) is not bound
    assert len(set(bound.hash_list())) == 4
    assert made.bind(2).hash_list() == DataSet(MATRIX).bind(2).hash_list()


@pytest.mark.parametrize(("slices", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bind_takes_a_number_of_slices(slices: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="slices must be an int of at least 1"):
        DataSet([1, 2]).bind(slices)


@given(st.integers(1, 200), st.integers(1, 40))
def test_bound_slices_are_balanced_and_hold_every_chunk_once_in_order(chunks: int, slices: int) -> None:
    cut = list(DataSet(range(chunks)).bind(slices))
    assert [element for part in cut for element in part] == [*range(chunks)]
    assert len(cut) == min(slices, chunks)
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


@given(st.integers(1, 200), st.integers(1, 40))
def test_slices_of_a_given_size_hold_every_chunk_once_in_order(chunks: int, size: int) -> None:
    cut = list(DataSet(range(chunks), slice_size=size))
    assert [element for part in cut for element in part] == [*range(chunks)]
    assert {len(part) for part in cut[:-1]} <= {size}


def test_chunks_are_elements_and_rows_whatever_the_slicing() -> None:
    assert DataSet([1, 2, 3], slice_size=2).chunks() == 3
    assert DataSet(MATRIX).bind(4).chunks() == 20


# Length and indexing


def test_len_is_the_number_of_slices() -> None:
    assert len(DataSet(range(120), slice_size=50)) == 3
    assert len(DataSet(MATRIX, slice_size=1)) == 20


def test_indexing_is_that_of_a_list_of_slices() -> None:
    made = DataSet(range(10), slice_size=3)
    whole = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert list(made) == whole
    assert [made[i] for i in range(-4, 4)] == whole + whole
    assert made[np.int64(1)] == whole[1]
    assert made[1:3] == whole[1:3]
    assert made[::-1] == whole[::-1]


@pytest.mark.parametrize("made", [DataSet(range(10), slice_size=3), Squares(), DataSet(MATRIX).bind(4)])
@pytest.mark.parametrize("index", [4, -5, 10**30])
@pytest.mark.parametrize("ask", ["__getitem__", "hash", "slice_data"])
def test_an_index_that_is_not_there_is_an_index_error(made: BaseDataSet, index: int, ask: str) -> None:
    with pytest.raises(IndexError, match="the data set has 4, from 0 to 3"):
        getattr(made, ask)(index)


def test_slice_of_what_is_not_there_is_an_index_error_too() -> None:
    with pytest.raises(IndexError, match="no slice 4"):
        DataSet(range(10), slice_size=3).slice(4)


def test_an_index_is_an_integer() -> None:
    with pytest.raises(TypeError):
        DataSet([1, 2])["first"]  # type: ignore[call-overload]


# Lists


@pytest.mark.parametrize(
    ("data", "first"),
    [([1, 2, 3], [1, 2]), ((1, 2, 3), (1, 2)), (range(3), [0, 1]), ([[1], {}, None], [[1], {}])],
)
def test_a_slice_of_a_list_is_a_list_and_of_a_tuple_a_tuple(data: Any, first: Any) -> None:
    found = DataSet(data, slice_size=2).slice(0)
    assert found == first
    assert type(found) is type(first)


def test_a_slice_has_the_very_elements_of_the_list() -> None:
    element = object()
    assert DataSet([element, 1], slice_size=1)[0][0] is element


# Arrays


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 3, 2), (10, 0)])
def test_slices_of_an_array_are_rows_and_views_of_it(shape: tuple[int, ...]) -> None:
    data = np.zeros(shape)
    data[...] = np.arange(10.0).reshape(10, *[1] * (len(shape) - 1))
    made = DataSet(data, slice_size=4)
    assert [part.shape for part in made] == [(4, *shape[1:]), (4, *shape[1:]), (2, *shape[1:])]
    assert np.array_equal(np.concatenate(list(made)), data)
    assert all(part.base is data for part in made)


def test_what_is_encoded_of_a_contiguous_array_is_the_users_own_memory() -> None:
    data = np.arange(4000.0).reshape(1000, 4)
    for made in (DataSet(data), DataSet(data).bind(3)):
        for index in range(len(made)):
            (buffer,) = made.slice_data(index).buffers
            assert np.shares_memory(np.frombuffer(buffer, np.uint8), data)


def test_slices_are_read_only_and_the_array_stays_writable() -> None:
    data = MATRIX.copy()
    part = DataSet(data).bind(2)[0]
    with pytest.raises(ValueError, match="read-only"):
        part[0, 0] = 1
    data[0, 0] = 1


def test_with_row_major_false_slices_are_columns_and_views() -> None:
    made = NumpyMatrixDataSet(MATRIX, slice_size=2, row_major=False)
    assert made.chunks() == 3
    assert [part.shape for part in made] == [(20, 2), (20, 1)]
    assert np.array_equal(np.hstack(list(made)), MATRIX)
    assert all(np.shares_memory(part, MATRIX) for part in made)


def test_columns_of_a_fortran_ordered_array_are_encoded_without_a_copy() -> None:
    data = np.asfortranarray(np.ones((500, 4)))
    (buffer,) = NumpyMatrixDataSet(data, row_major=False).bind(2).slice_data(1).buffers
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), data)


@pytest.mark.parametrize(
    "data",
    [
        np.asfortranarray(MATRIX),
        MATRIX[::2, ::-1],
        MATRIX.astype(">f4"),
        np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")]).view(np.recarray),
        np.array(["2010-01-01", "2010-01-02"], dtype="datetime64[D]"),
        np.array([True, False, True]),
        np.array([{}, None, "x"], dtype=object),
        np.ma.masked_array([1, 2, 3], [False, True, False]),
        MATRIX.view(np.matrix),
    ],
    ids=lambda data: f"{type(data).__name__}-{data.dtype}",
)
def test_arrays_of_every_kind_arrive_as_their_own_rows(data: np.ndarray) -> None:
    made = DataSet(data, slice_size=2)
    for index in range(len(made)):
        rows = data[2 * index : 2 * index + 2]
        encoded = made.slice_data(index)
        arrived = codec.decode(encoded.header, encoded.buffers)
        assert type(arrived) is type(rows)
        assert arrived.dtype == rows.dtype
        assert arrived.tolist() == rows.tolist()


def test_a_mask_is_part_of_the_hash() -> None:
    one, other = (np.ma.masked_array([1, 2], mask) for mask in ([False, True], [False, False]))
    assert DataSet(one).hash(0) != DataSet(other).hash(0)


def test_a_memory_map_is_not_read_into_memory_and_its_slices_are_plain_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", MATRIX)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    part = DataSet(mapped, slice_size=4)[1]
    assert type(part) is np.ndarray
    assert np.shares_memory(part, mapped)
    assert np.array_equal(part, MATRIX[4:8])
    assert DataSet(mapped).hash_list() == DataSet(MATRIX).hash_list()


# Hashes


def test_a_hash_is_32_hexadecimal_digits_and_hash_list_has_them_in_order() -> None:
    made = DataSet(MATRIX).bind(3)
    assert made.hash_list() == [made.hash(0), made.hash(1), made.hash(2)]
    assert made.hash(-1) == made.hash(2)
    assert all(len(found) == 32 and set(found) <= set("0123456789abcdef") for found in made.hash_list())


def test_hashes_taken_by_many_threads_are_those_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = DataSet(MATRIX, slice_size=1).hash_list()
    monkeypatch.setattr(datasets, "PARALLEL_HASH", 1)
    assert DataSet(MATRIX, slice_size=1).hash_list() == alone


@pytest.mark.parametrize("data", [[1, "a", (2.5, None)], MATRIX, np.arange(5), (b"x" * 5000, {"k": [1]})])
def test_equal_data_has_equal_hashes(data: Any) -> None:
    copy = pickle.loads(pickle.dumps(data))
    for slices in (1, 2, 3):
        assert DataSet(data).bind(slices).hash_list() == DataSet(copy).bind(slices).hash_list()


def test_the_hash_of_a_slice_is_of_its_content_and_not_of_its_place_or_memory() -> None:
    twice = np.concatenate([MATRIX, MATRIX])
    first, second = DataSet(twice, slice_size=20).hash_list()
    assert first == second == DataSet(MATRIX).hash(0)
    strided = np.repeat(MATRIX, 2, axis=0)[::2]
    assert DataSet(strided).hash(0) == DataSet(MATRIX).hash(0)


DIFFERENT: list[Any] = [
    [0, 1, 2, 3],
    (0, 1, 2, 3),
    [0.0, 1.0, 2.0, 3.0],
    [False, True, 2, 3],
    ["0", "1", "2", "3"],
    [[0, 1], [2, 3]],
    [0, 1, 2, 3, None],
    np.arange(4),
    np.arange(4, dtype=np.uint64),
    np.arange(4, dtype=np.int32),
    np.arange(4, dtype=">i8"),
    np.arange(4.0),
    np.arange(4.0).reshape(2, 2),
    np.arange(4.0).reshape(4, 1),
    np.asfortranarray(np.arange(4.0).reshape(2, 2).T),
    np.arange(4.0).reshape(2, 2).T.copy(),
    np.arange(4).view("datetime64[D]"),
    np.arange(4).view("datetime64[s]"),
    np.zeros(2000),
    np.zeros(2000, np.int64),
    np.zeros((1000, 2)),
    np.zeros(2001),
    [np.zeros(2000), np.zeros(1000)],
    [np.zeros(1000), np.zeros(2000)],
    [b"\0" * 8000, b"\0" * 16000],
]


def test_other_types_dtypes_shapes_orders_or_bytes_have_other_hashes() -> None:
    hashes = [DataSet(data).hash(0) for data in DIFFERENT]
    assert len(set(hashes)) == len(DIFFERENT)


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=300), st.data())
def test_a_change_of_one_element_changes_the_hash_of_its_slice_alone(values: list[float], data: st.DataObject) -> None:
    array = np.array(values)
    before = DataSet(array, slice_size=40).hash_list()
    place = data.draw(st.integers(0, len(values) - 1))
    array.view(np.uint64)[place] ^= 1
    after = DataSet(array, slice_size=40).hash_list()
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [place // 40]


IN_ANOTHER_PROCESS = """
import numpy as np
from qjam.data.datasets import DataSet
for data in (np.linspace(0, 1, 3000).reshape(1000, 3), [{"a", "b", "cc"}, {"k": (1, 2.5)}, "text" * 900]):
    print(*DataSet(data).bind(3).hash_list())
"""


def test_equal_data_in_two_processes_has_equal_hashes() -> None:
    def said(seed: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    first = said("1")
    assert len(first.split()) == 6
    assert said("2") == first


def test_a_slice_is_found_by_its_hash() -> None:
    made = DataSet(range(10), slice_size=3)
    assert [made.slice_from_hash(found) for found in made.hash_list()] == list(made)
    assert DataSet(range(10), slice_size=3).slice_from_hash(made.hash(2)) == [6, 7, 8]


def test_a_hash_that_no_slice_has_is_a_key_error_that_names_it() -> None:
    with pytest.raises(KeyError, match=r"none of the 4 slices .* hash '00ff'"):
        DataSet(range(10), slice_size=3).slice_from_hash("00ff")


def test_hashes_are_computed_once() -> None:
    class Counting(Squares):
        asked = 0

        def slice(self, index: int) -> int:
            self.asked += 1
            return super().slice(index)

    made = Counting()
    first = made.hash_list()
    assert made.asked == 4
    assert [made.hash(0), *made.hash_list()] == [first[0], *first]
    assert made.asked == 4


def test_threads_that_bind_at_once_get_the_same_object() -> None:
    made = DataSet(range(1000))
    together = threading.Barrier(8)
    found: list[BaseDataSet] = []

    def bind() -> None:
        together.wait(10)
        found.append(made.bind(5))

    threads = [threading.Thread(target=bind) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(bound) for bound in found}) == 1


def test_threads_that_hash_at_once_all_find_every_slice() -> None:
    made = DataSet(range(2000), slice_size=1)
    right = DataSet(range(2000), slice_size=1).hash_list()
    together = threading.Barrier(4)
    wrong: list[object] = []

    def work() -> None:
        together.wait(10)
        if made.hash_list() != right or [made.slice_from_hash(h) for h in right] != [[i] for i in range(2000)]:
            wrong.append(made)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_slice_data_is_the_encoded_slice() -> None:
    encoded = DataSet([1, (2,), "x"], slice_size=2).slice_data(0)
    assert codec.decode(encoded.header, encoded.buffers) == [1, (2,)]


def test_a_slice_that_cannot_be_sent_is_an_error_that_names_its_type() -> None:
    with pytest.raises(codec.CodecError, match="lock"):
        DataSet([threading.Lock()]).hash(0)


# Subclasses


def test_a_subclass_of_two_methods_has_all_the_rest() -> None:
    made = Squares()
    assert len(made) == 4
    assert list(made) == [0, 1, 4, 9]
    assert made[-1] == 9
    assert made.raw_data() == [0, 1, 4, 9]
    assert made.slice_from_hash(made.hash(3)) == 9
    assert made.bind(2) is made


def test_a_subclass_with_a_slice_size_has_that_many_chunks_a_slice() -> None:
    made = Lines(slice_size=4)
    assert len(made) == 3
    assert made[2] == ["line 8", "line 9"]
    assert made.bind(8) is made
    with pytest.raises(ValueError, match="slice_size"):
        Lines(0)


@pytest.mark.parametrize("missing", ["chunks", "slice"])
def test_a_subclass_without_one_of_its_two_methods_cannot_be_made(missing: str) -> None:
    methods = {name: vars(Squares)[name] for name in ("chunks", "slice") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Half", (BaseDataSet,), methods)()


@pytest.mark.parametrize(
    ("chunks", "error", "said"),
    [
        (2.5, TypeError, r"Odd\.chunks\(\) must give an int, not 2\.5"),
        (None, TypeError, "not None"),
        (-1, ValueError, "must not be negative: -1"),
        (0, ValueError, r"data is empty \(Odd\.chunks\(\) is 0\), so there is nothing to map over"),
    ],
)
def test_what_chunks_gives_is_checked(chunks: Any, error: type[Exception], said: str) -> None:
    class Odd(Squares):
        def chunks(self) -> Any:
            return chunks

    with pytest.raises(error, match=said):
        DataSet(Odd())


@pytest.mark.parametrize("made", [DataSet([1, 2, 3]).bind(2), DataSet(MATRIX, slice_size=3), Lines(3), Squares()])
def test_a_data_set_can_be_pickled(made: BaseDataSet) -> None:
    hashes = made.hash_list()
    assert pickle.loads(pickle.dumps(made)).hash_list() == hashes


def test_a_repr_tells_the_state() -> None:
    assert repr(DataSet(MATRIX).bind(8)) == "<NumpyMatrixDataSet: chunks=20, slices=8>"


# Matrices in files


def text_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(params=["text", "csv", "npy"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with MATRIX in it."""
    path = tmp_path / f"matrix.{request.param}"
    if request.param == "npy":
        np.save(path, MATRIX)
    else:
        np.savetxt(path, MATRIX, delimiter="," if request.param == "csv" else " ")
    return path


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_file_has_the_slices_and_hashes_of_its_matrix(file: Path, as_path: Callable[[Path], Any]) -> None:
    made = NumpyMatrixFileDataSet(as_path(file), slice_size=7)
    assert made.chunks() == 20
    assert [part.shape for part in made] == [(7, 3), (7, 3), (6, 3)]
    assert np.array_equal(np.vstack(list(made)), MATRIX)
    assert made.hash_list() == DataSet(MATRIX, slice_size=7).hash_list()
    assert made.raw_data() == as_path(file)


def test_a_file_without_a_slice_size_is_cut_when_it_is_bound(file: Path) -> None:
    made = NumpyMatrixFileDataSet(file)
    assert len(made) == 1
    assert made.bind(8).hash_list() == DataSet(MATRIX).bind(8).hash_list()


def test_slices_of_a_file_are_read_only(file: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        NumpyMatrixFileDataSet(file)[0][0, 0] = 1


def test_a_file_is_found_again_after_the_program_went_elsewhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    made = NumpyMatrixFileDataSet(file.name)
    monkeypatch.chdir("/")
    assert np.array_equal(made[0], MATRIX)


def test_a_file_that_has_changed_is_an_error_that_says_so(file: Path) -> None:
    made = NumpyMatrixFileDataSet(file, slice_size=5)
    assert made[0].shape == (5, 3)
    os.utime(file, ns=(1, 1))
    with pytest.raises(RuntimeError, match=f"{file} has changed since"):
        made.slice(1)


def test_a_npy_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", MATRIX)
    part = NumpyMatrixFileDataSet(tmp_path / "x.npy")[0]
    base: Any = part
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert type(part) is np.ndarray


def test_a_npy_file_keeps_its_dtype_and_is_known_by_content_and_not_by_name(tmp_path: Path) -> None:
    with open(tmp_path / "matrix", "wb") as out:
        np.save(out, MATRIX.astype(">f4"))
    assert NumpyMatrixFileDataSet(tmp_path / "matrix")[0].dtype == np.dtype(">f4")


@pytest.mark.parametrize("kind", ["text", "npy"])
def test_neither_the_pass_over_a_file_nor_a_slice_takes_memory_for_the_whole_matrix(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x"
    if kind == "npy":
        with open(file, "wb") as out:
            np.save(out, np.ones((20_000, 50)))
    else:
        file.write_text(("1.5 " * 50 + "\n") * 20_000)
    tracemalloc.start()
    try:
        made = NumpyMatrixFileDataSet(file, slice_size=100)
        assert made[150].shape == (100, 50)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000  # bytes; the whole is 4 MB as text, 8 MB as numbers, one slice 40 kB


def test_a_slice_of_text_reads_its_own_lines_alone(tmp_path: Path) -> None:
    # Rows far from the wanted ones are no numbers, so reading them would fail.
    rows = [f"{i} {i + 0.5}" for i in range(1000)]
    rows[600] = "no number"
    made = NumpyMatrixFileDataSet(text_file(tmp_path / "x", "\n".join(rows)), slice_size=100)
    for index in (0, 5, 7, 9):
        assert made[index].tolist() == [[i, i + 0.5] for i in range(100 * index, 100 * index + 100)]
    with pytest.raises(ValueError, match=r"rows 600 to 699 \(counted from 0\) cannot be read: .*'no'"):
        made.slice(6)


@given(
    lines=st.lists(st.sampled_from(["row", "", "  ", "# comment", "\t# 1 2"]), max_size=300),
    size=st.integers(1, 99),
)
def test_comments_and_empty_lines_are_left_out_wherever_they_are(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "matrix-with-comments.txt"
    written, rows = [], 0
    for line in [*lines, "row"]:
        written.append(f"{rows} {-rows} # the row" if line == "row" else line)
        rows += line == "row"
    made = NumpyMatrixFileDataSet(text_file(path, "\n".join(written)), slice_size=size)
    assert made.chunks() == rows
    assert np.vstack(list(made)).tolist() == [[i, -i] for i in range(rows)]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("1 2\n3 4\n", {}),
        ("1 2\n3 4", {}),
        ("1 2\r\n3 4\r\n", {}),
        ("\ufeff1 2\n3 4\n", {}),
        ("# caf\u00e9\n 1\t2 \n3 4\n", {}),
        ("1,2\n3,4\n", {}),
        ("1, 2\n3, 4\n", {}),
        ("1;2\n3;4\n", {"delimiter": ";"}),
        ("1.00e+0 2\n3 4\n", {"dtype": np.float32}),
        ("1 2\n3 4\n", {"dtype": "int64"}),
    ],
)
def test_text_comes_in_many_forms(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    path = tmp_path / "x"
    path.write_bytes(text.encode())
    made = NumpyMatrixFileDataSet(path, slice_size=1, **options)
    assert [part.tolist() for part in made] == [[[1, 2]], [[3, 4]]]
    assert made[0].dtype == options.get("dtype", np.float64)


def test_one_column_of_text_is_still_a_matrix(tmp_path: Path) -> None:
    assert [part.shape for part in NumpyMatrixFileDataSet(text_file(tmp_path / "x", "1\n2\n3\n"), 2)] == [
        (2, 1),
        (1, 1),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows, so there is nothing to map over"),
        ("\n# nothing\n", "has no rows, so there is nothing to map over"),
        ("a,b\n1,2\n", "row 0 .* cannot be read: could not convert string 'a'"),
        ("\x1f\x8b\x08 zipped", "row 0 .* cannot be read"),
    ],
)
def test_text_that_is_no_matrix_is_an_error_at_once(tmp_path: Path, text: str, said: str) -> None:
    path = text_file(tmp_path / "x", text)
    with pytest.raises(ValueError, match=f"^{path}:? {said}"):
        NumpyMatrixFileDataSet(path)


def test_rows_of_another_length_are_an_error_that_names_them(tmp_path: Path) -> None:
    made = NumpyMatrixFileDataSet(text_file(tmp_path / "x", "1 2\n3 4\n5 6 7\n8 9 1\n"), slice_size=2)
    assert made[0].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"rows 2 to 3 \(counted from 0\): 3 columns, where row 0 has 2"):
        made.hash_list()
    with pytest.raises(ValueError, match=r"rows 0 to 3 .* number of columns changed from 2 to 3"):
        NumpyMatrixFileDataSet(tmp_path / "x").slice(0)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((0, 3)), "has no rows, so there is nothing to map over"),
        (np.array(3.0), "holds one value, not a matrix"),
        (np.array([None, 1]), "cannot be mapped as an array: .*Python objects"),
    ],
)
def test_a_npy_file_that_is_no_matrix_is_an_error_at_once(tmp_path: Path, array: np.ndarray, said: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=said):
        NumpyMatrixFileDataSet(tmp_path / "x.npy")


def test_a_npy_file_that_was_cut_off_is_an_error_at_once(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", MATRIX)
    whole = (tmp_path / "x.npy").read_bytes()
    for length in (6, 100, len(whole) - 1):
        (tmp_path / "x.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be mapped as an array"):
            NumpyMatrixFileDataSet(tmp_path / "x.npy")


@pytest.mark.parametrize("options", [{"delimiter": ","}, {"dtype": np.float32}])
def test_options_for_text_are_not_silently_ignored_for_npy(tmp_path: Path, options: dict[str, Any]) -> None:
    np.save(tmp_path / "x.npy", MATRIX)
    with pytest.raises(ValueError, match="delimiter and dtype are for text files only"):
        NumpyMatrixFileDataSet(tmp_path / "x.npy", **options)


def test_a_file_that_is_not_there_is_pythons_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        NumpyMatrixFileDataSet(tmp_path / "nowhere")


@pytest.mark.parametrize("path", [3, None, b"x", MATRIX])
def test_a_path_is_a_text_or_a_path(path: Any) -> None:
    with pytest.raises(TypeError, match="path must be the name of a file, not "):
        NumpyMatrixFileDataSet(path)


# What is not accepted


class DataFrame:
    """As much of pandas as matters."""

    def to_numpy(self) -> np.ndarray:
        return MATRIX


class Tensor:
    """As much of torch as matters."""

    def __array__(self) -> np.ndarray:
        return MATRIX


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataFrame(), r"a DataFrame; pass data\.to_numpy\(\)"),
        (Tensor(), r"a Tensor; pass numpy\.asarray\(data\)"),
        ("text", r"a str; for its lines pass data\.splitlines\(\)"),
        (b"bytes", r"a bytes; pass numpy\.frombuffer"),
        ({"a": 1}, r"a dict; pass list\(data\.items\(\)\)"),
        ({1, 2}, r"a set; pass sorted\(data\)"),
        ((i for i in "ab"), r"a generator; pass list\(data\)"),
        (3, r"3 \(int\); for one value alone use params"),
        (2.5, r"2\.5 \(float\); for one value"),
        (True, r"True \(bool\); for one value"),
        (np.float64(2.5), r".*2\.5.* \(float64\); for one value"),
        (None, r"None; leave the data set out of run\(\)"),
        (object(), "an object$"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_other_data_is_a_type_error_that_says_what_is_accepted_and_what_was_meant(data: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"^data must be a list, a tuple, a range, a numpy array.* not {said}"):
        DataSet(data)


def test_a_0_d_array_has_no_rows_and_a_1_d_array_no_columns() -> None:
    with pytest.raises(ValueError, match=r"^data has 0 dimensions and so no rows.*params"):
        DataSet(np.array(3.0))
    with pytest.raises(ValueError, match=r"^data has 1 dimensions and so no columns"):
        NumpyMatrixDataSet(np.arange(3), row_major=False)


@pytest.mark.parametrize("data", [[], (), range(0), np.zeros(0), np.zeros((0, 5))])
@pytest.mark.parametrize("slice_size", [None, 4])
def test_empty_data_is_an_error_that_says_why_and_what_to_do(data: Any, slice_size: int | None) -> None:
    with pytest.raises(ValueError, match=r"^data is empty, so there is nothing to map over.* once on each worker"):
        DataSet(data, slice_size=slice_size)


def test_no_columns_are_empty_data() -> None:
    with pytest.raises(ValueError, match=r"^data is empty"):
        NumpyMatrixDataSet(np.zeros((5, 0)), row_major=False)


@pytest.mark.parametrize("data", [[1, 2], MATRIX])
@pytest.mark.parametrize(
    ("slice_size", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        (True, TypeError),
        ("4", TypeError),
        (np.True_, TypeError),
    ],
)
def test_a_slice_size_is_an_int_of_at_least_1_or_none(data: Any, slice_size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^slice_size must be an int of at least 1 or None, not "):
        DataSet(data, slice_size=slice_size)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (ListDataSet, MATRIX, "a list, a tuple or a range, not a ndarray"),
        (NumpyMatrixDataSet, [1], "a numpy array"),
    ],
)
def test_each_kind_takes_its_own_data_alone(kind: Callable[[Any], Any], data: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"^data must be {said}"):
        kind(data)
