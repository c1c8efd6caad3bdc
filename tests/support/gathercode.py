"""Functions for `collect`, `map` and `reduce=`, and classes with a sum of their own. Hosts get this file's source."""

from __future__ import annotations

import os
import time


class Moments:
    """Adds itself up, in place where it can: qjam must not give it what is not its own."""

    def __init__(self, values):
        import numpy as np

        self.sums = np.array([len(values), sum(values)], float)

    def __add__(self, other):
        self.sums += other.sums
        return self


class Vector(list):
    """A list whose + is not that of lists."""

    def __add__(self, other):
        return Vector([a + b for a, b in zip(self, other)])


def moments(params, part):
    return Moments(part)


def vector(params, part):
    return Vector(part)


def first(params, part):
    return part[0]


def largest(a, b):
    return max(a, b)


def broken_reduce(a, b):
    raise ArithmeticError(f"cannot reduce {a} and {b}")


def inverse(item):
    return 1 / item


def wait_for_the_others(item):
    """Item 0 lasts until all others are done, which others count in a file."""
    path, index, others = item
    if index:
        with open(path, "ab", buffering=0) as file:
            file.write(b".")
        return index
    while not os.path.exists(path) or os.path.getsize(path) < others:
        time.sleep(0.005)
    return index
