"""The inner product of `theta` with every row of a matrix, added up; brings its own data."""

from __future__ import annotations

import numpy as np

x = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
theta = np.array([2, 4])


def mapfunc(theta: np.ndarray, rows: np.ndarray) -> np.int64:
    """Give the sum over `rows` (shape `(k, 2)`, a slice of `x`) of the inner product with `theta`."""
    total: np.int64 = (rows @ theta).sum()
    return total
