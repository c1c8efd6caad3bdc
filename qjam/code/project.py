"""Finds the modules of the user's project, as an import would, and reads what hosts need of them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import io
import os
import site
import sys
import sysconfig
import tokenize
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

# Package data that a host gets with a package: bytes of all its files together. What does not fit is left out.
MAX_DATA = 64 * 1024 * 1024

_INSTALLED = ("site-packages", "dist-packages")
_ENVIRONMENT = tuple(
    os.path.join(path, "")
    for path in {
        form(path)
        for form in (os.path.realpath, os.path.abspath)
        for path in (
            *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
            *(site.getsitepackages() if hasattr(site, "getsitepackages") else ()),
            site.getusersitepackages(),
        )
    }
)
_EXTENSIONS = tuple(importlib.machinery.EXTENSION_SUFFIXES)

Stamp = tuple[int, int]  # time of change in ns and size; (0, 0): there is no file


class Found(NamedTuple):
    """A module as an import would find it now. `source` is None if it has none: an extension module, or byte code."""

    source: bytes | None
    path: str  # of its file; "" if it has none
    folders: list[str]  # of a package: where its modules lie
    package: bool
    stamp: Stamp


def stamp(path: str) -> Stamp:
    """Changes whenever the file does."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a module that is loaded, or that an import would find; no parent package is imported."""
    loaded = getattr(sys.modules.get(name), "__spec__", None)
    if isinstance(loaded, importlib.machinery.ModuleSpec):
        return loaded
    parent, _, _ = name.rpartition(".")
    path = None
    if parent:
        above = spec_of(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        path = list(above.submodule_search_locations)
    return search(sys.meta_path, name, path)


def search(
    finders: Iterable[object], name: str, path: Sequence[str] | None, target: ModuleType | None = None
) -> importlib.machinery.ModuleSpec | None:
    """What the first of these finders finds."""
    for finder in finders:
        find = getattr(finder, "find_spec", None)
        spec = find(name, path, target) if find is not None else None
        if isinstance(spec, importlib.machinery.ModuleSpec):
            return spec
    return None


def belongs(spec: importlib.machinery.ModuleSpec, ship: Collection[str] = ()) -> bool:
    """Whether a module is the user's: it is neither in the standard library nor installed, or it is to be shipped.

    qjam itself counts as the user's, because user modules may import it. A namespace package is the user's if a part of
    it is.
    """
    top = spec.name.partition(".")[0]
    if top == "qjam" or top in ship:
        return True
    if spec.origin in ("built-in", "frozen"):
        return False
    if spec.has_location:
        return not _is_installed(spec.origin or "")
    if spec.submodule_search_locations is not None:
        return any(not _is_installed(folder) for folder in spec.submodule_search_locations)
    return has_source(spec) and _is_own(spec.loader)


def has_source(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether the loader of a module can tell its source."""
    return callable(getattr(spec.loader, "get_source", None))


def is_extension(path: str) -> bool:
    """Whether this is the file of a module that was compiled for one machine."""
    return path.endswith(_EXTENSIONS)


def own_finders() -> tuple[list[Any], list[Any]]:
    """The finders of sys.meta_path and the sys.path_hooks that the user has added."""
    return list(filter(_is_own, sys.meta_path)), list(filter(_is_own, sys.path_hooks))


def _is_own(finder: Any) -> bool:
    """Whether a finder, a loader or a hook is made by code of the user's."""
    module = getattr(finder if isinstance(finder, (type, FunctionType)) else type(finder), "__module__", None)
    if module in ("__main__", None):
        return module is not None
    spec = spec_of(module)
    return spec is not None and module.partition(".")[0] != "qjam" and belongs(spec)


def _is_installed(path: str) -> bool:
    """Whether a file or folder, or what it links to, lies where the standard library or packages are installed."""
    for place in (os.path.join(path, ""), os.path.join(os.path.realpath(path), "")):
        if place.startswith(_ENVIRONMENT) or any(part in place.split(os.sep) for part in _INSTALLED):
            return True
    return False


def read(spec: importlib.machinery.ModuleSpec) -> Found:
    """The module of this spec, with its source as it is now. Raises OSError if its file cannot be read.

    The stamp is from before the file was read, so that a change during the reading is noticed later.
    """
    path = (spec.origin or "") if spec.has_location else ""
    folders = list(spec.submodule_search_locations or ())
    package = spec.submodule_search_locations is not None
    if package and not path and not has_source(spec):
        return Found(b"", "", folders, True, (0, 0))  # a namespace
    before = stamp(path)
    if path.endswith(".py") and os.path.isfile(path):
        with open(path, "rb") as file:
            return Found(file.read(), path, folders, package, before)
    return Found(_source_by_loader(spec), path, folders, package, before)


def _source_by_loader(spec: importlib.machinery.ModuleSpec) -> bytes | None:
    """What a zip file or a finder of the user's has."""
    get_source = getattr(spec.loader, "get_source", None)
    try:
        text = get_source(spec.name) if callable(get_source) else None
    except Exception as error:  # a loader of the user's may raise anything
        raise OSError(f"the loader of {spec.name} does not give its source: {error}") from error
    if text is None:
        return None
    encoding, _ = tokenize.detect_encoding(io.BytesIO(str(text).encode("utf-8", "replace")).readline)
    return str(text).encode(encoding)


def standard_names_of_the_project(ship: Collection[str]) -> list[str]:
    """Names of the standard library that an import here gives a module of the user's project for."""
    beside = {
        entry.partition(".")[0]
        for folder in sys.path
        if not _is_installed(folder or os.getcwd())
        for entry in _entries(folder or os.getcwd())
    }
    names = sys.stdlib_module_names & (beside | sys.modules.keys()) - {"__main__"}
    return sorted(name for name in names if (spec := spec_of(name)) is not None and belongs(spec, ship))


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        try:
            with zipfile.ZipFile(folder) as archive:
                return [name.partition("/")[0] for name in archive.namelist()]
        except (OSError, zipfile.BadZipFile):
            return []


class _File(NamedTuple):
    """A file of a package: its name below the package, its size, and a number that changes with it."""

    name: str
    size: int
    changed: int
    path: str

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()


class _Member(NamedTuple):
    """The same in a zip file."""

    name: str
    size: int
    changed: int
    archive: str
    member: str

    def read(self) -> bytes:
        with zipfile.ZipFile(self.archive) as archive:
            return archive.read(self.member)


class Tree(NamedTuple):
    """The files of a package. `digest`: changes with them. `left_out`: names of those that are too large to travel."""

    files: list[_File | _Member]
    digest: str
    left_out: list[str]

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """The names and contents. An extension module becomes an empty file, so that a host can list it, as it cannot
        run it.
        """
        for file in self.files:
            if is_extension(file.name):
                yield file.name.partition(".")[0] + ".so", b""
            else:
                with contextlib.suppress(OSError):  # it has been removed meanwhile
                    yield file.name, file.read()


def tree(spec: importlib.machinery.ModuleSpec) -> Tree:
    """The files in the folders of a package, without caches and hidden ones. Reads none of them."""
    files: dict[str, _File | _Member] = {}
    left_out, room, digest = [], MAX_DATA, hashlib.sha256()
    for file in sorted(_package_files(spec)):
        size = 0 if is_extension(file.name) else file.size
        if size > room:
            left_out.append(file.name)
        elif file.name not in files:
            files[file.name] = file
            room -= size
            digest.update(f"{len(os.fsencode(file.name))} {size} {file.changed} ".encode() + os.fsencode(file.name))
    return Tree(list(files.values()), digest.hexdigest()[:32], left_out)


def _package_files(spec: importlib.machinery.ModuleSpec) -> Iterator[_File | _Member]:
    archive = getattr(spec.loader, "archive", None)
    for folder in spec.submodule_search_locations or ():
        if isinstance(archive, str) and folder.startswith(archive + os.sep):
            inside = folder[len(archive) + 1 :].replace(os.sep, "/") + "/"
            with zipfile.ZipFile(archive) as members:
                for member in members.infolist():
                    path = member.filename
                    if path.startswith(inside) and not member.is_dir():
                        yield _Member(path[len(inside) :], member.file_size, member.CRC, archive, path)
        elif not _is_installed(folder) or spec.has_location:
            yield from _files_below(folder)


def _files_below(folder: str) -> Iterator[_File]:
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        for name in names:
            path = os.path.join(above, name)
            if not name.startswith(".") and not name.endswith(".pyc") and os.path.isfile(path):
                changed, size = stamp(path)
                yield _File(os.path.relpath(path, folder), size, changed, path)


def check_shippable(names: Iterable[str]) -> None:
    """Raise ValueError, which names `ship`, for a package that cannot be found or that is not pure Python."""
    for name in names:
        spec = search(sys.meta_path, name, None) if name.isidentifier() else None
        if spec is None:
            raise ValueError(f"ship: there is no module {name!r} here; name top-level modules or packages")
        if not is_pure(spec):
            built = _extensions(spec)
            what = f"has an extension module, {built[0]}" if built else "is a part of python itself"
            raise ValueError(f"ship: {name} {what}, and so cannot travel: install it on the hosts")


def is_pure(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether a module or package can travel as source."""
    return not _extensions(spec) and bool(spec.has_location or spec.submodule_search_locations)


def _extensions(spec: importlib.machinery.ModuleSpec) -> list[str]:
    files = [file.name for file in _package_files(spec)] or [spec.origin or ""]
    return [path for path in files if is_extension(path)]
