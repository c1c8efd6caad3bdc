"""The sum of all elements of a matrix."""

from __future__ import annotations

import numpy as np


def mapfunc(params: None, rows: np.ndarray) -> np.int64:
    """Give the sum of the elements of `rows`, one slice of the matrix; there are no params."""
    total: np.int64 = rows.sum()
    return total
