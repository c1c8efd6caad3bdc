"""The cost of a sparse autoencoder and its gradient, as a sum over patches: the job of the workers.

A network with one hidden layer learns to repeat its input (`a = tanh(W1 x + b1)`, `y = tanh(W2 a + b2)`)
while few of its hidden units are active. Every term of the cost, the sparsity penalty too, belongs to one patch.
The sum over all patches therefore does not depend on how they are cut into slices. (Ng's CS294A notes penalise the
*mean* activation of a unit, which needs all patches at once.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

HIDDEN = 30  # hidden units
SPARSITY = 0.3  # the weight of the sparsity penalty ...
ROUNDING = 1e-3  # ... sqrt(a^2 + ROUNDING): |a| with a rounded tip, because L-BFGS needs a smooth cost
WEIGHT_DECAY = 0.015
BLOCK = 200  # patches at a time: twice as fast, since arrays of 100 kB stay in the cache and need no fresh memory


class Weights(NamedTuple):
    """The network's parameters: float64 views of one flat vector."""

    w1: np.ndarray  # (HIDDEN, pixels)
    w2: np.ndarray  # (pixels, HIDDEN)
    b1: np.ndarray  # (HIDDEN,)
    b2: np.ndarray  # (pixels,)


def unpack(theta: np.ndarray, pixels: int) -> Weights:
    """Return the parts of `theta`: float64, shape `(2 * HIDDEN * pixels + HIDDEN + pixels,)`."""
    w1, w2, b1, b2 = np.split(theta, np.cumsum([HIDDEN * pixels, HIDDEN * pixels, HIDDEN]))
    return Weights(w1.reshape(HIDDEN, pixels), w2.reshape(pixels, HIDDEN), b1, b2)


def initial_theta(pixels: int, seed: int = 1) -> np.ndarray:
    """Return small random weights and zero biases: float64, shape `(2 * HIDDEN * pixels + HIDDEN + pixels,)`."""
    weights = np.random.default_rng(seed).normal(scale=0.1, size=2 * HIDDEN * pixels)
    return np.concatenate([weights, np.zeros(HIDDEN + pixels)])


def mapfunc(theta: np.ndarray, patches: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the cost, summed over `patches` (float64, shape `(k, pixels)`), and its gradient (shaped like `theta`)."""
    weights = unpack(theta, patches.shape[1])
    cost, gradient = 0.0, np.zeros_like(theta)
    for start in range(0, len(patches), BLOCK):
        block_cost, block_gradient = _cost(weights, patches[start : start + BLOCK])
        cost += block_cost
        gradient += block_gradient
    return cost, gradient


def _cost(weights: Weights, x: np.ndarray) -> tuple[float, np.ndarray]:
    w1, w2, b1, b2 = weights
    a = np.tanh(x @ w1.T + b1)
    y = np.tanh(a @ w2.T + b2)
    error = y - x
    size = np.sqrt(a**2 + ROUNDING)
    cost = 0.5 * np.vdot(error, error) + SPARSITY * size.sum()

    dy = error * (1 - y**2)
    da = (dy @ w2 + SPARSITY * a / size) * (1 - a**2)
    gradient = [(da.T @ x).ravel(), (dy.T @ a).ravel(), da.sum(axis=0), dy.sum(axis=0)]
    return float(cost), np.concatenate(gradient)


def weight_decay(theta: np.ndarray, pixels: int) -> tuple[float, np.ndarray]:
    """Return the penalty on large weights and its gradient (shaped like `theta`); add them once, not per patch."""
    gradient = WEIGHT_DECAY * theta
    gradient[2 * HIDDEN * pixels :] = 0  # not on the biases
    return float(0.5 * theta @ gradient), gradient
