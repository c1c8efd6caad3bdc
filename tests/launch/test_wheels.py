"""The packages that a host lacks, as zips: each is unpacked and imported by a python that has nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from qjam.launch import wheels
from qjam.launch.wheels import HostFacts, Part, PartsError, own_facts, platforms, provide

pytestmark = pytest.mark.timeout(180)  # seconds; what takes 13 alone takes 120 on a machine with much else to do

PACKAGES = ("numpy", "pyzmq", "msgpack", "msgpack-numpy", "cloudpickle")
TELL_FACTS = """
import json, os, sys
from importlib.machinery import EXTENSION_SUFFIXES
print(json.dumps([sys.version_info[:2], sys.implementation.name, EXTENSION_SUFFIXES[0][1:-3], os.uname().machine,
                  os.confstr("CS_GNU_LIBC_VERSION")]))
"""
IMPORT_ALL = """
import cloudpickle, msgpack, msgpack_numpy, numpy, zmq
import numpy.fft, numpy.linalg, numpy.ma, numpy.polynomial, numpy.random, numpy.testing, numpy.typing
import zmq.utils.monitor
from numpy import *

matrix = numpy.random.default_rng(1).random((50, 50))
numpy.testing.assert_allclose(numpy.linalg.inv(matrix) @ matrix, numpy.eye(50), atol=1e-6)
numpy.testing.assert_allclose(numpy.fft.ifft(numpy.fft.fft(matrix)).real, matrix)
assert numpy.ma.masked_less(matrix, 0).sum() == matrix.sum()
assert zmq.has("curve") and zmq.curve_keypair()
assert msgpack.Packer.__module__ == "msgpack._cmsgpack", "the C code is missing"
assert msgpack.unpackb(msgpack.packb([1, b"x"])) == [1, b"x"]
assert msgpack_numpy.unpackb(msgpack_numpy.packb(matrix)).tolist() == matrix.tolist()
assert cloudpickle.loads(cloudpickle.dumps(lambda: 3))() == 3
assert all(module.__file__.startswith(sys.path[0][:-2]) for module in (numpy, zmq, msgpack, msgpack_numpy, cloudpickle))
"""


def other_pythons() -> list[str]:
    """The system's python and pyenv's: real ones of other versions, where this machine has them."""
    found = ["/usr/bin/python3", *map(str, sorted(Path.home().glob(".pyenv/versions/3.*/bin/python")))]
    return [path for path in found if os.access(path, os.X_OK)]


def facts_of(python: str) -> HostFacts:
    told = subprocess.run([python, "-I", "-c", TELL_FACTS], capture_output=True, check=True, text=True)
    version, *others = json.loads(told.stdout)
    return HostFacts(tuple(version), *others)


def unpack(made: Iterable[Part], folder: Path) -> list[str]:
    """Each into a folder of its own, as on a host."""
    paths = []
    for index, part in enumerate(made):
        with zipfile.ZipFile(part.path) as archive:
            archive.extractall(folder / str(index))
        paths.append(str(folder / str(index)))
    return paths


def run_with(python: str, paths: list[str], code: str) -> str:
    program = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    # -S too: what pyenv's pythons have installed must not stand in for what is missing.
    command = [python, "-I", "-S", "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, check=False, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def names(part: Part) -> list[str]:
    with zipfile.ZipFile(part.path) as archive:
        return archive.namelist()


def foreign(facts: HostFacts, machine: str) -> HostFacts:
    return replace(facts, machine=machine, soabi=facts.soabi.replace(facts.machine, machine))


def nothing_to_download_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A python without pip, which is what `uv venv` makes."""
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "parts"


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the parts for this python."""
    folder = tmp_path_factory.mktemp("parts", numbered=True) / "warm"
    provide(PACKAGES, own_facts(), folder)
    return folder


# What a part holds.


def test_a_bare_python_of_this_version_imports_what_is_installed_here(warm, tmp_path):
    made = provide(PACKAGES, own_facts(), warm)

    python = os.path.realpath(sys.executable)  # not the venv's: without its site-packages
    run_with(python, unpack(made, tmp_path), IMPORT_ALL)


def test_the_systems_python_imports_its_parts(cache, tmp_path):
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK) or facts_of(python).python < (3, 9):
        pytest.skip("there is no /usr/bin/python3 of at least 3.9")

    run_with(python, unpack(provide(PACKAGES, facts_of(python), cache), tmp_path), IMPORT_ALL)


def test_another_minor_version_imports_what_pip_downloads_for_it(cache, tmp_path):
    others = [(path, facts_of(path)) for path in other_pythons()]
    found = [(path, facts) for path, facts in others if (3, 9) <= facts.python != own_facts().python]
    python, facts = max(found, key=lambda item: item[1].python, default=(None, None))
    if facts is None:  # the wheels can be looked at nevertheless
        facts = replace(own_facts(), python=(3, 12), soabi=f"cpython-312-{own_facts().soabi.split('-', 2)[2]}")

    paths = unpack(provide(PACKAGES, facts, cache), tmp_path)

    version = "{}{}".format(*facts.python)
    (wheel,) = Path(paths[0]).glob("numpy-*.dist-info/WHEEL")
    assert f"Tag: cp{version}-cp{version}-manylinux" in wheel.read_text()
    if python:
        run_with(python, paths, IMPORT_ALL)


def test_the_version_of_a_package_can_be_asked_on_the_host(warm, tmp_path):
    (part,) = provide(["pyzmq"], own_facts(), warm)

    code = "from importlib import metadata; print('pyzmq', metadata.version('pyzmq'))"
    assert run_with(sys.executable, unpack([part], tmp_path), code).strip() == part.name
    assert part.name == f"pyzmq {metadata.version('pyzmq')}"


def test_no_part_holds_what_a_node_never_needs(warm):
    made = provide(PACKAGES, own_facts(), warm)

    never = re.compile(r"tests/(?!_natype)|__pycache__|\.pyi$|\.a$|/include/|RECORD$|^\.\.|^/|^bin/")
    assert [name for part in made for name in names(part) if never.search(name)] == []


def test_what_numpy_testing_imports_from_among_the_tests_is_kept():
    assert not wheels._LEFT_OUT.match("numpy/_core/tests/_natype.py")
    assert wheels._LEFT_OUT.match("numpy/_core/tests/test_umath.py")


def test_a_part_tells_its_size_its_hash_and_the_room_that_it_needs(warm):
    (part,) = provide(["msgpack"], own_facts(), warm)

    with zipfile.ZipFile(part.path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    assert part.size == part.path.stat().st_size
    assert part.sha256 == hashlib.sha256(part.path.read_bytes()).hexdigest()
    assert unpacked <= part.unpacked <= unpacked + 4096 * len(names(part))


def test_equal_contents_have_equal_ids_and_equal_zips_in_every_cache(warm, cache):
    (here,), (there,) = (provide(["msgpack"], own_facts(), folder) for folder in (warm, cache))

    assert replace(here, path=there.path) == there


def test_the_parts_come_in_the_order_that_was_asked_for(warm):
    made = provide(["msgpack", "cloudpickle", "pyzmq"], own_facts(), warm)

    assert [part.name.split()[0] for part in made] == ["msgpack", "cloudpickle", "pyzmq"]


# Which wheels fit.


def test_glibc_takes_wheels_for_its_own_version_and_for_all_older_ones():
    facts = HostFacts((3, 11), "cpython", "cpython-311-x86_64-linux-gnu", "x86_64", "glibc 2.17")

    known = platforms(facts)

    assert known[0] == "manylinux_2_17_x86_64"
    assert known[-1] == "any"
    assert {"manylinux_2_5_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} <= set(known)
    assert "manylinux_2_18_x86_64" not in known


def test_a_glibc_before_manylinux2014_does_not_take_it():
    facts = HostFacts((3, 11), "cpython", "cpython-311-x86_64-linux-gnu", "x86_64", "glibc 2.12")

    assert not any("2014" in platform or "2_17" in platform for platform in platforms(facts))
    assert "manylinux2010_x86_64" in platforms(facts)


def test_musl_takes_only_wheels_for_musl():
    facts = HostFacts((3, 12), "cpython", "cpython-312-aarch64-linux-musl", "aarch64", "musl 1.2")

    assert platforms(facts) == ["musllinux_1_2_aarch64", "musllinux_1_1_aarch64", "any"]


@pytest.mark.parametrize("libc", ["", "glibc", "glibc 3.1", "glibc 2.1234", "uclibc 1.0", "musl 1.x"])
def test_an_unknown_libc_takes_only_packages_without_compiled_modules(libc):
    facts = HostFacts((3, 11), "cpython", "cpython-311-x86_64-linux-gnu", "x86_64", libc)

    assert platforms(facts) == ["any"]


def test_pypy_takes_only_packages_without_compiled_modules():
    facts = HostFacts((3, 10), "pypy", "pypy310-pp73-x86_64-linux-gnu", "x86_64", "glibc 2.36")

    assert platforms(facts) == ["any"]


@pytest.mark.parametrize(
    ("soabi", "machine", "platform"),
    [
        ("cpython-311-arm-linux-gnueabihf", "aarch64", "manylinux_2_31_armv7l"),
        ("cpython-311-i386-linux-gnu", "x86_64", "manylinux_2_31_i686"),
    ],
)
def test_a_python_of_32_bits_on_a_kernel_of_64_takes_wheels_of_32(soabi, machine, platform):
    assert platforms(HostFacts((3, 11), "cpython", soabi, machine, "glibc 2.31"))[0] == platform


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("cp312-cp312-manylinux_2_17_x86_64", True),
        ("cp311-cp311-manylinux_2_17_x86_64", False),
        ("cp312-cp312t-manylinux_2_17_x86_64", False),
        ("cp312-cp312-manylinux_2_17_aarch64", False),
        ("cp312-cp312-manylinux_2_29_x86_64", False),
        ("cp312-cp312-musllinux_1_2_x86_64", False),
        ("cp312-abi3-manylinux_2_28_x86_64", True),
        ("cp39-abi3-manylinux_2_28_x86_64", True),
        ("cp313-abi3-manylinux_2_28_x86_64", False),
        ("cp312-cp312-linux_x86_64", False),
        ("py3-none-any", True),
    ],
)
def test_the_tag_of_an_installed_wheel_tells_whether_it_fits_a_host(tag, fits):
    facts = HostFacts((3, 12), "cpython", "cpython-312-x86_64-linux-gnu", "x86_64", "glibc 2.28")

    if fits:
        wheels._check_fit([tag], "", facts)
    else:
        with pytest.raises(wheels._Unusable, match=tag):
            wheels._check_fit([tag], "", facts)


def test_what_was_built_here_fits_only_a_host_with_the_same_facts():
    facts = own_facts()
    version = "cp{}{}".format(*facts.python)
    tag = f"{version}-{version}-linux_{facts.machine}"

    wheels._check_fit([tag], "", facts)
    with pytest.raises(wheels._Unusable):
        wheels._check_fit([tag], "", replace(facts, libc="glibc 2.99"))


def test_a_wheel_for_any_python_does_not_fit_one_older_than_it_needs():
    facts = replace(own_facts(), python=(3, 9))

    wheels._check_fit(["py3-none-any"], "Requires-Python: >=3.8\n", facts)
    with pytest.raises(wheels._Unusable, match=r"python >= 3\.10"):
        wheels._check_fit(["py3-none-any"], "Requires-Python: >=3.10\n", facts)


def test_a_package_without_compiled_modules_is_copied_for_any_machine(cache, monkeypatch):
    nothing_to_download_with(monkeypatch)

    (part,) = provide(["cloudpickle"], replace(foreign(own_facts(), "vax"), libc=""), cache)

    assert part.name == f"cloudpickle {metadata.version('cloudpickle')}"


def test_the_own_facts_are_those_that_the_script_on_a_host_would_tell():
    if not own_facts().libc.startswith("glibc"):
        pytest.skip("the test's script knows only glibc")

    assert own_facts() == facts_of(sys.executable)
    assert own_facts().soabi == sysconfig.get_config_var("SOABI")


# Installations that cannot be copied.


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A copy of msgpack in a site-packages of its own, which comes first; pip cannot replace it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(provide(["msgpack"], own_facts(), tmp_path / "copied")[0].path) as archive:
        archive.extractall(site)
    (info,) = site.glob("*.dist-info")
    original = metadata.distribution("msgpack").read_text("RECORD") or ""
    (info / "RECORD").write_text("\n".join(line for line in original.splitlines() if "__pycache__" not in line))
    monkeypatch.syspath_prepend(site)
    nothing_to_download_with(monkeypatch)
    return info


def test_a_file_changed_after_the_installation_keeps_it_from_being_copied(installed, cache):
    with open(installed.parent / "msgpack" / "ext.py", "a") as file:
        file.write("\n# changed\n")

    with pytest.raises(PartsError, match=r"msgpack/ext\.py was changed after the installation"):
        provide(["msgpack"], own_facts(), cache)


def test_a_missing_file_keeps_an_installation_from_being_copied(installed, cache):
    (installed.parent / "msgpack" / "ext.py").unlink()

    with pytest.raises(PartsError, match=r"not complete.*msgpack/ext\.py"):
        provide(["msgpack"], own_facts(), cache)


def test_a_missing_record_keeps_an_installation_from_being_copied(installed, cache):
    (installed / "RECORD").unlink()

    with pytest.raises(PartsError, match=r"not installed from a wheel.*RECORD"):
        provide(["msgpack"], own_facts(), cache)


def test_an_editable_installation_is_not_copied(installed, cache):
    (installed.parent / "__editable__.msgpack.pth").write_text("/home/me/msgpack")
    (installed / "RECORD").write_text(f"__editable__.msgpack.pth,,\n{installed.name}/METADATA,,\n")

    with pytest.raises(PartsError, match="editable"):
        provide(["msgpack"], own_facts(), cache)


def test_an_editable_installation_by_a_finder_is_not_copied(installed, cache):
    (installed.parent / "__editable___msgpack_finder.py").touch()
    (installed / "RECORD").write_text(f"__editable___msgpack_finder.py,,\n{installed.name}/METADATA,,\n")

    with pytest.raises(PartsError, match="editable"):
        provide(["msgpack"], own_facts(), cache)


def test_a_package_of_one_module_is_copied(cache, monkeypatch):
    nothing_to_download_with(monkeypatch)

    (part,) = provide(["msgpack-numpy"], own_facts(), cache)

    assert part.name == f"msgpack_numpy {metadata.version('msgpack-numpy')}"
    assert "msgpack_numpy.py" in names(part)


# The cache.


def test_the_cache_is_the_users_alone(cache):
    provide(["cloudpickle"], own_facts(), cache)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [cache, cache.parent, *cache.iterdir()]}
    assert {modes.pop(cache.name), modes.pop(cache.parent.name)} == {0o700}
    assert set(modes.values()) == {0o600}


def test_the_default_cache_is_in_the_users_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (part,) = provide(["cloudpickle"], own_facts())
    assert part.path.parent == tmp_path / "qjam" / "parts"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (part,) = provide(["cloudpickle"], own_facts())
    assert part.path.parent == tmp_path / "home" / ".cache" / "qjam" / "parts"


def test_a_cache_that_others_may_write_to_is_refused(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)

    with pytest.raises(PartsError, match=rf"{re.escape(str(cache))}.*yours alone"):
        provide(["cloudpickle"], own_facts(), cache)


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(PartsError, match=re.escape(str(tmp_path / "file" / "parts"))):
        provide(["cloudpickle"], own_facts(), tmp_path / "file" / "parts")


def test_a_part_that_is_there_needs_neither_the_installation_nor_its_zip_read(cache, monkeypatch):
    (first,) = provide(["cloudpickle"], own_facts(), cache)
    monkeypatch.setattr(wheels, "_make", pytest.fail)
    first.path.write_bytes(b"x" * first.size)  # equal only in what is looked at

    assert provide(["cloudpickle"], own_facts(), cache) == [first]


def test_a_zip_cut_short_is_made_again(cache):
    (first,) = provide(["cloudpickle"], own_facts(), cache)
    first.path.write_bytes(first.path.read_bytes()[:-1])

    (again,) = provide(["cloudpickle"], own_facts(), cache)

    assert again == first
    with zipfile.ZipFile(again.path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"made": 0, "size": 1}'])
def test_a_damaged_description_is_written_again(cache, text):
    (first,) = provide(["cloudpickle"], own_facts(), cache)
    first.path.with_suffix(".json").write_text(text)

    assert provide(["cloudpickle"], own_facts(), cache) == [first]


def start(count: int, code: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """Processes that run `code` with these arguments; each has printed its first line, which must be `ready`."""
    program = f"import sys; from pathlib import Path; from qjam.launch import wheels\n{code}"
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * count
    return started


def end(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed after its first line."""
    told = [process.communicate() for process in processes]
    assert [(process.returncode, errors) for process, (_, errors) in zip(processes, told)] == [(0, "")] * len(told)
    return [output for output, _ in told]


