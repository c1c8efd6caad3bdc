"""Packages that a node needs and its host lacks: each becomes a zip file, copied from here or downloaded."""

from __future__ import annotations

import base64
import contextlib
import csv
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# Files that a node never needs. numpy.f2py is not among them, because `from numpy import *` imports it, nor is the one
# module of the tests that numpy.testing imports (in numpy 2.2).
_LEFT_OUT = re.compile(
    r"\.\./|/|(?:.*/)?(?:__pycache__|tests(?!/_natype\.py$)|include|_examples|f2py/src)/"
    r"|numpy/(?:distutils|doc|_pyinstaller)/"
    r"|.*\.(?:a|c|h|md|pxd|pxi|pyc|pyi)$|.*\.dist-info/(?!METADATA$|WHEEL$)"
)
_MODULE = re.compile(r"(?!__editable__)\w+\.py")  # a package may be one module, as msgpack-numpy is
_RULES = "1"  # increase it whenever _LEFT_OUT changes: a part made by the old rules is then not used
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can store
_BLOCK = 4096  # bytes: a file occupies whole blocks

_DAY_S = 24 * 3600
_FRESH_S = 30 * _DAY_S  # older downloads are tried again: there may be a newer version
_UNUSED_S = 60 * _DAY_S  # parts that nobody used for so long are removed
_ABANDONED_S = _DAY_S  # unfinished parts are removed
_PIP_S = 60.0

_MANYLINUX = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # by x of glibc 2.x
_MACHINES = {"i386": "i686", "arm": "armv7l"}  # a python of 32 bits; uname may name a kernel of 64 bits


class PartsError(ValueError):
    """A host lacks packages that can be neither copied nor downloaded for it. The text says why and what to do."""


class _Unusable(Exception):
    """A package cannot be copied, or cannot be downloaded. The text says why."""


@dataclass(frozen=True)
class HostFacts:
    """The facts of a host that decide which wheels its python can use.

    Attributes:
        python: its version, such as `(3, 11)`.
        implementation: `cpython`; compiled wheels exist for no other.
        soabi: the middle of the suffix of extension modules, such as `cpython-311-x86_64-linux-gnu`.
        machine: as uname names it, such as `x86_64`.
        libc: such as `glibc 2.36` or `musl 1.2`; empty if unknown.
    """

    python: tuple[int, int]
    implementation: str
    soabi: str
    machine: str
    libc: str

    def __str__(self) -> str:
        version = ".".join(map(str, self.python))
        return f"python {version} ({self.soabi or self.implementation}, {self.machine}, {self.libc or 'libc unknown'})"


@dataclass(frozen=True)
class Part:
    """One package, ready for a host.

    Attributes:
        name: with its version, such as `numpy 2.4.6`.
        id: a hash of the content, in hexadecimal digits.
        path: the zip file on this machine. A host unpacks it into a folder of its own, which goes on sys.path.
        size: bytes of the zip file.
        sha256: of the zip file, in hexadecimal digits.
        unpacked: bytes that the host needs for it.
    """

    name: str
    id: str
    path: Path
    size: int
    sha256: str
    unpacked: int


def own_facts() -> HostFacts:
    """Return the facts of the python that runs this."""
    return HostFacts(
        python=sys.version_info[:2],
        implementation=sys.implementation.name,
        soabi=EXTENSION_SUFFIXES[0].removeprefix(".").removesuffix(".so"),
        machine=os.uname().machine,
        libc=_own_libc(),
    )


def provide(packages: Iterable[str], facts: HostFacts, cache: Path | None = None) -> list[Part]:
    """Return the parts for a host, in the order of `packages`, which are names of distributions such as `pyzmq`.

    Parts are kept in `cache` (default: ~/.cache/qjam/parts). If several processes want the same part, one makes it.

    Raises PartsError if a package is not available for that host, or if the cache cannot be used.
    """
    wanted = list(packages)
    folder = _default_cache() if cache is None else cache
    try:
        _open_folder(folder)
        return [_part(package, wanted, facts, folder) for package in wanted]
    except OSError as error:
        raise PartsError(f"the cache {folder} cannot be used for the packages that a host lacks: {error}") from error


def platforms(facts: HostFacts) -> list[str]:
    """Return the platform tags of the wheels that run on such a host, those for its own libc first.

    If the libc is unknown, that is only `any`: packages without compiled modules.
    """
    systems: list[str] = []
    libc = re.match(r"(glibc 2|musl 1)\.(\d{1,2})(?!\d)", facts.libc)
    if libc is not None and facts.implementation == "cpython":
        minor = int(libc[2])
        if libc[1] == "glibc 2":
            systems += [f"manylinux_2_{needed}" for needed in range(minor, 4, -1)]
            systems += [alias for needed, alias in _MANYLINUX.items() if needed <= minor]
        else:
            systems += [f"musllinux_1_{needed}" for needed in range(minor, 0, -1)]
    return [*(f"{system}_{_machine(facts)}" for system in systems), "any"]


