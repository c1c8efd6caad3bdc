"""A sparse autoencoder learns edge filters from photographs: L-BFGS runs here, the workers compute the cost.

    python examples/sparse_autoencoder.py                       # on this machine's cores
    python examples/sparse_autoencoder.py 'node1*8' 'node2*8'   # on two hosts

The patches have 8x8 pixels and the network is 64-30-64, as in qjam's paper of 2010. saecost.py has the cost, patches.py
the data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from qjam import DataSet, Master, QjamError

if not __package__:  # run by its path: python's search path has this folder, not the one above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples import saecost
from examples.patches import SIDE, natural_patches

PIXELS = SIDE * SIDE

Total = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Maps theta to the cost summed over all patches and its gradient (shaped like theta)."""


class Fit(NamedTuple):
    """What `learn` found (theta: float64, one dimension; its cost) and what that took."""

    theta: np.ndarray
    cost: float
    iterations: int
    evaluations: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s for {self.iterations} iterations "
            f"({self.evaluations} evaluations of the cost; final cost {self.cost:.5f})"
        )


def learn(total: Total, patches: int, iterations: int) -> Fit:
    """Minimise the mean cost per patch by L-BFGS, and print the progress every tenth iteration."""
    done, cost, start = 0, np.inf, time.perf_counter()

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal cost
        summed, gradient = total(theta)
        decay, decay_gradient = saecost.weight_decay(theta, PIXELS)
        cost = summed / patches + decay
        return cost, gradient / patches + decay_gradient

    def show(theta: np.ndarray) -> None:
        nonlocal done
        done += 1
        if done % 10 == 0:
            speed = done / (time.perf_counter() - start)
            print(f"  iteration {done:4}   cost {cost:.5f}   {speed:5.1f} iterations/s", flush=True)

    # Tolerances of 0: L-BFGS ends after `iterations`, the same number with and without workers.
    options = {"maxiter": iterations, "maxfun": 10 * iterations, "maxcor": 20, "ftol": 0, "gtol": 0}
    theta = saecost.initial_theta(PIXELS)
    found = minimize(objective, theta, jac=True, method="L-BFGS-B", callback=show, options=options)
    return Fit(found.x, float(found.fun), found.nit, found.nfev, time.perf_counter() - start)


def draw_filters(theta: np.ndarray, path: Path) -> None:
    """Write a PNG with the input weights of each hidden unit; middle grey is a weight of 0."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    filters = saecost.unpack(theta, PIXELS).w1
    for axes, weights in zip(figure.subplots(5, 6).flat, filters, strict=True):
        limit = abs(weights).max()
        axes.imshow(weights.reshape(SIDE, SIDE), cmap="gray", vmin=-limit, vmax=limit)
        axes.set_axis_off()
    figure.savefig(path, format="png", dpi=150)


def main() -> None:
    """Learn on the workers, draw the filters, then learn again without workers and compare the times."""
    args = _arguments()
    patches = natural_patches(args.patches)
    print(f"{len(patches):,} patches of {SIDE}x{SIDE} pixels ({patches.nbytes / 1e6:.0f} MB)")

    # One BLAS thread in this process, as in each worker where every core has its worker: the speed-up then comes
    # from the workers and not from threads.
    with threadpool_limits(1):
        with _start(args.hosts) as master:
            workers = f"{len(master.workers)} worker{'s' * (len(master.workers) > 1)}"
            print(f"learning with {workers}")
            data = DataSet(patches)
            shared = learn(lambda theta: master.run(saecost, theta, data), len(patches), args.iterations)
        draw_filters(shared.theta, args.output)
        print(f"the filters are in {args.output}")

        print("learning once more without workers, for comparison")
        serial = learn(lambda theta: saecost.mapfunc(theta, patches), len(patches), args.iterations)

    print(f"serial:     {serial}")
    print(f"{workers + ':':11} {shared}, including the time to send the patches")
    # Sums in another order differ in the last bit; over hundreds of iterations that can add an evaluation or two.
    speedup = (serial.seconds / serial.evaluations) / (shared.seconds / shared.evaluations)
    print(f"speed-up:   {speedup:.2f} times per evaluation of the cost")


def _start(hosts: list[str]) -> Master:
    try:
        return Master(hosts or None)
    except (ValueError, QjamError) as error:
        sys.exit(f"sparse_autoencoder: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn edge filters from photographs.")
    parser.add_argument("hosts", nargs="*", help='"local*2", "node1*8" (default: one worker per usable core here)')
    parser.add_argument("--patches", type=_count, default=100_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--iterations", type=_count, default=300, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=_picture, default="filters.png", help="default: %(default)s")
    return parser.parse_args()


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return count


def _picture(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # fail now, not after a minute of learning
        raise argparse.ArgumentTypeError(f"{text}: not a file name in an existing folder")
    return path


if __name__ == "__main__":
    main()
