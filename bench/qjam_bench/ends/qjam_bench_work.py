"""What the workers of every party compute: f(params, slice) -> float64 array, whose results are added, and calls.

A call is a function that gives back its last argument, so that every result can be checked.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np


def one(params: Any, part: Any) -> Any:
    """Give 1: the shortest answer, for measuring a start."""
    return np.ones(1)


def scale(params: Any, part: Any) -> Any:
    """Give params times 1.0: as many numbers as came."""
    return params * 1.0


def touch(params: Any, part: Any) -> Any:
    """Give one number that depends on every page of the params, so that all of them must have arrived."""
    return np.array([params[:: 4096 // params.itemsize].sum()])


def look(params: Any, part: Any) -> Any:
    """Give the sum of the whole slice if params[0] is not 0, else that of its first and last row: both have arrived."""
    return np.array([part.sum() if params[0] else part[0].sum() + part[-1].sum()])


def autoencoder(theta: Any, patches: Any) -> Any:
    """Give the cost of a sparse autoencoder and its gradient, in one array."""
    from examples import saecost

    cost, gradient = saecost.mapfunc(theta, patches)
    return np.concatenate([[cost], gradient])


def echo(number: int) -> int:
    """Do nothing."""
    return number


def nap(seconds: float, number: int) -> int:
    """Sleep, a few microseconds too long at most."""
    ctypes.CDLL(None).prctl(29, 1)  # PR_SET_TIMERSLACK, in ns; the usual one is 50 us
    time.sleep(seconds)
    return number


def look_up(array: Any, number: int) -> int:
    """Read from every page of an array of ones, so that all of it must have arrived."""
    return int(array[:: 4096 // array.itemsize].min() * number)
