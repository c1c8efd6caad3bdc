"""Which node gets which slices of a round, and the messages that give them to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

from qjam_worker.wire.frames import Kind

from .commands import Send
from .holdings import Data
from .nodes import NodeRecord, Roster
from .rounds import Job, Round, Share, share


def shares(round_: Round, roster: Roster) -> dict[str, Share]:
    """The queued slices of each node. A node keeps the slices whose data it has, unless nodes have joined. The plan is
    made once and serves all rounds until the nodes change.
    """
    job, queued = round_.job, round_.queued
    if len(queued) < job.nslices:
        return _places(job, sorted(queued), roster)
    if job.planned_for != roster.version:
        if job.refs is not None and job.placed_for != roster.membership:
            members = {node.name: node.workers for node in roster.present.values()}
            job.homes, job.placed_for = place(job.nslices, job.homes, members), roster.membership
        job.plan, job.planned_for = _places(job, range(job.nslices), roster), roster.version
    return job.plan


def _places(job: Job, indices: Sequence[int], roster: Roster) -> dict[str, Share]:
    """Others do the slices of a suspect node for now, those of a lost node for good."""
    found: dict[str, list[int]] = {}
    homeless, useful = [], roster.useful
    homes = {} if job.refs is None else job.homes  # without data every worker is as good
    for index in indices:
        home = homes.get(index, "")
        if home in useful:
            found.setdefault(home, []).append(index)
        else:
            homeless.append(index)
    for name, more in spread(homeless, roster.turns(len(homeless))).items():
        found[name] = sorted([*found.get(name, ()), *more])
        homes.update({index: name for index in more if homes.get(index) not in roster.present})
    return {name: share(its) for name, its in found.items()}


def announce(node: NodeRecord, job: Job, its: Share) -> list[Send]:
    """The JOB that tells a node of those of its slices that are new to it."""
    known = job.announced.get(node.name, frozenset())
    if known >= its.slices:
        return []
    job.announced[node.name] = known | its.slices if known else its.slices
    node.jobs[job.number] = job
    forget, node.forget = node.forget, []
    indices = [index for index in its.indices if index not in known]
    header = {
        "job": job.number,
        "entry": job.entry,
        "slices": [[index, job.refs[index] if job.refs else None] for index in indices],
        "nslices": job.nslices,
        "reduce": job.entry["reduce"],
        "forget": forget,
        **({} if job.file is None else {"file": job.file.announcement(indices)}),
    }
    if job.data is not None:
        header["data"] = job.data.number
        job.data.at.add(node.name)
    return [Send(node.name, Kind.JOB, header)]


def task(name: str, round_: Round, indices: list[int], known: bool) -> Send:
    """The TASK for these slices. `known`: the node has the params; else its link sends them, or names them as a ref."""
    params = "have" if known else "send"
    header = {"job": round_.job.number, "round": round_.number, "indices": indices, "params": params}
    if round_.again:
        header["attempts"] = [1 + round_.again[index] for index in indices]
    return Send(name, Kind.TASK, header)


def forget(jobs: Iterable[Job], roster: Roster) -> None:
    """Tell the nodes to forget these jobs, with the next JOB."""
    for job in jobs:
        for name in job.announced:
            del roster.nodes[name].jobs[job.number]
            roster.nodes[name].forget.append(job.number)


def release(data: Data, roster: Roster) -> list[Send]:
    """Tell the nodes that know of this data that it goes, and which jobs are forgotten."""
    commands = []
    for name in sorted(data.at & roster.present.keys()):
        node = roster.nodes[name]
        commands.append(Send(name, Kind.RELEASE, {"data": [data.number], "forget": node.forget}))
        node.forget = []
    return commands


def place(nslices: int, homes: Mapping[int, str], workers: Mapping[str, int]) -> dict[int, str]:
    """A node for each slice. `homes`: the node where it was; `workers`: the number of workers of each node now.

    A slice stays where it is, unless its node is gone or has more than its share: its last ones move to nodes that have
    less.
    """
    bounds = [0, *accumulate(workers.values())]
    cuts = [-(-bound * nslices // bounds[-1]) for bound in bounds]
    room = {name: high - low for name, (low, high) in zip(workers, pairwise(cuts), strict=True)}
    placed: dict[int, str] = {}
    for index in range(nslices):
        home = homes.get(index)
        if home is not None and room.get(home, 0) > 0:
            placed[index] = home
            room[home] -= 1
    free = iter([name for name, left in room.items() for _ in range(left)])
    for index in range(nslices):
        if index not in placed:
            placed[index] = next(free)
    return placed


def spread(indices: list[int], workers: Mapping[str, int]) -> dict[str, list[int]]:
    """Spread slices without a home over the nodes in proportion to their workers; neighbours stay together."""
    seats = [name for name, count in workers.items() for _ in range(count)]
    shares: dict[str, list[int]] = {}
    for position, index in enumerate(indices):
        shares.setdefault(seats[len(seats) * position // len(indices)], []).append(index)
    return shares
