"""Master(keep_data=...): a program that comes after finds its slices on the hosts' disks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gather
import pyzmq_garbage  # noqa: F401
import usercode
from faults import node_of, send
from processes import all_end, start
from qjam import DataSet, HostSpec, Master
from qjam.arguments import keep_data_bytes
from ssh_hosts import furnished, home, ssh_host, with_parts_of  # noqa: F401
from sshd import Sshd, write_config

NSLICES = 8
SLICE = 160_000 + 64  # bytes, at least, as sent
BACK_S = 30.0

PROGRAM = """
import logging, sys
import numpy as np
from qjam import DataSet, Master

def slice_maps(params, part):
    with open("/proc/self/maps") as maps:
        return [part.sum() * params], [line.split()[-1] for line in maps if "/qjam-" in line and "/ref" not in line]

if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
    host, config, keep, seed = sys.argv[1], sys.argv[2] or None, eval(sys.argv[3]), int(sys.argv[4])
    data = np.random.default_rng(seed).standard_normal((8, 20_000))
    with Master(host, ssh_config=config, keep_data=keep) as master:
        sums, maps = [], set()
        for factor in (1.0, 2.0):
            one, paths = zip(*[
                master.run(slice_maps, factor, DataSet(data[index:index + 1])) for index in range(8)
            ])
            sums += [value for (value,) in one]
            maps.update(path for found in paths for path in found)
        assert sums == [row.sum() * factor for factor in (1.0, 2.0) for row in data]
        stats = master.stats()
        print("SENT", stats.dataset_sent)
        print("KEPT", sum("/qjam/data/qjam-" in path for path in maps))