def _part(package: str, wanted: list[str], facts: HostFacts, folder: Path) -> Part:
    try:
        return _copied(package, facts, folder)
    except _Unusable as error:
        no_copy = error
    try:
        return _downloaded(package, facts, folder)
    except _Unusable as no_download:
        raise PartsError(
            f"the host lacks {', '.join(wanted)}, and there is no {package} for its {facts}. "
            f"Not from here: {no_copy}. Not by pip: {no_download}. Install them on the host: "
            f"python3 -m pip install --user {' '.join(wanted)}; or name another python of the host with python=..."
        ) from no_download


# Copies of what is installed here


def _copied(package: str, facts: HostFacts, folder: Path) -> Part:
    info = _installed(package)
    try:
        record, tags, metadata = ((info / name).read_text("utf-8") for name in ("RECORD", "WHEEL", "METADATA"))
    except OSError as error:
        raise _Unusable(f"it was not installed from a wheel ({error})") from error
    _check_fit(re.findall(r"^Tag: *(\S+)", tags, re.MULTILINE), metadata, facts)
    return _made_once(folder, f"{package}-{_digest(record)}", lambda _: info)


def _installed(package: str) -> Path:
    """Return the .dist-info of the package that `import` finds. importlib.metadata would take ten times as long."""
    form = re.compile(rf"{re.escape(package.replace('-', '_'))}-[0-9][^-]*\.dist-info")
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for name in filter(form.fullmatch, os.listdir(folder or os.curdir)):
                return Path(folder, name)
    raise _Unusable(f"{package} is not installed here")


def _check_fit(tags: list[str], metadata: str, facts: HostFacts) -> None:
    major, minor = facts.python
    systems = platforms(facts)
    # A package that was built here, or by a distribution, may need libraries of this machine.
    if any("-linux_" in tag for tag in tags) and facts == own_facts():
        systems.append(f"linux_{_machine(facts)}")
    abi = _abi(facts)
    fitting = {f"cp{major}{minor}-{abi}", f"py{major}-none"}
    if not abi.endswith("t"):  # without the GIL there is no stable ABI
        fitting |= {f"cp{major}{older}-abi3" for older in range(2, minor + 1)}
    if {f"{python}-{system}" for python in fitting for system in systems}.isdisjoint(tags):
        raise _Unusable(f"the installed one is for {', '.join(tags)}")
    needed = re.search(r"^Requires-Python:.*>= *3\.(\d+)", metadata, re.MULTILINE)
    if needed is not None and minor < int(needed[1]):
        raise _Unusable(f"the installed one is for python >= 3.{needed[1]}")


