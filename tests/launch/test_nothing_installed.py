"""A host with python and nothing else: what it lacks is brought, kept and cleaned up; whatever its shell prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gather
import pyzmq_garbage  # noqa: F401
from needs import lacking_programs, need, program
from qjam import BootstrapError, HostSpec, Master
from qjam.launch import bootstrap
from ssh_hosts import run_seven, ssh_host, with_cache_of  # noqa: F401
from sshd import bare_python, sshd_works

BARE = bare_python()
ISOLATED = f"{BARE} -I"  # neither the user's packages nor variables
DAY_S = 86400


@pytest.fixture(autouse=True)
def _needs() -> None:
    need(sshd_works())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that has what these hosts were brought, and nothing that other tests needed."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A home with nothing in it."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def furnished(tmp_path: Path, home: Path) -> Path:
    """A home of the test's own, to which the parts need not be brought again."""
    with_cache_of(home, tmp_path / "furnished")
    return tmp_path / "furnished"


def parts_in(home: Path) -> dict[str, Path]:
    return {path.name: path for path in (home / ".cache" / "qjam").iterdir()}


def where():
    """Tells where a worker has numpy and msgpack from, and what numpy makes of a determinant."""

    def look(part):
        import os

        import msgpack
        import numpy

        determinant = float(numpy.linalg.det(numpy.eye(3) * 2))
        return os.path.dirname(numpy.__file__), os.path.dirname(msgpack.__file__), determinant

    return look


def start(sshd, workers: int = 1, python: str = ISOLATED, **more) -> Master:
    return Master(HostSpec(sshd.name, workers=workers, python=python, **more), ssh_config=sshd.config)


def test_numpy_is_brought_to_a_python_that_has_none(ssh_host, empty):
    sshd = ssh_host(home=empty)
    with start(sshd, 2) as master:
        for numpy, msgpack, det in master.run(gather, where()):
            for folder in (numpy, msgpack):
                assert Path(folder).is_relative_to(empty / ".cache" / "qjam")
            assert det == pytest.approx(8)
    assert os.listdir(empty) == [".cache"]
    assert os.listdir(empty / ".cache") == ["qjam"]
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in parts_in(empty))
    assert list(sshd.temporary.iterdir()) == []


def test_a_second_start_brings_nothing(ssh_host, home):
    sshd = ssh_host()
    with start(sshd) as master:
        run_seven(master)
    before = {name: (path.stat().st_ino, len(os.listdir(path))) for name, path in parts_in(home).items()}
    changed = {path: path.stat().st_ctime_ns for part in parts_in(home).values() for path in part.iterdir()}
    with start(sshd) as master:
        run_seven(master)
    assert {name: (path.stat().st_ino, len(os.listdir(path))) for name, path in parts_in(home).items()} == before
    assert {path: path.stat().st_ctime_ns for path in changed} == changed


def test_four_masters_at_once_fill_one_empty_home(ssh_host, empty):
    sshd = ssh_host(home=empty)

    def run(_: int) -> None:
        with start(sshd) as master:
            run_seven(master)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert len(parts_in(empty)) == 6  # the bundle, cloudpickle, msgpack, msgpack_numpy, numpy, pyzmq
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in parts_in(empty))


def test_parts_that_nobody_used_for_long_are_removed_but_not_those_in_use(ssh_host, furnished, home):
    """In use by a node whose python lacks numpy, while another node starts whose python does not."""
    mine = furnished / ".cache"
    mine.unlink()
    shutil.copytree(home / ".cache", mine, copy_function=os.link)
    old = time.time() - (bootstrap.KEEP_DAYS + 1) * DAY_S

    def age() -> None:
        for path in parts_in(furnished).values():
            os.utime(path, (old, old))

    def start_with_all() -> None:
        with start(sshd, python=f"env PYTHONPATH={packages} {sys.executable} -S") as master:
            run_seven(master)

    packages = next(path for path in sys.path if path.endswith("site-packages"))
    sshd = ssh_host(home=furnished)
    for name in ("0" * 64, "f" * 64):
        (mine / "qjam" / name / "folder").mkdir(parents=True)
    (mine / "qjam" / "somebody else's").mkdir()
    with start(sshd) as master:
        lacking = set(parts_in(furnished))
        age()
        start_with_all()
        left = set(parts_in(furnished))
        assert not left & {"0" * 64, "f" * 64}
        assert len(left) == 6 + 1
        assert left < lacking
        assert master.run(gather, where())[0][2] == pytest.approx(8)
        assert all("qjam" in folder for folder in master.run(gather, where())[0][:2])
    age()
    start_with_all()
    assert len(parts_in(furnished)) == 1 + 1