"""


class Programs:
    """Programs that come one after the other, on this machine or on a host."""

    def __init__(self, folder: Path, cache: Path, sshd: Sshd | None) -> None:
        self.folder = folder
        self.kept = cache / "qjam" / "data"
        self.where = ("local*2", "") if sshd is None else ("testhost*2", str(sshd.config))

    def start(self, keep: object = True, seed: int = 1, name: str = "one") -> subprocess.Popen[str]:
        (self.folder / name).mkdir(exist_ok=True)
        return start(self.folder / name, PROGRAM, *self.where, repr(keep), seed)

    def finish(self, program: subprocess.Popen[str]) -> tuple[int, int, list[str]]:
        """Bytes of data that were sent, slices that were mapped from the directory, and what was told."""
        printed, errors = program.communicate()
        assert program.returncode == 0, errors
        assert not errors
        (sent,), (kept,) = re.findall(r"SENT (\d+)", printed), re.findall(r"KEPT (\d+)", printed)
        return int(sent), int(kept), re.findall("LOG (.*)", printed)

    def run(self, keep: object = True, seed: int = 1) -> tuple[int, int, list[str]]:
        return self.finish(self.start(keep, seed))

    def files(self) -> list[Path]:
        return sorted(self.kept.glob("slices/*"), key=lambda path: (path.stat().st_mtime_ns, path.name))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the programs of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sshd(tmp_path: Path, furnished: Path, ssh_host: Callable[..., Sshd]) -> Sshd:
    """A host that keeps nothing yet."""
    return ssh_host(home=with_parts_of(furnished, tmp_path / "home"))


@pytest.fixture(params=["local", "ssh"])
def programs(request: pytest.FixtureRequest, tmp_path: Path) -> Programs:
    if request.param == "local":
        return Programs(tmp_path, request.getfixturevalue("cache"), None)
    sshd = request.getfixturevalue("sshd")
    return Programs(tmp_path, sshd.home / ".cache", sshd)


@pytest.fixture
def local(tmp_path: Path, cache: Path) -> Programs:
    return Programs(tmp_path, cache, None)


# ---- one program after the other ------------------------------------------------------------------------------


def test_a_second_program_is_sent_nothing_and_maps_what_is_kept(programs: Programs) -> None:
    sent, kept, said = programs.run()
    assert sent > NSLICES * SLICE
    assert (kept, said) == (0, [])
    assert len(programs.files()) == NSLICES
    assert programs.run() == (0, NSLICES, [])
    assert programs.run(keep="100MB") == (0, NSLICES, [])
    assert set(os.listdir(programs.kept)) == {"slices", "used"}


def test_a_damaged_slice_is_told_of_and_fetched_again(programs: Programs) -> None:
    everything, _, _ = programs.run()
    flipped, short, swapped, other, *_ = programs.files()
    for path in (flipped, short):
        path.chmod(0o600)
    content = bytearray(flipped.read_bytes())
    content[70_000] ^= 4
    flipped.write_bytes(content)
    os.truncate(short, 100_000)
    middle = swapped.with_name("middle")
    for old, new in ((swapped, middle), (other, swapped), (middle, other)):
        old.rename(new)
    sent, kept, said = programs.run()
    assert sent == everything // 2
    assert kept == NSLICES // 2
    assert len(said) == 3  # of the first, the second and the fourth
    for line in said:
        assert re.search(r"/qjam/data/slices/[0-9a-f]{32} is .*; it was removed, and is fetched again", line), line
    assert said[2].endswith("(4 so far)")
    assert programs.run() == (0, NSLICES, [])


def test_without_it_nothing_stays(programs: Programs) -> None:
    everything, kept, said = programs.run(keep=False)
    assert (kept, said) == (0, [])
    assert not programs.kept.exists()
    assert programs.run(keep=False) == (everything, 0, [])


def test_without_it_nothing_that_is_kept_is_used(local: Programs) -> None:
    everything, _, _ = local.run()
    assert local.run(keep=False) == (everything, 0, [])
    assert local.run() == (0, NSLICES, [])


def test_what_does_not_fit_the_quota_is_sent_again(local: Programs) -> None:
    everything, _, said = local.run(keep=1_000_000)  # there is room for six slices
    assert len(said) == 1
    assert said[0].startswith("local: ")
    assert "has no room for more slices" in said[0]
    assert len(local.files()) == 6
    sent, kept, _ = local.run(keep=1_000_000)
    assert (sent, kept) == (everything // 4, 6)


def test_another_data_set_takes_the_place_of_the_one_that_was_used_before(local: Programs) -> None:
    everything, _, _ = local.run(keep="1.5MB", seed=1)
    first = set(local.files())
    assert local.run(keep="1.5MB", seed=2)[0] == everything
    second = set(local.files()) - first
    assert len(second) == NSLICES
    assert local.run(keep="1.5MB", seed=2) == (0, NSLICES, [])
    assert local.run(keep="1.5MB", seed=1)[0] > everything // 2


def test_only_slices_are_kept_and_of_any_data(cache: Path) -> None:
    def run(data: Any) -> int:
        with Master(2, keep_data=True) as master:
            found = master.run(gather, lambda part: part, data)
            assert [item for part in found for item in part] == list(data)
            master.run(lambda params, part: part[:0], np.zeros(1_000_000), [1])  # large params, code by value
            return master.stats().dataset_sent

    kinds = ([1, "two", (3.0, None)], tuple("abc"), range(5))
    for data in kinds:
        assert run(data) > 0
    names = os.listdir(cache / "qjam" / "data" / "slices")
    assert len(names) == 6  # two a kind; [1] is the first of the list
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names)
    for data in kinds:
        assert run(data) == 0


# ---- at the same time, and after bad ends ---------------------------------------------------------------------


def test_programs_at_the_same_time_share_what_is_kept(local: Programs) -> None:
    running = [local.start(name=f"{number}", seed=seed) for number, seed in enumerate((1, 1, 2))]
    assert all(said == [] for _, _, said in map(local.finish, running))
    running = [local.start(name=f"{number}", seed=seed) for number, seed in enumerate((1, 1, 2))]
    assert [local.finish(program) for program in running] == [(0, NSLICES, [])] * 3
    assert set(os.listdir(local.kept)) == {"slices", "used"}


def test_a_program_goes_on_with_slices_that_another_one_has_evicted(cache: Path, tmp_path: Path) -> None:
    first = np.random.default_rng(1).standard_normal((8, 20_000))

    def total(params: Any, part: Any) -> Any:
        return part.sum()

    with Master(2, keep_data=True) as master:
        master.run(total, None, DataSet(first, slice_size=1))
    with Master(2, keep_data=True) as master:
        data = DataSet(first, slice_size=1)
        master.run(total, None, DataSet(first[:4], slice_size=1))
        for path in (cache / "qjam" / "data" / "slices").iterdir():
            path.unlink()
        assert master.run(gather, lambda part: float(part[0, 0]), DataSet(first[:4], slice_size=1)) == list(
            first[:4, 0]
        )
        assert master.stats().dataset_sent == 0
        master.run(total, None, data)
        assert master.stats().dataset_sent > 4 * SLICE  # the others


KILLED = """
import os, signal
import numpy as np
from qjam import DataSet, Master

if __name__ == "__main__":
    data = np.random.default_rng(1).standard_normal((8, 20_000))
    with Master(2, keep_data=True) as master:
        master.run(lambda params, part: part.sum(), None, DataSet(data, slice_size=1))
        print(flush=True)
        input()
