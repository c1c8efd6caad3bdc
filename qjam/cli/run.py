"""`qjam run`: map a module's mapfunc over a data set and print the result. Module, data set and params are given by
dotted names.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import qjam

SUMMARY = "Map MODULE's mapfunc over the slices of DATASET and print the reduced result."
EXAMPLES = """\
DATASET comes before PARAMS here, although mapfunc takes params first, because PARAMS may be left out.

  %(prog)s examples.multiply_sum examples.sequences.onetoten examples.sequences.three
  %(prog)s -w "local*4" examples.numpy_inner_prod examples.numpy_inner_prod.x examples.numpy_inner_prod.theta

Python looks for modules in the current folder first. The exit status is 1 if the task fails or a host does
not start, and 2 for a wrong argument.
"""


class BadArgumentError(Exception):
    """A dotted name on the command line is wrong. The text is one line for the user."""


def find_module(name: str) -> ModuleType:
    """Import and return the module `name`. Raises BadArgumentError."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadArgumentError(f"cannot import {name}: {reason}") from error


def find_value(name: str) -> Any:
    """Return the object with the dotted name package.module.name. Raises BadArgumentError."""
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise BadArgumentError(f"{name!r} is not a dotted name like package.module.name")
    module = find_module(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise BadArgumentError(f"{module_name} has no {attribute!r}") from None


def find_job(name: str) -> ModuleType:
    """Import and return the module `name`. Raises BadArgumentError, also if it has no mapfunc."""
    module = find_module(name)
    if not callable(getattr(module, "mapfunc", None)):
        raise BadArgumentError(f"{name} has no mapfunc(params, slice)")
    return module


def find_dataset(name: str) -> qjam.BaseDataSet:
    """Return the object with that dotted name as a data set. Raises BadArgumentError."""
    try:
        return qjam.DataSet(find_value(name))
    except (TypeError, ValueError) as error:
        raise BadArgumentError(f"{name} is no data set: {error}") from error


def main(arguments: Sequence[str], program: str = "qjam-run") -> int:
    """Parse the command line, run the job, print the result. Returns the exit status. Errors begin with `program`."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("module", metavar="MODULE", help="package.module with mapfunc and optionally reduce(a, b)")
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        nargs="?",
        help="package.module.name of a list, tuple, array or DataSet; without it mapfunc runs once on each worker",
    )
    parser.add_argument("params", metavar="PARAMS", nargs="?", help="package.module.name of any value")
    parser.add_argument(
        "-w",
        "--workers",
        metavar="HOSTS",
        help='"local local", "local*4", "alice@node1 node2*8" (default: one worker per usable core of this machine)',
    )
    args = parser.parse_args(arguments)

    sys.path.insert(0, os.getcwd())
    try:
        module = find_job(args.module)
        dataset = find_dataset(args.dataset) if args.dataset else None
        params = find_value(args.params) if args.params else None
        master = qjam.Master(args.workers)
    except (BadArgumentError, ValueError) as error:  # Master raises ValueError for wrong hosts
        return _fail(program, error, 2)
    except qjam.QjamError as error:
        return _fail(program, error, 1)
    try:
        with master:
            print(master.run(module, params, dataset))
    except (qjam.QjamError, TypeError) as error:  # run raises TypeError for values that cannot be sent or added
        return _fail(program, error, 1)
    return 0


def _fail(program: str, error: Exception, status: int) -> int:
    print(f"{program}: {error}", file=sys.stderr)
    return status
