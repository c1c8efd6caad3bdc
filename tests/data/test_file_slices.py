"""Data that lies in a file which its hosts see as well: mapped there and not sent, unless it is not the same file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gather
import pyzmq_garbage  # noqa: F401
from qjam import BaseDataSet, DataSet, Master, NumpyMatrixDataSet, NumpyMatrixFileDataSet
from qjam_worker.ipc import file_slices
from qjam_worker.ipc.file_slices import FileSlice, identify
from qjam_worker.ipc.files import Files
from qjam_worker.node.slice_index import SliceIndex
from qjam_worker.node.store import Store
from ssh_hosts import home, ssh_host  # noqa: F401
from sshd import Sshd, write_config

MATRIX = np.arange(60_000.0).reshape(2000, 30)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.npy"
    np.save(path, MATRIX)
    return path


@pytest.fixture(scope="module")
def master() -> Iterator[Master]:
    with Master(3) as master:
        yield master


def sent(master: Master, data: Any, expected: float = float(MATRIX.sum())) -> int:
    """Bytes that a round over the data sends; its sum is checked."""
    before = master.stats().dataset_sent
    assert master.run(lambda params, part: float(part.sum()), None, data) == expected
    return master.stats().dataset_sent - before


# Without being sent


@pytest.mark.parametrize("slice_size", [None, 7, 2000])
def test_a_npy_file_is_not_sent_to_a_host_that_sees_it(master: Master, file: Path, slice_size: int | None) -> None:
    data = NumpyMatrixFileDataSet(file, slice_size)
    assert [sent(master, data) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("load", "of"),
    [
        (lambda file: np.load(file, mmap_mode="r"), MATRIX),
        (lambda file: np.load(file, mmap_mode="r")[100:-5], MATRIX[100:-5]),
        (lambda file: np.asarray(np.load(file, mmap_mode="r")), MATRIX),
        (lambda file: np.load(file, mmap_mode="r").reshape(-1, 5, 3), MATRIX),
        (lambda file: np.memmap(file, np.float64, "r", offset=128 + 30 * 8, shape=(500, 30)), MATRIX[1:501]),
    ],
    ids=["load", "part", "array", "reshaped", "memmap"],
)
def test_an_array_that_is_mapped_from_a_file_is_not_sent(
    master: Master, file: Path, load: Callable[[Path], Any], of: Any
) -> None:
    assert sent(master, load(file), float(of.sum())) == 0


def test_parts_come_as_they_would_if_they_were_sent(master: Master, tmp_path: Path) -> None:
    records = np.zeros(900, [("a", "<f8"), ("b", "S5"), ("c", ">i4", (3,))])
    records["a"] = np.arange(900)
    np.save(tmp_path / "records.npy", records)
    data, before = NumpyMatrixFileDataSet(tmp_path / "records.npy"), master.stats().dataset_sent

    def tell(part: Any) -> Any:
        return type(part), part.dtype, part.shape, part.flags.writeable, part.tobytes()

    assert master.run(gather, tell, data) == master.run(gather, tell, records[::-1][::-1].copy())
    assert master.stats().dataset_sent == before
    assert master.run(lambda params, part: part["a"].sum(), None, data) == records["a"].sum()


def test_the_parts_are_views_of_the_file_and_no_copy(master: Master, tmp_path: Path) -> None:
    file = tmp_path / "negative.npy"
    np.save(file, -MATRIX)  # slices that are equal to those of another file are found there

    def is_mapped(part: Any) -> bool:
        part.sum()
        with open("/proc/self/maps") as lines:
            return any(line.endswith(f" {file}\n") for line in lines)

    assert master.run(gather, is_mapped, NumpyMatrixFileDataSet(file)) == [True, True, True]


def test_a_host_that_is_reached_by_ssh_maps_the_file_too(
    file: Path,
    tmp_path: Path,
    ssh_host: Callable[..., Sshd],
) -> None:
    config = write_config(tmp_path / "config", [ssh_host()])
    with Master("testhost*2", ssh_config=config) as master:
        assert sent(master, NumpyMatrixFileDataSet(file)) == 0


# Sent all the same


@pytest.mark.parametrize(
    ("load", "salt"),
    [
        (lambda file: np.load(file), 1),
        (lambda file: np.load(file, mmap_mode="c"), 2),
        (lambda file: np.load(file, mmap_mode="r+"), 3),
        (lambda file: np.load(file, mmap_mode="r").T, 4),
        (lambda file: np.load(file, mmap_mode="r")[::-1], 5),
    ],
    ids=["in memory", "copy on write", "to be written", "in another order", "backwards"],
)
def test_what_does_not_lie_in_the_file_as_it_is_sent_is_sent(
    master: Master, file: Path, load: Callable[[Path], Any], salt: int
) -> None:
    np.save(file, MATRIX * salt - 1)  # nothing that another test has sent
    data = DataSet(load(file)).bind(3)
    assert data.in_file() is None
    assert sent(master, data, float((MATRIX * salt - 1).sum())) >= MATRIX.nbytes


def test_a_file_in_text_is_sent(master: Master, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "matrix.txt", MATRIX[:300] + 0.25)
    assert sent(master, NumpyMatrixFileDataSet(tmp_path / "matrix.txt"), float((MATRIX[:300] + 0.25).sum())) > 0


def test_a_file_that_is_gone_or_another_by_now_is_sent_from_memory(master: Master, file: Path) -> None:
    np.save(file, MATRIX + 0.5)
    data = np.load(file, mmap_mode="r")
    os.unlink(file)
    assert DataSet(data).bind(3).in_file() is None
    np.save(file, MATRIX)
    assert DataSet(data).bind(3).in_file() is None
    assert sent(master, data, float((MATRIX + 0.5).sum())) > 0


@pytest.fixture
def lookalike(file: Path, tmp_path: Path) -> Path:
    """Another file: only its inode, one number, and the time that nobody can set differ from those of `file`."""
    other = MATRIX.copy()
    other.flat[734] += 1
    np.save(tmp_path / "other.npy", other)
    status = os.stat(file)
    os.utime(tmp_path / "other.npy", ns=(status.st_atime_ns, status.st_mtime_ns))
    return tmp_path / "other.npy"


def test_a_lookalike_that_took_the_name_is_not_the_file_that_is_mapped(file: Path, lookalike: Path) -> None:
    data = np.load(file, mmap_mode="r")
    os.replace(lookalike, file)
    assert DataSet(data).bind(3).in_file() is None


def test_a_lookalike_that_takes_the_name_while_the_master_looks_is_noticed(
    file: Path, lookalike: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_and_identify(path: str) -> Any:
        os.replace(lookalike, path)
        return identify(path)

    monkeypatch.setattr("qjam.data.file_slices.identify", replace_and_identify)
    assert DataSet(np.load(file, mmap_mode="r")).bind(3).in_file() is None


def test_a_file_that_changes_before_a_host_looks_at_it_is_sent_from_memory(master: Master, file: Path) -> None:
    np.save(file, MATRIX + 0.75)
    data = DataSet(np.load(file, mmap_mode="r")).bind(3)
    data.in_file()
    os.unlink(file)
    np.save(file, MATRIX)
    assert sent(master, data, float((MATRIX + 0.75).sum())) > 0


def test_a_file_that_others_can_write_to_is_sent(master: Master, file: Path) -> None:
    np.save(file, MATRIX * 11)
    file.chmod(0o666)
    assert sent(master, NumpyMatrixFileDataSet(file), float((MATRIX * 11).sum())) > MATRIX.nbytes


def test_what_is_written_through_a_map_that_is_still_open_is_not_seen_later(master: Master, file: Path) -> None:
    writer = np.lib.format.open_memmap(file, "w+", np.float64, MATRIX.shape)
    writer[:] = MATRIX + 13
    data = NumpyMatrixFileDataSet(file)
    assert sent(master, data, float((MATRIX + 13).sum())) > MATRIX.nbytes
    writer[5] = 0
    assert sent(master, data, float((MATRIX + 13).sum())) == 0


@pytest.mark.parametrize("asked", ["hash_list", "hash"])
def test_a_file_that_changes_once_it_is_hashed_and_gets_its_time_back_is_an_error(
    master: Master, file: Path, asked: str
) -> None:
    np.save(file, MATRIX * 17)
    data = NumpyMatrixFileDataSet(file).bind(3)
    data.hash_list() if asked == "hash_list" else [data.hash(index) for index in range(3)]
    before = os.stat(file)
    with open(file, "r+b") as changed:
        changed.seek(20_001)
        changed.write(b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RuntimeError, match="slice 0 of the data set changed since it was hashed: make a new DataSet"):
        master.run(lambda params, part: part.sum(), None, data)
    assert master.run(lambda params, part: len(part), None, [1]) == 1


def test_a_file_that_gets_a_link_or_another_mode_goes_on(master: Master, file: Path, tmp_path: Path) -> None:
    np.save(file, MATRIX * 19)
    data = NumpyMatrixFileDataSet(file)
    assert sent(master, data, float((MATRIX * 19).sum())) == 0
    os.link(file, tmp_path / "link")
    file.chmod(0o600)
    assert sent(master, data, float((MATRIX * 19).sum())) > 0


def test_a_file_that_changes_between_rounds_is_an_error(master: Master, file: Path) -> None:
    np.save(file, MATRIX * 7)
    data = NumpyMatrixFileDataSet(file)
    assert sent(master, data, float((MATRIX * 7).sum())) == 0
    np.save(file, MATRIX + 1)
    with pytest.raises(RuntimeError, match="has changed"):
        master.run(lambda params, part: part.sum(), None, data)


def test_the_same_data_from_memory_goes_on_when_the_file_has_changed(master: Master, file: Path) -> None:
    np.save(file, MATRIX - 3)
    assert sent(master, NumpyMatrixFileDataSet(file), float((MATRIX - 3).sum())) == 0
    data = DataSet(MATRIX - 3)
    assert sent(master, data, float((MATRIX - 3).sum())) == 0
    os.unlink(file)
    assert sent(master, data, float((MATRIX - 3).sum())) > 0


# Whether a file is the same


def test_the_identity_of_a_file_is_that_of_no_copy_and_of_no_later_content(file: Path, tmp_path: Path) -> None:
    identity, stamp = identify(str(file))
    assert stamp == file_slices.stamp(str(file))
    assert identify(str(file))[0] == identity
    status = os.stat(file)
    times = (status.st_atime_ns, status.st_mtime_ns)
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=times)
    assert identify(str(copy))[0] != identity
    with open(file, "r+b") as same:
        os.pwrite(same.fileno(), b"\1", 9000)
    os.utime(file, ns=times)
    assert os.stat(file).st_mtime_ns == status.st_mtime_ns
    assert identify(str(file))[0] != identity


def test_a_file_on_another_machine_is_another_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, _ = identify(str(file))
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(file_slices, "BOOT", str(tmp_path / "boot"))
    assert identify(str(file))[0] != identity
    monkeypatch.setattr(file_slices, "BOOT", str(tmp_path / "none"))
    with pytest.raises(OSError, match="none"):
        identify(str(file))


def test_a_file_that_somebody_may_write_to_has_no_identity(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(file, "r+b") as writer:
        with pytest.raises(OSError, match="somebody may be writing"):
            identify(str(file))
        mapped = mmap.mmap(writer.fileno(), 0)
    with pytest.raises(OSError, match="somebody may be writing"):
        identify(str(file))
    mapped.close()
    identify(str(file))

    def refuse(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(file_slices.fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="somebody may be writing"):
        identify(str(file))  # nobody can tell, and it has just been made
    monkeypatch.setattr(file_slices, "SETTLED", 0.0)
    identify(str(file))


def test_a_file_that_others_could_change_or_replace_is_not_safe(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "file"
    file.write_bytes(b"content")
    assert file_slices.is_safe(str(file))
    for mode in (0o620, 0o602, 0o666):
        file.chmod(mode)
        assert not file_slices.is_safe(str(file))
    file.chmod(0o644)
    for mode, safe in ((0o770, False), (0o707, False), (0o777, False), (0o1777, True), (0o755, True)):
        folder.chmod(mode)
        assert file_slices.is_safe(str(file)) is safe
    (tmp_path / "link").symlink_to(folder)
    assert not file_slices.is_safe(str(tmp_path / "link" / "file"))
    assert not file_slices.is_safe(str(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_or_folder_of_another_user_is_not_safe(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "file"
    file.write_bytes(b"content")
    for path in (file, tmp_path / "folder"):
        os.chown(path, 12345, -1)
        assert not file_slices.is_safe(str(file))
        os.chown(path, 0, -1)
    assert file_slices.is_safe(str(file))


@pytest.fixture
def slices(tmp_path: Path) -> Iterator[SliceIndex]:
    files = Files.make([str(tmp_path)])
    yield SliceIndex(Store(files, 1 << 20))
    files.remove()


def announced(file: Path, **changes: Any) -> dict[str, Any]:
    """A master's words for two slices in a file."""
    found = NumpyMatrixFileDataSet(file).bind(2).in_file()
    assert found is not None
    return found.announcement([0, 1]) | changes


