"""Programs that run at the far end of a rival, and their modules. They import nothing of qjam, to start fast."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
CHECKOUT = FOLDER.parents[2]  # in a checkout: it has examples/ and tests/
STOP_S = 5.0  # seconds that a child has to end by itself


def prepare() -> None:
    """Let this process and its children import what the parties compute, and the examples of a checkout."""
    folders = [str(FOLDER), str(CHECKOUT / "bench"), str(CHECKOUT)]
    sys.path += [folder for folder in folders if folder not in sys.path]
    paths = [*folders, str(CHECKOUT / "worker_bundle"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep)))


def work(name: str) -> Callable[[Any, Any], Any]:
    """Give one function of qjam_bench_work, a module that every child of this process can import by name."""
    found: Callable[[Any, Any], Any] = getattr(importlib.import_module("qjam_bench_work"), name)
    return found


def program(name: str, *arguments: str) -> list[str]:
    """Give the command line of one of the programs in this folder."""
    return [sys.executable, str(FOLDER / f"{name}.py"), *arguments]


@contextmanager
def child(command: Sequence[str]) -> Iterator[None]:
    """Run a child process during the block, then wait `STOP_S` for it to end, then kill it."""
    # In a session of its own the child does not get the terminal's Ctrl-C, on which it would print a traceback.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
        process.wait(STOP_S)
    finally:
        process.kill()  # does nothing once wait() has returned
        process.wait()
