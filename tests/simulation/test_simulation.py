"""Whole clusters in virtual time: fresh seeds, all that ever failed, and whether a defect would be found at all."""

from __future__ import annotations

import importlib
import secrets
from collections import Counter
from pathlib import Path

import pytest

from simulation import mutations
from simulation.plans import DEATHS, PROFILES
from simulation.runner import Outcome, run, show

FRESH = 100
FAILED = Path(__file__).with_name("failed_seeds.txt")

# `python -m tests.simulation.mutations` tries all.
TELLING = [
    "counts what comes twice twice",
    "gives the roots in the order of arrival",
    "forgets to send again what a lost node owed",
    "forgets to send again what a lost worker had",
    "calls: queues one twice",
    "node, calls: forgets what a dead worker has written",
]


def well(outcome: Outcome, profile: str) -> Outcome:
    assert not outcome.broken, show(outcome.seed, profile)
    return outcome


@pytest.fixture(scope="module")
def fresh() -> Counter[str]:
    """What has been seen in many worlds that nobody has seen before."""
    first = secrets.randbelow(10**9)
    counts: Counter[str] = Counter()
    for seed in range(first, first + FRESH):
        counts += well(run(seed), "any").counts
    return counts


@pytest.mark.timeout(300)
def test_nothing_breaks_in_fresh_worlds(fresh):
    assert fresh["outcome: done"] > FRESH


@pytest.mark.parametrize(
    "fault",
    [
        "worker crashes", "worker hangs", "worker is slow", "node crashes", "node freezes", "host joins",
        "host is removed", "link breaks", "link is down", "result comes twice", "start fails", "cancelled",
        "master is away", "user code raises", "user code kills", "no room",
        "slice has changed", "calls are cancelled", "call finds an unfit process", "call is named late",
    ],
)  # fmt: skip
def test_every_kind_of_fault_is_tried(fresh, fault):
    assert fresh[f"fault: {fault}"] > 0


def test_calls_end_their_workers(fresh):
    assert sum(fresh[f"fault: call ends its worker: {when}"] for when in DEATHS) > 0


def test_data_is_let_go_and_released(fresh):
    assert fresh["data is let go"] > 0
    assert fresh["released"] > 0


@pytest.mark.parametrize(
    "outcome",
    ["done", "task", "lost", "timeout", "cancelled", "unreachable", "closed", "room", "call value", "call raised"],
)
def test_every_kind_of_end_is_seen(fresh, outcome):
    assert fresh[f"outcome: {outcome}"] > 0


@pytest.mark.parametrize("line", [line for line in FAILED.read_text().splitlines() if line[:1].isdigit()])
def test_seeds_that_have_failed_fail_no_more(line):
    seed, profile, *_ = line.split()
    well(run(int(seed), profile), profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_seed_gives_the_same_world_each_time(profile):
    once, again = run(7, profile), run(7, profile)
    assert (once.steps, once.counts) == (again.steps, again.counts)


@pytest.mark.parametrize("what", TELLING)
def test_a_defect_is_found(what):
    (mutation,) = [mutation for mutation in mutations.MUTATIONS if mutation.what == what]
    assert mutations.try_out(mutation, 500).broken


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.what)
def test_each_mutation_fits_the_code(mutation):
    assert Path(importlib.import_module(mutation.module).__file__).read_text().count(mutation.old) == 1
