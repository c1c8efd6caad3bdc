"""The bootstrap alone, as a program over pipes: what it keeps and where, and what it refuses."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from needs import lacking_programs, need, program
from qjam.launch import bootstrap

SOURCE = Path(bootstrap.__file__).read_bytes()
LOADER = f'import sys;s=sys.stdin.buffer;exec(compile(s.read({len(SOURCE)}),"bootstrap","exec"));main(s)'
MARKER = "marker 0123456789"
NO_WAYS = {"addresses": [], "seen": False, "timeout": 0}
GIGABYTE = 1 << 30
MINE = f"qjam-{os.getuid()}"

# Enough of what a node imports: the node that it becomes says its last word and ends.
STUBS = {
    "qjam_worker/__init__.py": "",
    "qjam_worker/node/__init__.py": "",
    "qjam_worker/node/node.py": "",
    "qjam_worker/__main__.py": "",
    "qjam_worker/node/fork_server_client.py": (
        "import sys\ndef prepare(workers): pass\ndef end(): pass\ndef fork(): return sys.modules[__name__]\n"
    ),
    "qjam_worker/stdio_node.py": (
        "import json, os, sys\n"
        "def become_node(answer, read, write, paths, fork_server):\n"
        "    told = {'node': answer, 'paths': paths, 'path': sys.path, 'environ': dict(os.environ)}\n"
        "    os.write(write, json.dumps(told).encode() + b'\\n')\n"
        "    read.readline()\n"
    ),
    "zmq.py": "def has(what): return True\n",
    "msgpack.py": "",
    "msgpack_numpy.py": "",
    "numpy.py": "",
}


class Part:
    """A zip of these files, and the line about it."""

    def __init__(self, files: dict[str, str], **told: object) -> None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, text in files.items():
                archive.writestr(zipfile.ZipInfo(name), text)
        self.data = packed.getvalue()
        digest = hashlib.sha256(self.data).hexdigest()
        self.line = {
            "name": "a part",
            "id": digest,
            "size": len(self.data),
            "sha256": digest,
            "unpacked": 4 * len(self.data),
            "native": False,
        } | told


class Talk:
    """A bootstrap that runs, and the messages of the host process."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.process = subprocess.Popen(
            [*command, "-c", LOADER],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def tell(self, **message: object) -> None:
        self.send(json.dumps(message).encode() + b"\n")

    def send(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read().decode()
        return json.loads(line)

    def begin(self, **hello: object) -> dict:
        """Up to the facts."""
        self.send(SOURCE)
        self.tell(**({"marker": MARKER, "env": {}, "ways": NO_WAYS, "cache": None} | hello))
        assert self.process.stdout.readline() == MARKER.encode() + b"\n"
        return self.hear()

    def bring(self, *parts: Part, cached: tuple[str, ...] = ()) -> dict:
        """The answer to these parts."""
        self.tell(parts=[part.line for part in parts], imports=[], workers=1)
        for part in parts:
            if part.line["id"] not in cached:
                self.send(part.data)
        return self.hear()

    def become(self) -> dict:
        """What the node that it has become says."""
        assert self.hear() == {"way": None, "tried": []}
        self.tell(welcome={}, stdio=False)
        return self.hear()

    def end(self) -> int:
        self.process.stdin.close()
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Where the host has its home and its TMPDIR."""
    for name in ("home", "tmp", "login"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def talk(host: Path) -> Iterator[Callable[..., Talk]]:
    """Starts the bootstrap."""
    talks = []

    def start(*command: str, **environment: str) -> Talk:
        variables = {"HOME": f"{host}/home", "TMPDIR": f"{host}/tmp", "PATH": os.environ["PATH"]} | environment
        talks.append(Talk(list(command) or [sys.executable, "-S"], variables, host / "login"))
        return talks[-1]

    yield start
    for each in talks:
        each.close()


@pytest.fixture
def private() -> Callable[..., list[str]]:
    """Gives a command for the bootstrap in mounts of its own, with empty /var/tmp and /dev/shm; they end with it."""
    need("" if os.geteuid() == 0 else "mounts need root")
    need(lacking_programs("unshare", "mount"))
    unshare = [program("unshare"), "--mount", "sh", "-c"]
    probe = subprocess.run([*unshare, "mount -t tmpfs none /var/tmp"], capture_output=True, text=True, check=False)
    need("" if probe.returncode == 0 else f"no mounts here: {probe.stderr.strip()}")

    def command(*mounts: str) -> list[str]:
        own = [f"mount -t tmpfs none {folder}" for folder in ("/var/tmp", "/dev/shm")]
        return [*unshare, " && ".join([*own, *mounts, 'exec "$0" "$@"']), sys.executable, "-S"]

    return command


def cache(host: Path) -> Path:
    return host / "home" / ".cache" / "qjam"


# What it tells


def test_it_tells_facts_of_its_python(talk):
    said = talk().begin()
    facts = said["facts"]
    assert said["cached"] == []
    assert said["python"] == sys.executable
    assert facts["python"] == list(sys.version_info[:2])
    assert facts["machine"] == os.uname().machine
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["has"] == {}


def test_it_tells_which_packages_are_there(talk, tmp_path):
    site = tmp_path / "site"
    for name, info in (
        ("numpy", "numpy-1.26.4.dist-info"),
        ("zmq", "pyzmq-25.1.1-py3.11.egg-info"),
        ("msgpack", "msgpack_numpy-0.4.8.dist-info"),
        ("cloudpickle", "cloudpickle-3.0.0.egg-info"),
    ):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
        (site / info).mkdir()
    (site / "msgpack_numpy.py").touch()
    has = talk(PYTHONPATH=str(site)).begin()["facts"]["has"]
    assert has == {
        "numpy": "1.26.4",
        "pyzmq": "25.1.1",
        "msgpack": "",
        "msgpack-numpy": "0.4.8",
        "cloudpickle": "3.0.0",
    }


def test_the_pythonpath_of_env_counts_unless_python_is_told_to_heed_none(talk, tmp_path):
    package = tmp_path / "site" / "msgpack"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    env = {"PYTHONPATH": f"/no/such/place:{package.parent}"}
    assert talk().begin(env=env)["facts"]["has"] == {"msgpack": ""}
    assert talk(sys.executable, "-I", "-S").begin(env=env)["facts"]["has"] == {}


def test_modules_in_the_folder_of_the_login_are_not_imported(talk, host):
    for name in ("json", "hashlib", "io", "tempfile", "zipfile", "shutil", "socket", "select", "fcntl"):
        (host / "login" / f"{name}.py").write_text("raise SystemExit('this must not be run')\n")
    stage = talk()
    stage.begin()
    assert stage.bring(Part(STUBS))["bundle"]


def test_what_is_printed_meanwhile_does_not_disturb(talk, host):
    stage = talk()
    stage.begin()
    noisy = {"msgpack.py": "import os\nprint('hello', flush=True)\nos.write(1, b'hello\\n')\n"}
    assert "bundle" in stage.bring(Part(STUBS | noisy))
    stage.become()
    stage.end()
    assert stage.process.stderr.read() == b"hello\n" * 2


def test_the_end_of_the_master_is_the_end_at_every_step(talk, host):
    parts = Part(STUBS), Part({"b.py": "x" * 100_000})
    steps = [
        lambda stage: stage.send(SOURCE),
        lambda stage: stage.begin(),
        lambda stage: (stage.begin(), stage.tell(parts=[parts[1].line], imports=[], workers=1)),
        lambda stage: (stage.begin(), stage.tell(parts=[parts[1].line], imports=[], workers=1), stage.send(b"PK")),
        lambda stage: (stage.begin(), stage.bring(parts[0])),
    ]
    for step in steps:
        stage = talk()
        step(stage)
        assert stage.end() == 0
        assert stage.process.stderr.read() == b""
    assert [path.name for path in cache(host).iterdir()] == [parts[0].line["id"]]
    assert list((host / "tmp").iterdir()) == []


def test_a_python_that_is_too_old_says_so(talk, tmp_path):
    old = tmp_path / "python"
    program = "import sys; sys.version_info = (3, 6, 9); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}' \"$@\"\n")
    old.chmod(0o755)
    stage = talk(str(old))
    said = stage.begin()
    assert said == {"failed": f"{sys.executable} is python 3.6.9; qjam needs 3.9 or newer on a host"}
    assert stage.process.wait() == 1


# Parts


def test_parts_are_kept_by_their_id_and_imported_in_their_order(talk, host):
    bundle, other = Part(STUBS), Part({"msgpack.py": "raise ImportError('the second comes second')"})
    stage = talk()
    stage.begin(env={"GIVEN": "so"})
    answer = stage.bring(bundle, other)
    assert answer == {"bundle": [str(cache(host) / part.line["id"]) for part in (bundle, other)]}
    node = stage.become()
    assert node["node"] == {"welcome": {}, "stdio": False}
    assert node["path"][:2] == answer["bundle"]
    assert node["environ"]["GIVEN"] == "so"
    assert "" not in node["path"]
    assert stage.end() == 0
    for part in (bundle, other):
        folder = cache(host) / part.line["id"]
        with zipfile.ZipFile(io.BytesIO(part.data)) as archive:
            for name in archive.namelist():
                assert (folder / name).read_bytes() == archive.read(name)
    assert sorted(os.listdir(cache(host))) == sorted(part.line["id"] for part in (bundle, other))


def test_what_is_kept_is_for_its_user_alone(talk, host):
    stage = talk(sys.executable, "-S")
    stage.begin()
    stage.bring(Part(STUBS))
    assert stat.S_IMODE(cache(host).stat().st_mode) == 0o700
    assert stat.S_IMODE(cache(host).joinpath(Part(STUBS).line["id"]).stat().st_mode) & 0o077 == 0


def test_parts_that_are_there_are_told_and_not_asked_for_again(talk, host):
    bundle = Part(STUBS)
    first = talk()
    first.begin()
    first.bring(bundle)
    first.end()
    os.utime(cache(host) / bundle.line["id"], (0, 0))
    second = talk()
    assert second.begin()["cached"] == [bundle.line["id"]]
    assert "bundle" in second.bring(bundle, cached=(bundle.line["id"],))
    assert (cache(host) / bundle.line["id"]).stat().st_mtime > time.time() - 60  # used now


def test_a_damaged_part_is_refused_and_nothing_of_it_is_kept(talk, host):
    damaged = Part(STUBS)
    damaged.data = damaged.data[:-30] + b"X" + damaged.data[-29:]
    stage = talk()
    stage.begin()
    failed = stage.bring(damaged)["failed"]
    assert failed.startswith("a part was damaged on its way")
    assert stage.process.wait() == 1
    assert not cache(host).exists() or os.listdir(cache(host)) == []


def test_several_that_bring_the_same_part_at_once_all_have_it(talk, host):
    bundle = Part(STUBS | {f"more/{number}.py": "" for number in range(300)})
    stages = [talk() for _ in range(4)]
    for stage in stages:
        assert stage.begin()["cached"] == []
    for stage in stages:
        stage.tell(parts=[bundle.line], imports=[], workers=1)
    for stage in stages:
        stage.send(bundle.data)
    for stage in stages:
        assert stage.hear() == {"bundle": [str(cache(host) / bundle.line["id"])]}
    assert os.listdir(cache(host)) == [bundle.line["id"]]


def test_a_folder_in_the_place_of_a_part_is_not_written_over(talk, host):
    """It came after this bootstrap had looked: another process was faster, and the part is complete."""
    bundle = Part(STUBS)
    first, second = talk(), talk()
    first.begin()
    second.begin()
    first.bring(bundle)
    inode = (cache(host) / bundle.line["id"]).stat().st_ino
    second.bring(bundle)
    assert (cache(host) / bundle.line["id"]).stat().st_ino == inode


def test_a_part_cannot_be_unpacked_elsewhere(talk, host):
    stage = talk()
    stage.begin()
    (taken_part,) = stage.bring(Part(STUBS | {"../../escaped.py": "", "/tmp/escaped-qjam.py": ""}))["bundle"]
    assert all(path.is_relative_to(taken_part) for path in host.rglob("escaped*"))
    assert not Path("/tmp/escaped-qjam.py").exists()


def test_what_an_interrupted_start_has_left_is_removed_a_day_later(talk, host):
    cache(host).mkdir(parents=True, mode=0o700)
    for name, days in (("making-old", 2), ("making-new", 0), ("notes", 100)):
        (cache(host) / name / "numpy").mkdir(parents=True)
        when = time.time() - days * 86400
        os.utime(cache(host) / name, (when, when))
    stage = talk()
    stage.begin()
    bundle = Part(STUBS)
    stage.bring(bundle)
    assert sorted(os.listdir(cache(host))) == sorted(["making-new", "notes", bundle.line["id"]])


# Where


def taken(answer: dict) -> Path:
    return Path(answer["bundle"][0]).parent


def test_xdg_cache_home_is_heeded(talk, host):
    stage = talk(XDG_CACHE_HOME=f"{host}/elsewhere")
    stage.begin()
    assert taken(stage.bring(Part(STUBS))) == host / "elsewhere" / "qjam"


def test_a_directory_that_others_may_write_to_is_not_used(talk, host, private):
    """What lies there is run."""
    cache(host).mkdir(parents=True)
    cache(host).chmod(0o770)
    bundle = Part(STUBS)
    (cache(host) / bundle.line["id"]).mkdir()
    stage = talk(*private())
    assert stage.begin()["cached"] == []
    assert taken(stage.bring(bundle)) == Path("/var/tmp") / MINE


def test_a_directory_of_somebody_else_is_not_used(talk, host, private):
    cache(host).mkdir(parents=True, mode=0o700)
    os.chown(cache(host), 65534, 65534)
    stage = talk(*private(f"mkdir -m 700 /var/tmp/{MINE}", f"chown 65534 /var/tmp/{MINE}"))
    stage.begin()
    assert taken(stage.bring(Part(STUBS))) == host / "tmp" / MINE


def test_a_link_to_a_directory_of_mine_is_not_used(talk, host, private):
    """Whoever made the link may lead it elsewhere later."""
    (host / "target").mkdir(mode=0o700)
    stage = talk(*private(f"ln -s {host}/target /var/tmp/{MINE}", f"mount -t tmpfs -o ro none {host}/home"))
    stage.begin()
    assert taken(stage.bring(Part(STUBS))) == host / "tmp" / MINE


@pytest.mark.parametrize(
    "mount",
    [
        "-o ro",  # the home of a kiosk
        "-o size=1m",  # statvfs tells that it is full
        "-o size=900m,nr_inodes=6",  # it tells nothing: some files fit, the next does not
    ],
)
def test_a_home_without_room_or_read_only_is_done_without(talk, host, private, mount):
    stage = talk(*private(f"mount -t tmpfs {mount} none {host}/home"))
    stage.begin()
    assert taken(stage.bring(Part(STUBS, unpacked=50_000_000))) == Path("/var/tmp") / MINE
    seen = Path(f"/proc/{stage.process.pid}/root{host}/home")
    assert not [path for path in seen.rglob("*") if path.is_file() or path.name.startswith("making-")]


def test_a_place_without_exec_is_used_for_what_is_not_compiled_alone(talk, host, private):
    stage = talk(*private(f"mount -t tmpfs -o noexec none {host}/home"))
    stage.begin()
    answer = stage.bring(Part(STUBS), Part({"compiled.py": ""}, native=True))
    assert [Path(path).parent for path in answer["bundle"]] == [cache(host), Path("/var/tmp") / MINE]


def test_parts_in_a_second_place_are_found_there(talk, host, private):
    """tmp survives, as /var/tmp does; the first two places are not to be had."""
    bundle = Part(STUBS)
    for cached in ([], [bundle.line["id"]]):
        mounts = [f"mount -t tmpfs -o ro none {folder}" for folder in (f"{host}/home", "/var/tmp")]
        stage = talk(*private(*mounts))
        assert stage.begin()["cached"] == cached
        assert taken(stage.bring(bundle, cached=tuple(cached))) == host / "tmp" / MINE
        stage.end()


def test_a_part_that_cannot_be_loaded_where_it_is_is_not_taken_from_there(talk, host, private):
    """It was brought before the home was mounted noexec."""
    bundle, compiled = Part(STUBS), Part({"compiled.py": ""}, native=True)
    first = talk()
    first.begin()
    first.bring(bundle, compiled)
    first.end()
    stage = talk(*private(f"mount --bind {host}/home {host}/home", f"mount -o remount,bind,noexec {host}/home"))
    cached = stage.begin()["cached"]
    answer = stage.bring(bundle, compiled, cached=tuple(cached))
    assert [Path(path).parent for path in answer["bundle"]] == [cache(host), Path("/var/tmp") / MINE]


def test_where_no_place_will_do_each_is_named_with_its_reason(talk, host, private):
    stage = talk(
        *private(
            f"mount -t tmpfs -o ro none {host}/home",
            "mount -t tmpfs -o size=1m none /var/tmp",
            f"mount -t tmpfs -o noexec none {host}/tmp",
            f"mkdir -m 777 /dev/shm/{MINE}",
        )
    )
    stage.begin()
    failed = stage.bring(Part(STUBS), Part({"a.py": ""}, name="numpy 2.0", native=True, unpacked=5_000_000))["failed"]
    for place, reason in (
        (cache(host), "Read-only file system"),
        (f"/var/tmp/{MINE}", "no room"),
        (f"{host}/tmp/{MINE}", "noexec"),
        (f"/dev/shm/{MINE}", "not yours alone"),
    ):
        assert f"{place}: " in failed
        assert reason in failed.partition(f"{place}: ")[2].partition("; ")[0]
    assert failed.startswith("no place for numpy 2.0 (5000000 bytes): ")


def test_gigabytes_that_are_free_are_not_gigabytes_that_are_needed(talk, host, private):
    stage = talk(*private())
    stage.begin()
    failed = stage.bring(Part(STUBS, unpacked=1_000_000 * GIGABYTE))["failed"]
    assert failed.count("no room") == 4


# Imports


def test_what_cannot_be_imported_is_named(talk):
    stage = talk()
    stage.begin()
    failed = stage.bring(Part(STUBS | {"numpy.py": "raise OSError('libopenblas.so.0: not found')\n"}))["failed"]
    assert failed.startswith("numpy cannot be imported there (OSError: libopenblas.so.0: not found)")
    assert "python=..." in failed


def test_a_zmq_without_curve_is_named(talk):
    stage = talk()
    stage.begin()
    failed = stage.bring(Part(STUBS | {"zmq.py": "__version__ = '25'\ndef has(what): return False\n"}))["failed"]
    assert failed == "the pyzmq that is installed there (25) was built without CURVE"