def _own_libc() -> str:
    # musl has no confstr for its version; its loader prints it.
    with contextlib.suppress(OSError, ValueError):
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    for loader in glob.glob("/lib/ld-musl-*.so.1"):
        with contextlib.suppress(OSError):
            loaded = subprocess.run([loader], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            version = re.search(r"^Version (\d+\.\d+)", loaded.stderr, re.MULTILINE)
            return f"musl {version[1]}" if version else ""
    return ""


def _machine(facts: HostFacts) -> str:
    return next((name for part, name in _MACHINES.items() if f"-{part}-" in facts.soabi), facts.machine)


def _abi(facts: HostFacts) -> str:
    found = re.match(r"cpython-(\w+)", facts.soabi)
    return f"cp{found[1]}" if found else "cp{}{}".format(*facts.python)


# Downloads


def _downloaded(package: str, facts: HostFacts, folder: Path) -> Part:
    key = f"{package}-{_digest(repr(facts))}"
    try:
        return _made_once(folder, key, lambda scratch: _download(package, facts, scratch), _FRESH_S)
    except _Unusable:
        old = _cached(folder, key)
        if old is None:
            raise
        return old


def _download(package: str, facts: HostFacts, scratch: Path) -> Path:
    """Download the newest version for such a host, and unpack it in `scratch`. Returns its .dist-info."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--retries=1", "--timeout=15", "--no-deps", "--only-binary=:all:", "--dest=."]
    command += ["--implementation=cp", "--python-version={}.{}".format(*facts.python)]
    command += [f"--abi={abi}" for abi in (_abi(facts), "abi3", "none")]
    command += [f"--platform={platform}" for platform in platforms(facts)]
    try:
        # In `scratch`, because a module in the user's current folder might hide one that pip needs.
        pip = subprocess.run(
            [*command, package],
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PIP_S,
            check=False,
        )
    except OSError as error:
        raise _Unusable(f"it cannot be started ({error})") from error
    except subprocess.TimeoutExpired as error:
        raise _Unusable(f"no answer within {_PIP_S:.0f} s") from error
    if pip.returncode != 0:
        if "No module named pip" in pip.stderr:
            raise _Unusable(f"{sys.executable} has none (install it: {sys.executable} -m ensurepip)")
        raise _Unusable("; ".join(pip.stderr.strip().splitlines()[-3:]) or f"exit status {pip.returncode}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
    (info,) = scratch.glob("*.dist-info")
    return info


# The cache: <key>.zip, its description in <key>.json, which is written last, and <key>.lock while they are made.


def _made_once(folder: Path, key: str, make: Callable[[Path], Path], fresh_s: float = float("inf")) -> Part:
    """Return the part with this key. If it is not cached, pack the package whose .dist-info `make(scratch)` returns."""
    asked = time.time()
    part = _cached(folder, key, fresh_s)
    if part is not None:
        return part
    failure = folder / f"{key}.failed"
    with _locked(folder / f"{key}.lock"):
        part = _cached(folder, key, fresh_s)
        if part is not None:
            return part
        # If a hundred hosts waited here for a part and it failed, it failed for all of them.
        with contextlib.suppress(FileNotFoundError):
            if failure.stat().st_mtime >= asked:
                raise _Unusable(failure.read_text("utf-8"))
        _remove_old(folder)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as scratch:
                return _make(make(Path(scratch)), Path(scratch), folder / key)
        except _Unusable as error:
            _write(failure, str(error).encode())
            raise


def _make(info: Path, scratch: Path, target: Path) -> Part:
    packed, description = scratch / "part.zip", scratch / "part.json"
    content, unpacked = _pack(info, packed)
    data = packed.read_bytes()
    name = info.name.removesuffix(".dist-info").replace("-", " ", 1)
    # Not with_suffix: it would replace the end of a version.
    part = Part(name, content, Path(f"{target}.zip"), len(data), hashlib.sha256(data).hexdigest(), unpacked)
    fields = asdict(part) | {"made": time.time()}
    del fields["path"]
    _write(description, json.dumps(fields).encode())
    packed.replace(part.path)
    description.replace(f"{target}.json")
    return part


def _pack(info: Path, target: Path) -> tuple[str, int]:
    """Write a zip file of what the RECORD of this .dist-info lists. Returns its id and its unpacked size in bytes."""
    content, unpacked, importable = hashlib.sha256(_RULES.encode()), 0, False
    with open(info / "RECORD", encoding="utf-8", newline="") as record:
        rows = sorted(row for row in csv.reader(record) if row and not _LEFT_OUT.match(row[0]))
    with open(target, "xb", opener=_private) as file, zipfile.ZipFile(file, "w") as archive:
        for path, recorded, *_ in rows:
            try:
                data = (info.parent / path).read_bytes()
            except OSError as error:
                raise _Unusable(f"its installation is not complete ({error})") from error
            digest = hashlib.sha256(data).digest()
            # conda changes libraries after the installation: they then look for others in a folder of this machine.
            if recorded.startswith("sha256=") and base64.urlsafe_b64decode(f"{recorded[7:]}=") != digest:
                raise _Unusable(f"{info.parent / path} was changed after the installation")
            member = zipfile.ZipInfo(path, _EPOCH)
            member.external_attr = 0o644 << 16
            archive.writestr(member, data, zipfile.ZIP_DEFLATED, 1)
            content.update(f"{path}\n{digest.hex()}\n".encode())
            unpacked += -(-len(data) // _BLOCK) * _BLOCK
            importable |= path.endswith("/__init__.py") or bool(_MODULE.fullmatch(path))
    if not importable:
        raise _Unusable("it is an editable installation")
    return content.hexdigest(), unpacked


def _cached(folder: Path, key: str, fresh_s: float = float("inf")) -> Part | None:
    """Return the cached part with this key if it is not older than `fresh_s` seconds, and mark it as used."""
    path, description = folder / f"{key}.zip", folder / f"{key}.json"
    try:
        fields = json.loads(description.read_bytes())
        age = time.time() - fields.pop("made")
        part = Part(path=path, **fields)
        if age > fresh_s or path.stat().st_size != part.size:
            return None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    with contextlib.suppress(OSError):  # the cache may be on a read-only file system
        os.utime(path)
        os.utime(description)
    return part


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            age = time.time() - path.stat().st_mtime
            if path.name.startswith("making-") and age > _ABANDONED_S:
                shutil.rmtree(path)
            elif path.suffix in (".zip", ".json", ".lock", ".failed") and age > _UNUSED_S:
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb", opener=_private) as file:
        # Some network file systems have no locks. There several processes may make the same part; the last one stays.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _default_cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~"), ".cache")
    return home / "qjam" / "parts"


def _open_folder(folder: Path) -> None:
    for level in (*reversed(folder.parents), folder):
        level.mkdir(mode=0o700, exist_ok=True)
    stat = folder.stat()
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise PermissionError("others may write there, or own it; it must be yours alone (chmod 700)")


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb", opener=_private) as file:
        file.write(data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _digest(text: str) -> str:
    return hashlib.sha256(f"{_RULES}\n{text}".encode()).hexdigest()[:32]
