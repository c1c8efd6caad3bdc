"""The loops that the experiments measure. A loop runs where the party's rounds start; with MPI that is rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Round = Callable[[Any], Any]
"""One round of one party: takes params, returns the sum over its workers."""

FEWEST = 1  # counted rounds of a batch at least, however slow they are


def timed_rounds(play: Round, params: Any, expected: Any, settle: int, most: int, budget: float) -> list[float]:
    """Give the seconds of each counted round: at most `most`, or as many as begin within `budget` seconds.

    The first `settle` rounds do not count: they fill caches and wake processes. Raises ArithmeticError for a wrong sum.
    """
    taken: list[float] = []
    stop = time.perf_counter() + budget
    while len(taken) < settle + most and (len(taken) < settle + FEWEST or time.perf_counter() < stop):
        began = time.perf_counter()
        answer = play(params)
        taken.append(time.perf_counter() - began)
        if not np.array_equal(answer, expected):
            raise ArithmeticError("a wrong sum")
    return taken[settle:]


def once(play: Round, params: Any) -> Any:
    """Give the answer of one round."""
    return play(params)


def timed_once(play: Round, params: Any) -> float:
    """Give the seconds of one round; its answer is not checked."""
    began = time.perf_counter()
    play(params)
    return time.perf_counter() - began


class Learnt(NamedTuple):
    """One run of L-BFGS. `seconds`: of the run; `rounds`: the seconds of each evaluation of the cost."""

    cost: float
    iterations: int
    seconds: float
    rounds: list[float]


def learn(play: Round, theta: Any, patches: int, pixels: int, iterations: int) -> Learnt:
    """Minimise the autoencoder's cost from `theta` on, by `iterations` of L-BFGS as in examples/sparse_autoencoder.py.

    `patches`: how many there are. `pixels`: how many a patch has.
    """
    from scipy.optimize import minimize

    from examples import saecost

    rounds: list[float] = []

    def objective(theta: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        answer = play(theta)
        rounds.append(time.perf_counter() - began)
        decay, decay_gradient = saecost.weight_decay(theta, pixels)
        return answer[0] / patches + decay, answer[1:] / patches + decay_gradient

    # Tolerances of 0: L-BFGS ends after `iterations`, the same number for every party.
    options = {"maxiter": iterations, "maxfun": 10 * iterations, "maxcor": 20, "ftol": 0, "gtol": 0}
    play(theta)  # not counted: it wakes processes and brings the slices
    began = time.perf_counter()
    found = minimize(objective, theta, jac=True, method="L-BFGS-B", options=options)
    return Learnt(float(found.fun), int(found.nit), time.perf_counter() - began, rounds)
