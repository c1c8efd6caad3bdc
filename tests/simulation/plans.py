"""What a seed stands for: the hosts, the jobs, the rounds, and all that goes wrong, drawn before anything runs. So a
plan can be made smaller piece by piece, and what is left of it still does the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from .usercode import KINDS

MIB = 1024 * 1024
EVER = 1 << 30

# What can go wrong, as `Incident.kind`.
INCIDENTS = (
    "worker crashes",
    "worker hangs",
    "worker is slow",
    "worker is interrupted",
    "node crashes",
    "node freezes",
    "link is down",
    "link breaks",
    "host joins",
    "host is removed",
    "no room",
    "master is away",
)


@dataclass
class HostPlan:
    """One host."""

    workers: int
    latency: float = 0.001  # seconds one way
    jitter: float = 1.0
    slowness: float = 1.0
    start: float = 0.3  # seconds until its node reports
    bad_starts: float = 0.0  # how likely a start fails
    stalls: float = 0.0  # how likely a start that does not fail never comes to an end
    shelf: int = 1024 * MIB  # bytes of refs that are kept
    room: int = 4096 * MIB  # bytes of refs that can be


@dataclass
class JobPlan:
    """Code and data."""

    kind: str
    nslices: int
    data: int | None = 0  # which data set; None: none
    alike: bool = False  # many slices have the same content
    code: bool = False
    modules: int = 0
    seconds: float = 0.05  # for a slice
    size: int = 1000  # bytes of a slice, about
    unloadable: bool = False
    held: bool = True  # whether the user holds the data, or makes it anew for each round
    changing: bool = False  # whether its slices are other ones when they are sent than when they were hashed


@dataclass
class RoundPlan:
    """One call of `run`. The dicts tell by slice from which attempt on, and up to which one, something happens."""

    at: float
    job: int
    params: int = 100  # bytes; many of them are pulled as a ref
    deadline: float | None = None
    cancel: float | None = None
    raises: dict[int, tuple[int, int]] = field(default_factory=dict)
    kills: dict[int, tuple[int, int]] = field(default_factory=dict)
    hangs: dict[int, tuple[int, int]] = field(default_factory=dict)
    fold_raises: bool = False
    fold_kills: int = 0  # so many attempts at folding
    fold_hangs: bool = False  # the first attempt
    let_go: float | None = None  # the user holds the data until so long after this began; None: for ever
    at_once: bool = False  # whether nodes shall not keep what the user lets go of


@dataclass
class CallsPlan:
    """Some calls of one function, submitted at once. The dicts and sets tell by position what goes wrong."""

    at: float
    count: int
    submitter: int = 0
    function: int = 0
    seconds: float = 0.01  # for a call
    size: int = 20  # bytes of its arguments, about
    large: bool = False  # whether results lie in files
    raises: set[int] = field(default_factory=set)
    kills: dict[int, tuple[int, str]] = field(default_factory=dict)  # so many attempts, and when in them (DEATHS)
    hangs: set[int] = field(default_factory=set)  # the first attempt
    stubborn: set[int] = field(default_factory=set)  # these do not end when they are to stop
    unfit: set[int] = field(default_factory=set)  # the first process is not fit for it
    pauses: dict[int, float] = field(default_factory=dict)  # between taking it and saying so, in seconds
    spoils: set[int] = field(default_factory=set)  # the first attempt writes over what its worker has returned
    cancels: dict[int, float] = field(default_factory=dict)  # the user cancels it so long after
    forget: float | None = None  # so long after, nobody needs the function any more; None: for ever


# When a call ends its worker: before the worker has said that it has it, in user code, before or after what it has come
# to is written.
DEATHS = ("taken", "runs", "ran", "wrote")


@dataclass
class Incident:
    """Something that goes wrong with a host, one of its workers, or the master."""

    at: float
    kind: str
    host: int = 0
    worker: int = 0
    seconds: float = 1.0
    flag: bool = False


@dataclass
class Plan:
    """All of it."""

    seed: int
    profile: str
    speculation: bool = True
    restarts: int = 3
    duplicates: float = 0.0
    wire: bool = False  # whether headers go through wire.pack and wire.unpack
    jobs_kept: int = 64
    window: int = 64  # rounds at a node
    close: float | None = None
    hosts: list[HostPlan] = field(default_factory=list)
    joining: list[HostPlan] = field(default_factory=list)
    jobs: list[JobPlan] = field(default_factory=list)
    rounds: list[RoundPlan] = field(default_factory=list)
    calls: list[CallsPlan] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)

    @property
    def ends(self) -> float:
        """When the last thing that is planned is over."""
        times = [1.0, *(r.at + max(r.deadline or 0.0, r.cancel or 0.0) for r in self.rounds)]
        times += [calls.at + max([calls.forget or 0.0, *calls.cancels.values()]) for calls in self.calls]
        times += [incident.at + incident.seconds for incident in self.incidents]
        return max([*times, self.close or 0.0])


# How often what happens (incidents of a kind a run, at most), by profile; `mixed` takes a few kinds at random.
PROFILES: dict[str, dict[str, int]] = {
    "calm": {},
    "mixed": {},
    "workers": {"worker crashes": 8, "worker hangs": 2, "worker is slow": 3, "worker is interrupted": 3},
    "late": {"worker hangs": 3, "worker is slow": 6, "node freezes": 1},
    "silence": {"node freezes": 3, "link is down": 4, "master is away": 2, "worker crashes": 1},
    "churn": {"node crashes": 4, "link breaks": 3, "host joins": 2, "host is removed": 2, "worker crashes": 2},
    "errors": {"worker crashes": 3, "no room": 2, "node crashes": 1},
    "refs": {"no room": 1, "node crashes": 2, "worker crashes": 1, "link breaks": 1},
}
DRAWN = [name for name in PROFILES for _ in range(3 if name == "mixed" else 1)]


def draw(seed: int, profile: str = "any") -> Plan:
    """The plan of a seed."""
    rng = random.Random(f"qjam {seed}")
    drawn = rng.choice(DRAWN)
    name = drawn if profile == "any" else profile
    plan = Plan(seed, name)
    calm = name == "calm"
    plan.speculation = rng.random() < 0.65
    plan.wire = rng.random() < 0.1
    plan.restarts = rng.choice([0, 1, 2, 5, 10])
    plan.duplicates = 0.0 if calm or rng.random() < 0.5 else rng.choice([0.05, 0.5])
    plan.jobs_kept = rng.choice([1, 2, 64, 64])
    plan.hosts = [_host(rng, calm) for _ in range(rng.choice([1, 2, 2, 3, 3, 4]))]
    horizon = rng.choice([0.5, 2.0, 6.0, 15.0])
    plan.jobs = [_job(rng, name) for _ in range(rng.randint(1, 6 if name == "refs" else 3))]
    plan.rounds = [_round(rng, plan, name, horizon) for _ in range(rng.choice([1, 2, 3, 4, 6, 9]))]
    plan.rounds.sort(key=lambda r: r.at)
    counts = dict(PROFILES[name])
    if name == "mixed":
        counts = {kind: 3 for kind in INCIDENTS if rng.random() < 0.3}
    for kind, most in counts.items():
        for _ in range(rng.randint(1, most)):
            plan.incidents.append(_incident(rng, plan, kind, horizon))
    plan.incidents.sort(key=lambda incident: incident.at)
    if not calm and rng.random() < (0.2 if name == "churn" else 0.05):
        plan.close = 1.0 + rng.random() * horizon
    _draw_data(random.Random(f"qjam data {seed}"), plan)
    plan.window = random.Random(f"qjam window {seed}").choice([1, 2, 3, 64])
    calls = random.Random(f"qjam calls {seed}")
    plan.calls = [_calls(calls, name, horizon) for _ in range(calls.choice([0, 0, 0, 1, 1, 2, 3]))]
    plan.calls.sort(key=lambda some: some.at)
    return plan


def _draw_data(rng: random.Random, plan: Plan) -> None:
    """What becomes of the data, drawn apart: so the seeds that have failed before stay what they are."""
    for round_ in plan.rounds:
        if rng.random() < 0.4:
            round_.let_go = rng.choice([0.0, 0.02, 0.3, 2.0]) * rng.random()
            round_.at_once = rng.random() < 0.5
    for job in plan.jobs:
        job.held = rng.random() < 0.7
        job.changing = plan.profile in ("errors", "refs", "mixed") and job.data is not None and rng.random() < 0.08


def _host(rng: random.Random, calm: bool) -> HostPlan:
    host = HostPlan(rng.choice([1, 1, 2, 2, 3, 4]))
    host.latency = rng.choice([0.0001, 0.001, 0.005, 0.03])
    host.jitter = rng.choice([0.1, 1.0, 10.0])
    host.slowness = rng.choice([1.0, 1.0, 1.0, 3.0, 10.0])
    host.start = rng.choice([0.05, 0.3, 1.5])
    if not calm:
        host.bad_starts = rng.choice([0.0, 0.0, 0.1, 0.4])
        host.stalls = rng.choice([0.0, 0.0, 0.1])
        host.shelf = rng.choice([1024 * MIB, 1024 * MIB, 40 * MIB, 4000])
        host.room = rng.choice([4096 * MIB, 4096 * MIB, 200 * MIB])
    return host


def _job(rng: random.Random, profile: str) -> JobPlan:
    job = JobPlan(rng.choice(KINDS), rng.choice([1, 2, 3, 5, 8, 8, 13, 16, 24, 40]))
    job.data = rng.choice([None, 0, 1, 2, 3])
    job.alike = rng.random() < 0.15
    job.code = rng.random() < 0.3
    job.modules = rng.choice([0, 0, 1, 3])
    job.seconds = rng.choice([0.001, 0.01, 0.05, 0.05, 0.3])
    sizes = [100, 1000, 1000, 100_000, MIB]
    job.size = rng.choice([*sizes, 6 * MIB, 30 * MIB] if profile == "refs" else sizes)
    job.unloadable = profile in ("errors", "refs") and job.data is not None and rng.random() < 0.08
    return job


def _round(rng: random.Random, plan: Plan, profile: str, horizon: float) -> RoundPlan:
    at = 0.0 if rng.random() < 0.2 else rng.random() * horizon
    round_ = RoundPlan(at, rng.randrange(len(plan.jobs)))
    nslices = plan.jobs[round_.job].nslices
    round_.params = rng.choice([100, 100, 100, 1000, 5 * MIB])
    if profile == "calm":
        return round_
    often = {"errors": 5.0, "refs": 2.0, "mixed": 2.0, "late": 2.0}.get(profile, 0.5)
    if rng.random() < 0.06 * often:
        round_.cancel = rng.choice([0.0, 0.01, 0.3, 3.0]) * rng.random()
    if rng.random() < 0.06 * often:
        round_.deadline = rng.choice([0.0, 0.05, 1.0, 10.0]) * rng.random()
    attempts = [(0, EVER), (0, EVER), (0, 1), (1, 2)]
    if rng.random() < 0.05 * often:
        round_.raises = {rng.randrange(nslices): rng.choice(attempts) for _ in range(rng.randint(1, 2))}
    if rng.random() < 0.05 * often:
        round_.kills = {rng.randrange(nslices): rng.choice(attempts) for _ in range(rng.randint(1, 2))}
    if rng.random() < (0.4 if profile == "late" else 0.03 * often):
        round_.hangs = {rng.randrange(nslices): rng.choice(attempts[1:]) for _ in range(rng.randint(1, 2))}
        if rng.random() < 0.3:
            round_.deadline = 20.0 * rng.random()
    if rng.random() < 0.02 * often:
        round_.fold_raises = True
    if rng.random() < 0.02 * often:
        round_.fold_kills = rng.choice([1, 2, 9])
    round_.fold_hangs = rng.random() < 0.02 * often
    return round_


def _calls(rng: random.Random, profile: str, horizon: float) -> CallsPlan:
    """Drawn apart too."""
    calls = CallsPlan(0.0 if rng.random() < 0.2 else rng.random() * horizon, rng.choice([1, 2, 3, 5, 8, 12, 20, 40]))
    calls.submitter, calls.function = rng.choice([0, 0, 1, 2]), rng.choice([0, 0, 1])
    calls.seconds = rng.choice([1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.3])
    calls.size, calls.large = rng.choice([20, 20, 200, 2000]), rng.random() < 0.2
    if rng.random() < 0.3:
        calls.forget = rng.choice([0.0, 0.01, 0.3, 3.0]) * rng.random()
    if profile == "calm":
        return calls

    def some(often: float) -> set[int]:
        return {rng.randrange(calls.count) for _ in range(rng.randint(1, 3))} if rng.random() < often else set()

    often = 0.15 if profile in ("errors", "mixed", "workers") else 0.05
    calls.raises = some(often)
    calls.kills = {at: (rng.choice([1, 1, 2, 3, 9]), rng.choice(DEATHS)) for at in some(2 * often)}
    calls.hangs, calls.unfit, calls.spoils = some(often / 2), some(often), some(often / 3)
    calls.pauses = {at: rng.choice([0.001, 0.05, 0.3, 3.0]) for at in some(often)}
    calls.cancels = {at: rng.choice([0.0, 0.001, 0.02, 0.3, 5.0]) * rng.random() for at in some(2 * often)}
    if calls.cancels and rng.random() < 0.4:
        calls.cancels = dict.fromkeys(range(calls.count), max(calls.cancels.values()))
    calls.stubborn = some(often) | (calls.hangs if rng.random() < 0.3 else set())
    return calls


def _incident(rng: random.Random, plan: Plan, kind: str, horizon: float) -> Incident:
    at = 0.2 + rng.random() * horizon * 1.2
    incident = Incident(at, kind, rng.randrange(len(plan.hosts)), rng.randrange(4), flag=rng.random() < 0.5)
    if kind == "node freezes":
        incident.seconds = rng.choice([0.5, 3.0, 8.0, 25.0, 60.0, 60.0, 700.0 if rng.random() < 0.1 else 60.0])
    elif kind == "link is down":
        incident.seconds = rng.choice([0.1, 2.0, 7.0, 12.0])
    elif kind == "worker is slow":
        incident.seconds = rng.choice([0.5, 2.0, 5.0, 50.0, 200.0])
    elif kind == "worker hangs":
        incident.seconds = rng.choice([20.0, 100.0])
    elif kind == "master is away":
        incident.seconds = rng.choice([0.3, 1.5, 7.0, 40.0])
    elif kind == "host joins":
        incident.host = len(plan.hosts) + len(plan.joining)
        plan.joining.append(_host(rng, calm=False))
    return incident
