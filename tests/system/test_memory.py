"""What a round costs in memory, and what user code may do with the memory that it is given."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import arraycode
import gather
import pyzmq_garbage  # noqa: F401
import qjam_worker.ipc.files
from gates import Gate
from processes import descendants, output, parent, traces
from qjam import DataSet, Master, TaskError

CORES = len(os.sched_getaffinity(0))
MB = 1_000_000


@pytest.fixture(scope="module")
def master():
    with Master(2) as master:
        yield master


# One copy on a host


def used(folders: set[Path]) -> int:
    """Bytes that this process and all below it use, each page counted once, with all that is in `folders`."""
    total = 0
    for pid in descendants(os.getpid()) | {os.getpid()}:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        fields = dict(line.split(":") for line in lines)
        total += sum(int(fields[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_File"))
    return total + sum(file.stat().st_blocks * 512 for folder in folders for file in folder.iterdir())


def memory_in_round(master, array, gates):
    """What is used while all workers are in user code with the params."""
    here, go_on = gates
    results = []
    run = threading.Thread(
        target=lambda: results.append(master.run(arraycode.touch_and_wait, (array, here.path, go_on.path)))
    )
    run.start()
    workers = len(master.workers)
    for _ in range(workers):
        assert float(here.heard()) == len(array)
    gc.collect()
    found = used(traces(os.getpid()).folders)
    go_on.open(workers)
    run.join()
    assert results == [workers * len(array)]
    return found


def test_200_mb_of_params_to_8_workers_cost_little_more_than_one_copy(tmp_path):
    array = np.ones(200 * MB // 8)
    two = Gate(tmp_path / "here"), Gate(tmp_path / "go_on")
    with Master(8) as master:
        before = memory_in_round(master, array[:10], two)
        with_params = memory_in_round(master, array, two)
        after = memory_in_round(master, array[:10], two)
    for gate in two:
        gate.close()
    assert 0.95 * array.nbytes < with_params - before < 1.2 * array.nbytes
    assert after - before < 0.2 * array.nbytes


def test_a_data_set_is_on_the_host_once_however_many_workers_use_it(tmp_path):
    values = np.ones((100, 100_000))
    data = DataSet(values, slice_size=5)
    with Master(8) as master:
        master.run(lambda params, part: 1.0)
        before = used(traces(os.getpid()).folders)
        for _ in range(5):
            assert master.run(lambda params, part: float(part.sum()), None, data) == values.size
        gc.collect()
        assert used(traces(os.getpid()).folders) - before < 1.3 * values.nbytes


def test_close_gives_the_memory_of_the_data_set_back():
    with Master(2) as master:
        master.run(lambda params, part: float(part.sum()), None, np.ones((8, 100_000)))
        folders = traces(os.getpid()).folders
    maps = Path("/proc/self/maps").read_text()
    assert not [line for line in maps.splitlines() if any(str(folder) in line for folder in folders)]


def test_files_of_results_and_params_do_not_pile_up():
    with Master(2) as master:
        (folder,) = {folder for folder in traces(os.getpid()).folders if "shm" in str(folder)}

        def megabytes():
            return sum(file.stat().st_size for file in folder.iterdir()) / MB

        master.run(lambda params, part: params, np.ones(MB))
        before = megabytes()
        for _ in range(10):
            master.run(lambda params, part: params, np.ones(MB))
        assert megabytes() < before + 9


# Read-only views

SIZES = [10, 10_000, MB]


@pytest.mark.parametrize("size", SIZES)
def test_writing_to_params_is_numpys_error(master, size):
    def write(params, part):
        params[0] = 1

    with pytest.raises(TaskError, match="assignment destination is read-only") as caught:
        master.run(write, np.zeros(size))
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("size", SIZES)
def test_writing_to_a_slice_is_numpys_error(master, size):
    def write(params, part):
        part += 1

    with pytest.raises(TaskError, match="output array is read-only"):
        master.run(write, None, np.zeros((2, size)))


@pytest.mark.parametrize("size", SIZES)
def test_arrays_inside_params_and_slices_are_read_only_too(master, size):
    def flags(params, part):
        return [array.flags.writeable for array in (params["a"][0], params["b"][1], part[0]["c"])]

    zeros = np.zeros(size)
    assert master.run(flags, {"a": (zeros,), "b": [1, zeros]}, [{"c": zeros}]) == [False] * 3


@pytest.mark.parametrize("size", SIZES)
def test_a_view_cannot_be_made_writable(master, size):
    def unlock(params, part):
        params.flags.writeable = True

    with pytest.raises(TaskError, match="cannot set WRITEABLE flag to True"):
        master.run(unlock, np.zeros(size))


def test_a_list_that_user_code_alters_is_whole_again_for_the_next_slice_and_round(master):
    def alter(params, part):
        params.append(1)
        part.append(1)
        return len(params), len(part)

    data = DataSet([1, 2, 3, 4], slice_size=1)
    for _ in range(3):
        assert master.run(alter, [0], data) == (8, 8)


# Views that outlive their round


@pytest.mark.parametrize("size", [1, 100, 20_000, MB])
def test_params_that_user_code_keeps_do_not_change(master, size):
    def keep(params, part):
        vars(sys).setdefault(f"kept{len(params)}", []).append(params)
        return [float(kept.sum()) / len(params) for kept in vars(sys)[f"kept{len(params)}"]]

    for turn in range(1, 6):
        expected = [2.0 * number for number in range(1, turn + 1)]
        assert master.run(keep, np.full(size, float(turn))) == expected


def test_slices_that_user_code_keeps_do_not_change(master):
    def keep(params, part):
        vars(sys).setdefault("kept_slices", []).append(part)
        return [float(kept.sum()) for kept in vars(sys)["kept_slices"]]

    assert master.run(keep, None, np.full((2, 1000), 1.0)) == [2000.0]
    assert master.run(keep, None, np.full((2, 1000), 2.0)) == [2000.0, 4000.0]
    assert master.run(keep, None, np.full((2, 1000), 3.0)) == [2000.0, 4000.0, 6000.0]


# Where there is no room


def test_without_room_in_shared_memory_files_lie_on_disk(monkeypatch):
    monkeypatch.setattr(qjam_worker.ipc.files, "_free", lambda directory: 0)

    def paths(part):
        return {line.split()[-1] for line in open("/proc/self/maps") if "/qjam-" in line}

    with Master(2) as master:
        found = master.run(gather, paths, np.ones((2, 100_000)))
    on_disk = os.path.join(tempfile.gettempdir(), "qjam-")
    assert all(path.startswith(on_disk) for paths in found for path in paths)


SMALL = """
    import os, sys
    import numpy as np
    from qjam import DataSet, Master, QjamError

    def work(params, part):
        return params * part.sum()

    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 8 << 20
    params, data = np.arange(2_500_000.0), np.ones((4, 600_000))
    with Master(2) as master:
        for _ in range(2):
            result = master.run(work, params, DataSet(data, slice_size=1))
            print(np.array_equal(result, params * data.size))
    """


def in_a_small_machine(folder: Path, source: str, disk: str = "") -> str:
    """What a script prints where /dev/shm has 8 MiB; `disk`: options of what is its temporary folder."""
    mount = "mount -t tmpfs -o size=8m none /dev/shm"
    if disk:
        mount += f" && mount -t tmpfs -o {disk} none {folder}/tmp"
    possible = subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /dev/shm"], capture_output=True, check=False
    )
    if possible.returncode:
        pytest.skip("this machine lets nobody mount a small /dev/shm")
    launcher = f"""
    import subprocess, sys
    mount = {mount!r} + ' && exec "$@"'
    sys.exit(subprocess.call(["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "inner.py"]))
    """
    (folder / "inner.py").write_text(textwrap.dedent(source))
    return output(folder, launcher)


def test_params_slices_and_results_larger_than_dev_shm_go_through_the_disk(tmp_path):
    assert in_a_small_machine(tmp_path, SMALL) == "True\nTrue\n"


def test_where_nothing_has_room_the_error_says_so_and_the_pool_goes_on(tmp_path):
    source = """
    import numpy as np
    from qjam import Master, QjamError

    with Master(2) as master:
        for arguments in [(np.ones(2_500_000),), (None, np.ones((2, 1_250_000)))]:
            try:
                master.run(lambda params, part: 1, *arguments)
            except QjamError as error:
                print(type(error).__name__, error)
            print(master.run(lambda params, part: 42))
        try:
            master.run(lambda params, part: np.ones(2_500_000))
        except QjamError as error:
            print(type(error).__name__, str(error).splitlines()[0])
        print(master.run(lambda params, part: 42))
    """
    lines = in_a_small_machine(tmp_path, source, "size=8m").splitlines()
    assert [line for line in lines if line == "84"] == ["84"] * 3
    told = [line for line in lines if line != "84"]
    assert len(told) == 3
    assert all("no room for" in line and "local" in line for line in told), told


# Threads of BLAS

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def environment_at_start(pid: int) -> dict[str, str]:
    """The environment that a process was started with, before any of its code ran."""
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_blas_of_each_worker_gets_its_share_of_the_cores_before_numpy_is_imported(monkeypatch, workers):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with Master(workers) as master:
        warm = environment_at_start(parent(master.workers[0].pid))
        seen = master.run(gather, lambda part: os.environ["OPENBLAS_NUM_THREADS"])
    share = str(max(1, CORES // workers))
    assert {name: warm.get(name) for name in VARIABLES} == dict.fromkeys(VARIABLES, share)
    assert seen == [share] * workers


def test_what_the_user_has_said_of_blas_threads_holds(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with Master(CORES) as master:
        warm = environment_at_start(parent(master.workers[0].pid))
    assert warm["OMP_NUM_THREADS"] == "7"
    assert warm["MKL_NUM_THREADS"] == "1"
