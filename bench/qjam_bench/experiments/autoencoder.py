"""The paper's table: L-BFGS trains a sparse autoencoder on patches of photographs; the workers compute the cost."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from qjam_bench import rivals
from qjam_bench.ends import loops, work
from qjam_bench.harness import options
from qjam_bench.harness.figures import OURS, PAPER, BenchError, Figure, Line, Spread, number
from qjam_bench.harness.party import Party, parts
from qjam_bench.rivals import turns

from . import report

SERIAL = "serial"
APART = "apart"
SAME_COST = 1e-3  # relative: sums in another order lead to another line search late in a run, but to the same minimum


class Serial(Party):
    """Compute the slices in this process, one after the other, without workers: pure computing."""

    def __init__(self, workers: int) -> None:
        """`workers`: the number of slices."""
        self._function = work("autoencoder")
        self._workers = workers
        self._slices: list[Any] = []

    def round(self, params: Any) -> Any:
        return sum(self._function(params, part) for part in self._slices)

    def _load(self, data: Any) -> None:
        self._slices = parts(data, self._workers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--patches", type=options.counts, default="1000,10000,100000", metavar="N,N", help="patches of 8x8 pixels"
    )
    parser.add_argument(
        "--workers", type=options.counts, default="1,2,4,8,16", metavar="N,N", help="workers (1,2,4,8,16)"
    )
    parser.add_argument("--iterations", type=options.count, default=20, metavar="N", help="iterations per run (20)")
    parser.add_argument("--runs", type=options.count, default=3, metavar="N", help="counted runs of each party (3)")
    rivals.add_against(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; gives the exit status."""
    figures, lines = measure(arguments)
    options.say(f"qjam, {arguments.iterations} iterations of L-BFGS; mean seconds per iteration, and the paper's\n")
    options.say(text(lines))
    options.say("\nmean milliseconds per iteration (median of all runs) of every party\n")
    plot, arguments.plot = arguments.plot, None
    status = report.finish(arguments, figures, "", {"lines": [line.row() for line in lines]})
    if plot:
        from qjam_bench.harness import plots

        plots.iterations(plot, figures, lines, PAPER)
    return status


def text(lines: Sequence[Line]) -> str:
    """Give qjam's lines as a table."""
    head = f"{'patches':>8} {'workers':>7} {'paper s':>8} {'qjam s':>8} {'total s':>8} {'step ms':>8} {'round ms':>9}"
    shown = [head + f" {'ideal ms':>9} {'over ms':>8} {'of ideal':>8} {'apart ms':>9}"]
    for line in lines:
        paper = PAPER.get(line.patches, {}).get(line.workers)
        shown.append(
            f"{line.patches:>8,} {line.workers:>7} {'' if paper is None else f'{paper:.4f}':>8} {line.iteration:>8.4f} "
            f"{line.total:>8.3f} {number(1e3 * line.step):>8} {number(1e3 * line.round):>9} "
            f"{number(1e3 * line.ideal):>9} {1e3 * (line.round - line.ideal):>8.2f} {line.efficiency:>8.1%} "
            f"{number(1e3 * line.apart):>9}"
        )
    return "\n".join(shown)


def measure(arguments: argparse.Namespace) -> tuple[list[Figure], list[Line]]:
    """Give one figure per number of patches, number of workers and party, and qjam's lines of the paper's table."""
    options.checkout("autoencoder")
    from examples import saecost
    from examples.patches import SIDE, natural_patches

    theta = saecost.initial_theta(SIDE * SIDE)
    data = {patches: np.ascontiguousarray(natural_patches(patches)) for patches in arguments.patches}
    figures: list[Figure] = []
    lines: list[Line] = []
    lost = rivals.absent(arguments.against)
    for workers in arguments.workers:
        with ExitStack() as stack:
            parties = turns.started(stack, rivals.chosen(arguments.against), "autoencoder", workers, lost=lost)
            parties[SERIAL] = Serial(workers)
            for patches, array in data.items():
                parties = {name: party for name, party in parties.items() if name not in lost}
                for party in parties.values():
                    party.load(array)
                turn: dict[str, Callable[[], Any]] = {
                    name: partial(party.drive, loops.learn, theta, patches, SIDE * SIDE, arguments.iterations)
                    for name, party in parties.items()
                }
                turn[APART] = partial(computed_apart, theta, parts(array, workers), arguments.iterations)
                runs = turns.take_turns(turn, arguments.runs, lost=lost)
                apart = runs.pop(APART)
                _same(runs)
                lines.append(_line(patches, workers, runs, apart))
                figures += [_figure(lines[-1].what, name, taken) for name, taken in runs.items()]
                figures += turns.figures(lines[-1].what, {}, lost)
    order = {patches: index for index, patches in enumerate(arguments.patches)}
    return figures, sorted(lines, key=lambda line: order[line.patches])


def _same(runs: dict[str, list[loops.Learnt]]) -> None:
    """Raise BenchError unless all runs ended with the same cost."""
    cost = runs[SERIAL][0].cost
    for name, taken in runs.items():
        for run in taken:
            if not np.isclose(run.cost, cost, rtol=SAME_COST):
                raise BenchError(f"{name} ended with a cost of {run.cost}, not {cost}")


def _figure(what: str, name: str, runs: Sequence[loops.Learnt]) -> Figure:
    more = {"evaluations": [len(run.rounds) for run in runs], "totals": [run.seconds for run in runs]}
    more |= {"costs": [run.cost for run in runs], "rounds": [run.rounds for run in runs]}
    return Figure(what, name, [run.seconds / run.iterations for run in runs], more=more)


def _line(patches: int, workers: int, runs: dict[str, list[loops.Learnt]], apart: list[float]) -> Line:
    cores = min(workers, _cores())
    rounds, pure = ([float(np.mean(run.rounds)) for run in runs[name]] for name in (OURS, SERIAL))

    def median(take: Callable[[loops.Learnt], float]) -> float:
        return Spread.of([take(run) for run in runs[OURS]]).median

    return Line(
        patches,
        workers,
        iteration=median(lambda run: run.seconds / run.iterations),
        total=median(lambda run: run.seconds),
        step=median(lambda run: (run.seconds - sum(run.rounds)) / run.iterations),
        round=Spread.of(rounds).median,
        pure=Spread.of(pure).median,
        apart=Spread.of(apart).median,
        cores=cores,
        efficiency=Spread.of([alone / cores / ours for alone, ours in zip(pure, rounds, strict=True)]).median,
    )


def computed_apart(theta: Any, slices: Sequence[Any], rounds: int) -> float:
    """Give the seconds of a round in which one process per core computes its share, without talking to the others.

    It shows what the machine gives while all cores are busy: each is slower then than while the others are idle.
    """
    cores = min(len(slices), _cores())
    context = get_context("fork")
    barrier = context.Barrier(cores)
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_compute, args=(theta, slices[core::cores], rounds, barrier, results))
        for core in range(cores)
    ]
    for process in processes:
        process.start()
    seconds = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return float(max(seconds))


def _compute(theta: Any, slices: Sequence[Any], rounds: int, barrier: Any, results: Any) -> None:
    function = work("autoencoder")
    for part in slices:
        function(theta, part)
    barrier.wait()
    began = time.perf_counter()
    for _ in range(rounds):
        for part in slices:
            function(theta, part)
    results.put((time.perf_counter() - began) / rounds)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