def test_several_processes_at_once_make_a_part_once(cache):
    code = """
make = wheels._make
wheels._make = lambda *arguments: (print("made"), make(*arguments))[1]
print("ready", flush=True)
sys.stdin.readline()
assert wheels.provide(["pyzmq"], wheels.own_facts(), Path(sys.argv[1]))[0].path.exists()
"""
    processes = start(8, code, cache)
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()

    assert sorted(end(processes)) == [""] * 7 + ["made\n"]


def test_nothing_that_was_half_made_is_used(cache):
    program = """
import os, signal, sys
from pathlib import Path
from qjam.launch import wheels

wheels._pack = lambda info, target: (target.write_bytes(b"PK"), os.kill(os.getpid(), signal.SIGKILL))
wheels.provide(["cloudpickle"], wheels.own_facts(), Path(sys.argv[1]))
"""
    killed = subprocess.run([sys.executable, "-c", program, str(cache)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name[:7] for path in cache.iterdir() if path.is_dir()] == ["making-"]
    assert not list(cache.glob("*.zip")) + list(cache.glob("*.json"))

    (part,) = provide(["cloudpickle"], own_facts(), cache)

    with zipfile.ZipFile(part.path) as archive:
        assert archive.testzip() is None


def make_old(path: Path, days: float) -> None:
    then = path.stat().st_mtime - days * 24 * 3600
    os.utime(path, (then, then))


def test_what_nobody_used_for_60_days_goes_when_something_is_made(cache):
    (old,) = provide(["cloudpickle"], own_facts(), cache)
    for path in cache.iterdir():
        make_old(path, 61)
    left = cache / "making-killed"
    left.mkdir()
    make_old(left, 2)
    mine = cache / "not of qjam"
    mine.touch()
    make_old(mine, 1000)

    (new,) = provide(["msgpack"], own_facts(), cache)

    assert not old.path.exists()
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".json", ".lock", ".zip"]
    assert new.path.exists()


