"""Which node gets which slices of a round, and the messages that give them to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

from qjam_worker.wire.frames import Kind

from .commands import Send
from .data import Data, Share, share
from .jobs import Job
from .nodes import NodeRecord, Roster
from .rounds import Round


def shares(round_: Round, roster: Roster) -> dict[str, Share]:
    """The queued slices of each node."""
    data, queued = round_.data, round_.queued
    return plan(data, roster) if len(queued) == data.nslices else _places(data, sorted(queued), roster)


def plan(data: Data, roster: Roster) -> dict[str, Share]:
    """The slices that each node gets of a new round: those whose data it has, unless nodes have joined. It is made once
    and serves all rounds until the nodes change.
    """
    if data.planned_for != roster.version:
        if data.refs and data.placed_for != roster.membership:
            members = {node.name: node.workers for node in roster.present.values()}
            data.homes, data.placed_for = place(data.nslices, data.homes, members), roster.membership
        data.plan, data.planned_for = _places(data, range(data.nslices), roster), roster.version
    return data.plan


def _places(data: Data, indices: Sequence[int], roster: Roster) -> dict[str, Share]:
    """Others do the slices of a suspect node for now, those of a lost node for good."""
    found: dict[str, list[int]] = {}
    homeless, useful = [], roster.useful
    homes = {} if not data.refs else data.homes  # without data every worker is as good
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


def announce_job(node: NodeRecord, job: Job) -> list[Send]:
    """The JOB, if the node does not know it."""
    if job.number in node.jobs:
        return []
    node.jobs[job.number] = job
    job.told.add(node.name)
    header = {"job": job.number, "entry": job.entry, "forget": _to_forget(node)}
    return [Send(node.name, Kind.JOB, header)]


def announce_data(node: NodeRecord, data: Data, its: Share) -> list[Send]:
    """The DATA that tells a node of those of its slices that are new to it."""
    known = data.told.get(node.name, frozenset())
    if not data.refs or known >= its.slices:
        return []
    data.told[node.name] = known | its.slices if known else its.slices
    indices = [index for index in its.indices if index not in known]
    header = {
        "data": data.number,
        "nslices": data.nslices,
        "slices": [[index, data.refs[index]] for index in indices],
        "forget": _to_forget(node),
        **({} if data.file is None else {"file": data.file.announcement(indices)}),
    }
    return [Send(node.name, Kind.DATA, header)]


def _to_forget(node: NodeRecord) -> list[int]:
    """The jobs that a message tells the node to forget."""
    forget, node.forget = node.forget, []
    return forget


def task(name: str, round_: Round, indices: list[int], known: bool) -> Send:
    """The TASK for these slices. `known`: the node has the params; else its link sends them, or names them as a ref."""
    data = round_.data
    header = {
        "job": round_.job.number,
        "data": data.number if data.refs else None,
        "round": round_.number,
        "indices": indices,
        "params": "have" if known else "send",
    }
    if not data.refs:
        header["nslices"] = data.nslices
    if round_.again:
        header["attempts"] = [1 + round_.again[index] for index in indices]
    return Send(name, Kind.TASK, header)


def forget(jobs: Iterable[Job], roster: Roster) -> None:
    """Tell the nodes to forget these jobs, with the next JOB or DATA."""
    for job in jobs:
        for name in job.told:
            del roster.nodes[name].jobs[job.number]
            roster.nodes[name].forget.append(job.number)


def release(data: Data, roster: Roster) -> list[Send]:
    """Tell the nodes that know of this data that it goes, and which jobs are forgotten."""
    commands = []
    for name in sorted(data.told.keys() & roster.present.keys()):
        node = roster.nodes[name]
        commands.append(Send(name, Kind.RELEASE, {"data": [data.number], "forget": _to_forget(node)}))
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
