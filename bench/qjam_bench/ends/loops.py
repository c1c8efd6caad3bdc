"""The loops that are measured. They run where a party's rounds start: here, or for MPI in the process of rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Round = Callable[[Any], Any]
"""One round of one party: params in, the sum over its workers out."""

FEWEST = 1  # rounds that count of every batch, however slow


def timed_rounds(play: Round, params: Any, expected: Any, settle: int, most: int, budget: float) -> list[float]:
    """Give the seconds of each of some rounds, `most` or as many as begin within `budget` seconds.

    The first `settle` are not counted: caches and sleeping processes come back. Raises ArithmeticError for a wrong sum.
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
    """Give the seconds of one round, whatever it answers."""
    began = time.perf_counter()
    play(params)
    return time.perf_counter() - began


class Learnt(NamedTuple):
    """What one run of L-BFGS took; `rounds` has the seconds of each evaluation of the cost."""

    cost: float
    iterations: int
    seconds: float
    rounds: list[float]


def learn(play: Round, theta: Any, patches: int, pixels: int, iterations: int) -> Learnt:
    """Minimise the cost of the autoencoder from `theta` on by so many iterations of L-BFGS.

    As examples/sparse_autoencoder.py does it; `patches` is the number of them, `pixels` that of one.
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

    # Tolerances of 0: it is the number of iterations that ends it, the same for whoever computes the cost.
    options = {"maxiter": iterations, "maxfun": 10 * iterations, "maxcor": 20, "ftol": 0, "gtol": 0}
    play(theta)  # not counted: all is there and awake
    began = time.perf_counter()
    found = minimize(objective, theta, jac=True, method="L-BFGS-B", options=options)
    return Learnt(float(found.fun), int(found.nit), time.perf_counter() - began, rounds)
