"""Add up the inner products of `theta` with all rows of a matrix. The module brings its own data, `x` and `theta`."""

from __future__ import annotations

import numpy as np

x = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
theta = np.array([2, 4])


def mapfunc(theta: np.ndarray, rows: np.ndarray) -> np.int64:
    """Return the sum of `row @ theta` over `rows`: int64, shape `(k, 2)`, a slice of `x`."""
    total: np.int64 = (rows @ theta).sum()
    return total
