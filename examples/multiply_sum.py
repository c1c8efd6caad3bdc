"""The smallest job: multiply every number by a factor and add up."""

from __future__ import annotations

from collections.abc import Sequence


def mapfunc(factor: float, numbers: Sequence[float]) -> float:
    """Give the sum of `factor` times each of `numbers`, which is one slice of the data set."""
    return sum(factor * number for number in numbers)
