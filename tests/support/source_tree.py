"""The modules of the three packages and what they import, read from the source.

`python tests/support/source_tree.py` prints each file that is too long, and a circle of imports if there is one. Its
exit status is 1 for a circle; length is only reported.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "qjam": ROOT / "qjam",
    "qjam_worker": ROOT / "worker_bundle" / "qjam_worker",
    "qjam_bench": ROOT / "bench" / "qjam_bench",
}
MAX_LINES = 450  # a longer file often does two things
SHORT = ("qjam", "qjam_worker")  # the packages whose files should be no longer


def modules() -> Iterator[tuple[str, Path]]:
    """Yields the name and file of every module of the three packages."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Yields (absolute name, is it for the type checker only) of each import, wherever it stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base, node in typing_only


def module_imports() -> dict[str, set[str]]:
    """Gives the modules that each module of the three packages imports when it runs, by name."""
    return {
        name: {target for target, typing in imports(name, path) if target in MODULES and not typing}
        for name, path in MODULES.items()
    }


def circle(below: Mapping[str, Iterable[str]]) -> list[str]:
    """Gives one circle: each name imports the next, and the last is the first again. Empty if there is none."""
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def long_files(files: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    """Yields each file that has more than MAX_LINES lines, and how many it has."""
    for path in files:
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            yield path, lines


def main() -> int:
    """Print long files and a circle; gives the exit status."""
    for path, lines in long_files(path for name, path in MODULES.items() if name.split(".")[0] in SHORT):
        print(f"{path.relative_to(ROOT)}: {lines} lines, more than {MAX_LINES}: can it be two files?")
    found = circle(module_imports())
    if found:
        print(f"a circle of imports: {' -> '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