def test_a_node_has_the_slices_of_a_file_that_is_the_same_here(slices: SliceIndex, file: Path) -> None:
    slices.learn(1, announced(file), {0: "a", 1: "b"})
    assert ("a" in slices, "b" in slices, "c" in slices) == (True, True, False)
    place, size = slices.where("b")
    assert isinstance(place, FileSlice)
    assert size == MATRIX.nbytes // 2
    assert np.array_equal(file_slices.loader(place)(), MATRIX[1000:])


def test_what_else_may_be_at_its_path_is_nothing_to_a_node(slices: SliceIndex, file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "nothing", "/dev/zero", "a\0b"):
        slices.learn(1, announced(file, path=str(path)), {0: "a", 1: "b"})
    slices.learn(1, announced(file, identity=b"another"), {0: "a", 1: "b"})
    assert "a" not in slices


def test_a_file_that_changes_has_no_slices_any_more(slices: SliceIndex, file: Path) -> None:
    slices.learn(1, announced(file), {0: "a", 1: "b"})
    place, _ = slices.where("a")
    os.utime(file, ns=(0, 0))
    assert "a" not in slices
    assert isinstance(place, FileSlice)
    with pytest.raises(RuntimeError, match=r"matrix\.npy has changed"):
        file_slices.loader(place)


def test_a_slice_that_nobody_names_is_not_here_any_more(slices: SliceIndex, file: Path) -> None:
    slices.learn(1, announced(file), {0: "a", 1: "b"})
    place, _ = slices.where("a")
    assert slices.drop("a") is place
    assert slices.drop("a") is None
    assert ("a" in slices, "b" in slices) == (False, True)


@pytest.mark.parametrize("part", [[0, 0, MATRIX.nbytes, MATRIX.nbytes], [5, 0, 0, 8]])
def test_slices_that_cannot_lie_in_the_file_are_refused(slices: SliceIndex, file: Path, part: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot lie"):
        slices.learn(1, announced(file, parts=[part]), {0: "a", 1: "b"})


def test_a_data_set_of_ones_own_lies_in_no_file() -> None:
    class Own(BaseDataSet):
        def chunks(self) -> int:
            return 1

        def slice(self, index: int) -> Any:
            return 0

    assert Own().in_file() is None
    assert NumpyMatrixDataSet(MATRIX).in_file() is None