"""


def test_after_a_kill_all_that_was_kept_is_found_and_the_rest_is_swept(local: Programs, tmp_path: Path) -> None:
    local.run()  # each slice is kept by now
    killed = start(tmp_path, KILLED)
    assert killed.stdout is not None
    killed.stdout.readline()
    (lying,) = local.kept.glob("qjam-*")
    (lying / ("new-" + "a" * 32)).write_bytes(b"half of a sl")
    killed.kill()
    killed.communicate()
    assert lying.exists()
    assert local.run() == (0, NSLICES, [])
    assert set(os.listdir(local.kept)) == {"slices", "used"}


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BACK_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lost_host_that_comes_back_finds_its_slices(sshd):
    data = DataSet(np.random.default_rng(1).standard_normal((8, 20_000)), slice_size=1)
    with Master("testhost*2", ssh_config=sshd.config, keep_data=True) as master:
        result = master.run(usercode.scaled, 3.0, data)
        sent = master.stats().dataset_sent
        until(lambda: len(list(sshd.home.glob(".cache/qjam/data/slices/*"))) == NSLICES)
        before = {worker.pid for worker in master.workers}
        node = node_of(sshd)
        send(node, signal.SIGKILL)
        assert all_end([node])
        assert np.array_equal(master.run(usercode.scaled, 3.0, data, timeout=BACK_S), result)
        assert before.isdisjoint(worker.pid for worker in master.workers)
        assert master.stats().dataset_sent == sent


def test_a_host_may_have_another_place_for_what_it_keeps(tmp_path, ssh_host):
    sshd = ssh_host(home=tmp_path / "home")
    host = HostSpec("testhost", env={"XDG_CACHE_HOME": str(tmp_path / "scratch")})
    sent = []
    for _ in range(2):
        with Master(host, ssh_config=sshd.config, keep_data=True) as master:
            assert master.run(usercode.add_up, 2, [1, 2, 3]) == 12
            sent.append(master.stats().dataset_sent > 0)
    assert sent == [True, False]
    assert len(os.listdir(tmp_path / "scratch" / "qjam" / "data" / "slices")) == 1
    assert os.listdir(sshd.home) == []


def test_hosts_that_share_a_home_share_what_is_kept(tmp_path, ssh_host, furnished):
    shared = with_parts_of(furnished, tmp_path / "home")
    hosts = [ssh_host(name, home=shared) for name in ("one", "other")]
    config = write_config(tmp_path / "config", hosts)
    data = DataSet(np.random.default_rng(1).standard_normal((8, 20_000)), slice_size=1)
    with Master(["one*2", "other*2"], ssh_config=config, keep_data=True) as master:
        result = master.run(usercode.scaled, 3.0, data)
        sent = master.stats().dataset_sent
        until(lambda: len(list(shared.glob(".cache/qjam/data/slices/*"))) == NSLICES)
        master.remove_hosts("one")
        assert np.array_equal(master.run(usercode.scaled, 3.0, data), result)
        master.add_hosts("one*2")
        assert np.array_equal(master.run(usercode.scaled, 3.0, data), result)
        assert master.stats().dataset_sent == sent


# ---- where nothing can be kept --------------------------------------------------------------------------------


def test_a_host_where_nothing_can_be_kept_is_told_of_and_works(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "qjam").mkdir(parents=True, mode=0o700)
    (cache / "qjam" / "data").symlink_to(cache)
    with Master(2, keep_data=True) as master:
        assert master.run(lambda params, part: sum(part), None, [1, 2, 3]) == 6
    assert "local: slices are not kept (keep_data): " in caplog.text
    assert "yours alone" in caplog.text
    assert os.listdir(cache) == ["qjam"]


def test_a_directory_that_goes_while_programs_run_takes_nothing_with_it(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Master(2, keep_data=True) as master:
        assert master.run(lambda params, part: sum(part), None, [1, 2]) == 3
        shutil.rmtree(cache / "qjam")
        for number in range(5):
            assert master.run(lambda params, part: sum(part), None, [1, 2, number]) == 3 + number
    assert not (cache / "qjam").exists()


# ---- the argument ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (False, None),
        (True, 20_000_000_000),
        (np.True_, 20_000_000_000),
        (5_000_000, 5_000_000),
        (np.int64(5_000_000), 5_000_000),
        ("20GB", 20_000_000_000),
        ("1.5 GiB", 3 << 29),
    ],
)
def test_what_may_be_said(given: Any, size: int | None) -> None:
    assert keep_data_bytes(given) == size


@pytest.mark.parametrize("given", [None, 2e10, b"20GB", [True]])
def test_it_must_be_an_amount_of_data(given: Any) -> None:
    with pytest.raises(TypeError, match=r"keep_data must be .*True or False, not "):
        Master(1, keep_data=given)


@pytest.mark.parametrize("given", [0, 1, -5, "20", "much", "20 %"])
def test_it_must_be_so_much_that_it_can_be_meant(given: Any) -> None:
    with pytest.raises(ValueError, match="keep_data must be "):
        Master(1, keep_data=given)
