"""What user code may ask: which slice it maps, where, and for random numbers that belong to that slice."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import NamedTuple, Optional, Union

import numpy as np


class Task(NamedTuple):
    """One call of mapfunc.

    Attributes:
        slice: the index of the slice, from 0 on; without a data set that of the call.
        nslices: how many slices the data set has; without one, how often mapfunc is called.
        worker: the index of the worker on its host, as in TaskError.
        host: the host as the master names it, as in TaskError.
        attempt: 1; more if the slice was given to a worker before, which was lost or is late. That worker may be at
            work still.
    """

    slice: int
    nslices: int
    worker: int
    host: str
    attempt: int = 1

    def rng(self, seed: Union[int, Sequence[int]]) -> np.random.Generator:
        """A new random generator that depends on `seed` and on the index of the slice, and on nothing else.

        `seed`: a whole number from 0 on, or a sequence of them: `rng([seed, round])` gives each round other numbers.
        The streams of different slices are independent. That of slice i is
        `np.random.default_rng(np.random.SeedSequence(seed).spawn(nslices)[i])`.

        Raises TypeError for anything else, None included: numbers that cannot be drawn again are `default_rng()`'s.
        ValueError for a negative number.
        """
        if seed is None:
            raise TypeError("seed must be a whole number or a sequence of them, not None")
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(self.slice,)))


# By thread: in a user's program several threads may map at once, each for a master of its own.
_running: dict[int, Task] = {}


def current_task() -> Task:
    """The Task that runs now. For user code, inside mapfunc and what it calls; threads that mapfunc starts may ask too.

    Raises RuntimeError everywhere else: in the program that has the Master, at the top level of a module, and in
    `reduce(a, b)`, which belongs to no slice and may run in any worker or in the program.
    """
    task = _running.get(get_ident())
    if task is None:
        others = list(_running.values())
        if len(others) != 1:
            raise RuntimeError("current_task() is for mapfunc and what it calls: no slice is mapped here now")
        (task,) = others
    return task


def set_current(task: Optional[Task]) -> Optional[Task]:
    """This thread maps for `task` from now on; None: for none. Gives what it was before."""
    thread = get_ident()
    before = _running.get(thread)
    if task is None:
        _running.pop(thread, None)
    else:
        _running[thread] = task
    return before