def test_use_keeps_a_part(cache):
    (used,) = provide(["cloudpickle"], own_facts(), cache)
    for path in cache.iterdir():
        make_old(path, 61)
    provide(["cloudpickle"], own_facts(), cache)

    provide(["msgpack"], own_facts(), cache)

    assert provide(["cloudpickle"], own_facts(), cache) == [used]
    assert used.path.exists()


# Downloads: kept for 30 days, and longer where there is no network.


@pytest.fixture
def downloaded(cache) -> tuple[HostFacts, Part]:
    """The smallest one that has to be downloaded, since nothing of another machine is installed here."""
    other = "aarch64" if own_facts().machine != "aarch64" else "x86_64"
    facts = replace(foreign(own_facts(), other), libc="glibc 2.36")
    return facts, provide(["msgpack"], facts, cache)[0]


def test_a_download_is_kept(downloaded, cache, monkeypatch):
    facts, first = downloaded
    nothing_to_download_with(monkeypatch)

    assert provide(["msgpack"], facts, cache) == [first]


def test_an_old_download_is_used_when_there_is_no_newer_one_to_be_had(downloaded, cache, monkeypatch):
    facts, first = downloaded
    description = first.path.with_suffix(".json")
    fields = json.loads(description.read_text())
    description.write_text(json.dumps(fields | {"made": fields["made"] - 31 * 24 * 3600}))
    nothing_to_download_with(monkeypatch)

    assert provide(["msgpack"], facts, cache) == [first]
    assert list(cache.glob("*.failed"))  # so it was tried


