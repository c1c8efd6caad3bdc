"""The smallest job: multiply every number by a factor and add up the products."""

from __future__ import annotations

from collections.abc import Sequence


def mapfunc(factor: float, numbers: Sequence[float]) -> float:
    """Return the sum of `factor * number` over `numbers`, one slice of the data set."""
    return sum(factor * number for number in numbers)