def test_of_many_parts_the_latest_are_kept(ssh_host, furnished, home):
    mine = furnished / ".cache"
    mine.unlink()
    shutil.copytree(home / ".cache", mine, copy_function=os.link)
    sshd = ssh_host(home=furnished)
    real = set(parts_in(furnished))
    now = time.time()
    for number in range(40):
        path = mine / "qjam" / f"{number:064}"
        path.mkdir()
        os.utime(path, (now - number * 3600 - 60,) * 2)
    with start(sshd) as master:
        run_seven(master)
    kept = set(parts_in(furnished))
    assert real <= kept
    assert kept - real == {f"{number:064}" for number in range(bootstrap.KEEP_PARTS - len(real))}


# What the host has itself


def package(folder: Path, name: str, version: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    (folder / f"{name}-{version}.dist-info").mkdir()


def test_a_package_of_the_host_that_is_too_old_gives_way_to_ours(ssh_host, tmp_path):
    package(tmp_path / "site", "msgpack", "0.5.6", "raise ImportError('too old')\n")
    sshd = ssh_host(environment={"PYTHONPATH": str(tmp_path / "site")})
    with start(sshd, python=BARE) as master:
        ((numpy, msgpack, _),) = master.run(gather, where())
        assert "qjam" in msgpack
        assert "qjam" in numpy


def test_a_cloudpickle_that_is_older_than_ours_gives_way_to_ours(ssh_host, tmp_path):
    package(tmp_path / "site", "cloudpickle", "2.2.1", "raise ImportError('too old')\n")
    sshd = ssh_host(environment={"PYTHONPATH": str(tmp_path / "site")})
    factor = 6
    with start(sshd, python=BARE) as master:
        assert master.run(lambda params, part: factor * params, 7, [[1]]) == 42


def test_a_package_of_the_host_that_is_new_enough_is_used(ssh_host, tmp_path):
    import msgpack

    shutil.copytree(Path(msgpack.__file__).parent, tmp_path / "site" / "msgpack")
    (tmp_path / "site" / "msgpack-1.0.dist-info").mkdir()
    sshd = ssh_host(environment={"PYTHONPATH": str(tmp_path / "site")})
    with start(sshd, python=BARE) as master:
        assert master.run(gather, where())[0][1] == str(tmp_path / "site" / "msgpack")


@pytest.mark.parametrize("name", ["numpy", "zmq", "msgpack"])
def test_a_package_of_the_host_that_is_broken_is_named(ssh_host, tmp_path, name):
    package(tmp_path / "site", name, "99.0", "raise ImportError('libfoo.so: no such file')\n")
    if name == "zmq":
        (tmp_path / "site" / "zmq-99.0.dist-info").rename(tmp_path / "site" / "pyzmq-99.0.dist-info")
    sshd = ssh_host(environment={"PYTHONPATH": str(tmp_path / "site")})
    with pytest.raises(BootstrapError) as caught:
        start(sshd, python=BARE)
    assert re.match(rf"testhost: bundle: {name} cannot be imported there .*libfoo\.so.*python=", str(caught.value))
    assert "Traceback" not in str(caught.value)


def test_what_an_uninstalled_package_has_left_is_no_package(ssh_host, tmp_path):
    for name in ("numpy", "zmq", "msgpack", "cloudpickle"):
        (tmp_path / "site" / name / "__pycache__").mkdir(parents=True)
    sshd = ssh_host(environment={"PYTHONPATH": str(tmp_path / "site")})
    with start(sshd, python=BARE) as master:
        run_seven(master)


def test_a_module_in_the_folder_of_the_login_hides_none(ssh_host, tmp_path):
    """It is the home, where everybody has a json.py or queue.py of a lesson."""
    for name in ("json", "socket", "hashlib", "numpy", "zmq"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('a lesson')\n")
    with start(ssh_host(), python=BARE, setup=f"cd {tmp_path}") as master:
        run_seven(master)


# What logins print, and other shells


@pytest.mark.parametrize(
    "bashrc",
    [
        "echo welcome",
        "echo welcome >&2",
        "printf 'no end of line'",
        "head -c 3000000 /dev/urandom",
        "yes 'qjam 0123456789abcdef' | head -n 200000",
        "echo '{\"facts\": 1}'",
        "cat() { echo no; }; alias python3=false; set -u; umask 077",
    ],
)
def test_a_bashrc_that_prints_does_not_disturb(ssh_host, furnished, bashrc):
    (furnished / ".bashrc").write_text(f"{bashrc}\n")
    with start(ssh_host(home=furnished), python="python3") as master:
        run_seven(master)


def test_a_bashrc_is_what_prints(ssh_host, furnished, tmp_path):
    """Else the tests above show nothing."""
    need("" if os.path.basename(os.environ.get("SHELL", "/bin/bash")) == "bash" else "the login shell is not bash")
    (furnished / ".bashrc").write_text(f"touch {tmp_path / 'was-here'}\n")
    with start(ssh_host(home=furnished)):
        assert (tmp_path / "was-here").exists()


def test_a_banner_and_a_message_of_the_day_do_not_disturb(ssh_host, tmp_path):
    (tmp_path / "banner").write_text("No trespassing.\nqjam\n" * 500)
    with start(ssh_host(options={"Banner": str(tmp_path / "banner"), "PrintMotd": "yes"})) as master:
        run_seven(master)


@pytest.mark.parametrize("shell", ["tcsh", "dash", "bash"])
def test_the_login_shell_may_be_another(ssh_host, shell):
    need(lacking_programs(shell))
    sshd = ssh_host(options={"ForceCommand": f'exec {program(shell)} -c "$SSH_ORIGINAL_COMMAND"'})
    with start(sshd, 2, setup="cd /tmp") as master:
        run_seven(master)


def test_a_python_that_is_a_shell_script_around_another_works(ssh_host, tmp_path):
    wrapper = tmp_path / "module python"
    wrapper.write_text(f'#!/bin/sh\necho loading a module\nexec {BARE} "$@"\n')
    wrapper.chmod(0o755)
    with start(ssh_host(), python=f"'{wrapper}'") as master:
        run_seven(master)


def test_a_home_that_cannot_be_written_is_done_without(ssh_host, tmp_path):
    """The mounts are seen by this python alone, and end with it."""
    need("" if os.geteuid() == 0 else "mounts need root")
    need(lacking_programs("unshare", "mount"))
    try:
        subprocess.run([program("unshare"), "--mount", "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        need(f"no mount namespaces here: {error.stderr.decode().strip()}")
    wrapper = tmp_path / "python"
    mounts = 'mount -t tmpfs -o ro none "$HOME" && mount -t tmpfs none /var/tmp'
    wrapper.write_text(f"""#!/bin/sh
exec unshare --mount sh -c '{mounts} && exec {BARE} "$@"' - "$@"
""")
    wrapper.chmod(0o755)
    sshd = ssh_host(home=tmp_path / "home")
    with start(sshd, python=str(wrapper)) as master:
        assert master.run(gather, where())[0][0].startswith(f"/var/tmp/qjam-{os.getuid()}/")
    assert os.listdir(sshd.home) == []


def test_a_part_that_something_has_tidied_up_is_brought_anew(ssh_host, tmp_path):
    sshd = ssh_host(home=tmp_path / "home-of-its-own")
    with Master("testhost", ssh_config=sshd.config) as master:
        run_seven(master)
    (hollow,) = (sshd.home / ".cache" / "qjam").glob("*/qjam_worker/stdio_node.py")
    hollow.unlink()
    for cached in hollow.parent.glob("__pycache__/stdio*"):
        cached.unlink()
    with pytest.raises(BootstrapError, match=r"was damaged in .* which has been removed: start again"):
        Master("testhost", ssh_config=sshd.config)
    with Master("testhost", ssh_config=sshd.config) as master:
        run_seven(master)


def test_what_a_login_prints_late_does_not_disturb(ssh_host):
    sshd = ssh_host()
    spec = HostSpec("testhost", setup="(for i in 1 2 3 4 5 6 7 8; do sleep 0.02; echo late; done) & true")
    with Master(spec, ssh_config=sshd.config) as master:
        run_seven(master)


def test_a_large_environment_arrives(ssh_host):
    sshd = ssh_host()
    spec = HostSpec("testhost", env={f"LARGE{number}": "x" * 50_000 for number in range(4)})
    with Master(spec, ssh_config=sshd.config) as master:
        assert master.run(lambda params, part: len(__import__("os").environ["LARGE3"])) == 50_000
