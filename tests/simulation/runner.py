"""Runs seeds, makes what fails smaller, and shows it."""

from __future__ import annotations

import copy
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .cluster import Cluster
from .plans import Plan, draw
from .world import Broken

T = TypeVar("T")
# Lines of a trace that are shown, the last ones.
LINES = 400


@dataclass
class Outcome:
    """What a seed has come to."""

    seed: int
    profile: str
    broken: str = ""  # what did not hold
    counts: Counter[str] = field(default_factory=Counter)
    steps: int = 0


def run(seed: int, profile: str = "any", *, strict: bool = False) -> Outcome:
    """Play a seed."""
    plan = draw(seed, profile)
    cluster, broken = _play(plan, strict=strict)
    return Outcome(seed, plan.profile, broken, cluster.counts, cluster.steps)


def run_all(seeds: Iterable[int], profile: str = "any", processes: int = 1) -> Iterator[Outcome]:
    """Play seeds, in several processes perhaps."""
    if processes == 1:
        yield from (run(seed, profile) for seed in seeds)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(_run_one, ((seed, profile) for seed in seeds), chunksize=50)


def _run_one(args: tuple[int, str]) -> Outcome:
    return run(*args)


def _play(plan: Plan, *, trace: bool = False, strict: bool = False) -> tuple[Cluster, str]:
    cluster = Cluster(plan, trace=trace, strict=strict)
    try:
        cluster.play()
    except Broken as broken:
        return cluster, str(broken) or "broken"
    return cluster, ""


def kind(broken: str) -> str:
    """What did not hold, without names and numbers."""
    return re.sub(r"\[.*\]|\{.*\}|\(.*\)|h?[\d.]+", "#", broken)[:80]


# Smaller plans


def shrink(plan: Plan, tries: int = 400) -> Plan:
    """A plan that fails as well, with as little in it as can be found."""
    left = [tries]
    wanted = kind(_play(plan)[1])

    def fails(candidate: Plan) -> bool:
        left[0] -= 1
        return left[0] >= 0 and kind(_play(candidate)[1]) == wanted

    before = None
    while before != plan and left[0] > 0:
        before = copy.deepcopy(plan)
        for name in ("incidents", "rounds", "calls"):
            plan = _fewer(plan, name, fails)
        for simpler in _simpler(plan):
            if fails(simpler):
                plan = simpler
    return plan


def _fewer(plan: Plan, name: str, fails: Callable[[Plan], bool]) -> Plan:
    size = len(getattr(plan, name))
    while size:
        position = 0
        while position < len(getattr(plan, name)):
            items = getattr(plan, name)
            candidate = _with(plan, name, items[:position] + items[position + size :])
            if fails(candidate):
                plan = candidate
            else:
                position += size
        size //= 2
    return plan


def _with(plan: Any, name: str, value: Any) -> Any:
    changed = copy.deepcopy(plan)
    setattr(changed, name, value)
    return changed


def _simpler(plan: Plan) -> Iterator[Plan]:
    """One thing less at a time; each is to be tried upon what has come of those before, so they are made anew."""
    plain: dict[str, Any] = {"duplicates": 0.0, "wire": False, "close": None, "jobs_kept": 64}
    for name, value in plain.items():
        if getattr(plan, name) != value:
            yield _with(plan, name, value)
    for position, round_ in enumerate(plan.rounds):
        simple = {"raises": {}, "kills": {}, "hangs": {}, "fold_raises": False, "fold_kills": 0, "fold_hangs": False,
                  "cancel": None, "deadline": None, "params": 100}  # fmt: skip
        for name, value in simple.items():
            if getattr(round_, name) != value:
                changed = copy.deepcopy(plan)
                setattr(changed.rounds[position], name, value)
                yield changed
    yield from _simpler_calls(plan)
    for position, host in enumerate(plan.hosts):
        for name, value in {"bad_starts": 0.0, "stalls": 0.0, "slowness": 1.0, "jitter": 0.1, "workers": 1}.items():
            if getattr(host, name) != value:
                changed = copy.deepcopy(plan)
                setattr(changed.hosts[position], name, value)
                yield changed
    for position, job in enumerate(plan.jobs):
        changes: list[tuple[str, Any]] = [("nslices", n) for n in (1, 2, 3, job.nslices // 2) if 0 < n < job.nslices]
        changes += [("modules", 0), ("code", False), ("alike", False), ("kind", "float"), ("size", 100)]
        for name, value in changes:
            if getattr(job, name) != value:
                changed = copy.deepcopy(plan)
                setattr(changed.jobs[position], name, value)
                yield changed


def _simpler_calls(plan: Plan) -> Iterator[Plan]:
    for position, calls in enumerate(plan.calls):
        simple: dict[str, Any] = {
                  "raises": set(), "kills": {}, "hangs": set(), "stubborn": set(), "unfit": set(), "pauses": {},
                  "spoils": set(), "cancels": {}, "forget": None, "size": 20, "large": False, "submitter": 0,
                  "function": 0, "count": 1,
        }  # fmt: skip
        fewer = [("count", calls.count // 2), ("count", calls.count - 1)] if calls.count > 2 else []
        for name, value in [*simple.items(), *fewer]:
            if getattr(calls, name) != value:
                changed = copy.deepcopy(plan)
                setattr(changed.calls[position], name, value)
                yield changed


def show(seed: int, profile: str = "any", *, smaller: bool = True, lines: int = LINES) -> str:
    """What a seed does, as text: the plan, then line by line what happens, the failure at the end."""
    plan = draw(seed, profile)
    _, broken = _play(plan)
    if broken and smaller:
        plan = shrink(plan)
    cluster, why = _play(plan, trace=True, strict=bool(broken))
    assert cluster.trace is not None
    told = [f"seed {seed}, profile {plan.profile}: {broken or 'all is well'}", *_plan_lines(plan)]
    if len(cluster.trace) > lines:
        told.append(f"... {len(cluster.trace) - lines} lines before")
    told += [line for line in cluster.trace[-lines:] if not line.endswith((": PING", ": PONG"))]
    if broken:
        told.append(f"{cluster.now:10.4f}  BROKEN     {why or broken}")
    return "\n".join(told)


def _plan_lines(plan: Plan) -> list[str]:
    told = [f"speculation {plan.speculation}, {plan.restarts} restarts, duplicates {plan.duplicates}"]
    told += [f"  host {index}: {host}" for index, host in enumerate([*plan.hosts, *plan.joining])]
    used = {round_.job for round_ in plan.rounds}
    told += [f"  job {index}: {job}" for index, job in enumerate(plan.jobs) if index in used]
    told += [f"  {some}" for some in (*plan.rounds, *plan.calls)]
    return [*told, *(f"  {incident}" for incident in plan.incidents)]
