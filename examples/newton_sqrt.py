"""Find the square root of a number by Newton's method: a loop that changes the params and keeps the data set."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence


def mapfunc(guess: float, numbers: Sequence[float]) -> float:
    """Return a better guess at the square root of `numbers[0]`; the slice holds one number."""
    return (guess + numbers[0] / guess) / 2


def main() -> None:
    """Print each guess until the next one does not change it any more."""
    from qjam import DataSet, Master, QjamError

    parser = argparse.ArgumentParser(description="Find the square root of a number by Newton's method.")
    parser.add_argument("number", type=_positive)
    parser.add_argument("hosts", nargs="*", help='"local", "node1" (default: one worker on this machine)')
    args = parser.parse_args()

    data = DataSet([args.number])  # one slice, so one worker has work and the others stay idle
    guess, change, step = max(args.number, 1.0), math.inf, 0
    try:
        master = Master(args.hosts or 1)
    except (ValueError, QjamError) as error:
        parser.error(str(error))
    with master:
        while change > 1e-15 * guess:
            better = master.run(mapfunc, guess, data)
            change, guess, step = abs(better - guess), better, step + 1
            print(f"{step}. {guess:.12g} (change {change:.3g})")


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


if __name__ == "__main__":
    main()