def test_modules_in_the_working_directory_do_not_stand_in_for_those_of_pip(tmp_path, monkeypatch, cache):
    (tmp_path / "pip.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(PartsError) as raised:
        provide(["numpy"], foreign(own_facts(), "vax"), cache)
    assert "not this one" not in str(raised.value)


# What the user is told.


def test_a_machine_without_wheels_is_told_with_everything_that_helps(cache):
    facts = HostFacts((3, 11), "cpython", "cpython-311-vax-linux-gnu", "vax", "glibc 2.36")

    with pytest.raises(PartsError) as raised:
        provide(PACKAGES, facts, cache)

    text = str(raised.value)
    assert "lacks numpy, pyzmq, msgpack, msgpack-numpy, cloudpickle" in text
    assert "python 3.11 (cpython-311-vax-linux-gnu, vax, glibc 2.36)" in text
    assert "the installed one is for" in text
    assert "No matching distribution found for numpy" in text
    assert "python3 -m pip install --user numpy pyzmq msgpack msgpack-numpy cloudpickle" in text
    assert "python=..." in text


def test_a_package_that_is_not_installed_here_is_told_so(cache, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    nothing_to_download_with(monkeypatch)

    with pytest.raises(PartsError, match="msgpack is not installed here"):
        provide(["msgpack"], own_facts(), cache)


def test_a_python_without_pip_is_named(cache, monkeypatch, tmp_path):
    without = tmp_path / "python"
    without.write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -I -S "$@"\n')
    without.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(without))

    with pytest.raises(PartsError, match=rf"{re.escape(str(without))} has none \(install it: .* -m ensurepip\)"):
        provide(["numpy"], foreign(own_facts(), "vax"), cache)


def test_a_pip_that_does_not_answer_is_given_up(cache, monkeypatch, tmp_path):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(wheels, "_PIP_S", 0.1)

    with pytest.raises(PartsError, match="no answer within"):
        provide(["numpy"], foreign(own_facts(), "vax"), cache)


def test_those_who_wait_for_a_download_that_fails_do_not_try_it_again(cache, tmp_path):
    pip, tries, gate = tmp_path / "python", tmp_path / "tries", tmp_path / "gate"
    os.mkfifo(gate)
    pip.write_text(
        f"#!/bin/sh\necho try >> {tries}\n[ $(wc -l < {tries}) = 1 ] && read go < {gate}\necho no >&2; exit 1\n"
    )
    pip.chmod(0o700)
    code = """
sys.executable = sys.argv[2]
locked = wheels._locked
wheels._locked = lambda path: (print("ready", flush=True), locked(path))[1]
vax = wheels.HostFacts((3, 11), "cpython", "cpython-311-vax-linux-gnu", "vax", "glibc 2.36")
try:
    wheels.provide(["numpy"], vax, Path(sys.argv[1]))
except wheels.PartsError as error:
    print(error)
"""
    processes = start(8, code, cache, pip)
    gate.write_text("go\n")

    assert ["Not by pip: no." in text for text in end(processes)] == [True] * 8
    assert tries.read_text() == "try\n"
