#!/usr/bin/env python3
"""Add up the elements of a matrix on workers: the smallest whole program that uses qjam.

It starts workers, makes a data set of a numpy matrix, maps a function over its slices and prints the sum.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import qjam
except ModuleNotFoundError:  # not installed: use the checkout that this program is in
    checkout = Path(__file__).resolve().parent.parent
    sys.path[1:1] = [str(checkout), str(checkout / "worker_bundle")]
    try:
        import qjam
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: run ./scripts/setup in the checkout, then . .venv/bin/activate")
import numpy as np


def mapfunc(params: None, rows: np.ndarray) -> np.int64:
    """Runs on the workers: give the sum of `rows`, one slice of the matrix; params are not needed here."""
    total: np.int64 = rows.sum()
    return total


def main() -> None:
    """Sum the numbers from 1 to size * size."""
    parser = argparse.ArgumentParser(description="Add up the elements of a matrix on workers.")
    parser.add_argument(
        "hosts",
        nargs="*",
        help='a worker for each: "local", "local*4", "alice@node1:2222*8"; none: the cores of this machine',
    )
    parser.add_argument("--size", type=int, default=10, help="rows, and columns (default: %(default)s)")
    args = parser.parse_args()
    if args.size < 1:
        parser.error(f"--size must be at least 1, not {args.size}")

    # The integers from 1 to size^2 in random order.
    count = args.size**2
    matrix = np.random.default_rng().permutation(np.arange(1, count + 1)).reshape(args.size, args.size)
    print(f"X = {np.array2string(matrix, prefix='X = ', threshold=256)}")
    print(f"Expected element sum of X = {count * (count + 1) // 2}")

    try:
        # Workers live as long as the `with` block.
        with qjam.Master(args.hosts or None) as master:
            for worker in master.workers:
                print(f"Started worker {worker.index} on {worker.host}")
            # A data set is cut into slices of rows, here one for each worker. It stays with the workers: a
            # second run over it would not send it again.
            total = master.run(mapfunc, None, qjam.DataSet(matrix))
    except ValueError as error:
        parser.error(str(error))
    except qjam.QjamError as error:
        sys.exit(f"{parser.prog}: {error}")

    print(f"Computed element sum of X = {total}")


if __name__ == "__main__":
    main()
