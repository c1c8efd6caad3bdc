"""What always holds: looked at after each event, and at rest."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from qjam.dispatch.commands import Failure
from qjam.dispatch.dispatcher import POISON, Dispatch
from qjam.dispatch.rounds import Round
from qjam.dispatch.states import COMING, DONE, PRESENT, QUEUED, SENT, NodeState
from qjam_worker.node.rounds import NodeRound, Work
from qjam_worker.values.reduction import Tree
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import CODE, MODULE, SLICE, of_slice

from . import call_checks
from .world import Broken, hold

if TYPE_CHECKING:
    from .cluster import Cluster, Run
    from .master import Master
    from .node import Node, Worker


# The master


def check_master(master: Master) -> None:
    """The books of dispatch agree with each other, and nobody waits for nobody."""
    dispatch = master.dispatch
    for round_ in dispatch.rounds.values():
        _check_round(dispatch, round_)
    hold(dispatch.nodes.keys() == master.members.keys(), "dispatch keeps the nodes", list(dispatch.nodes))
    _check_roster(dispatch)
    searches, timers = dispatch._stealer.searches, dispatch._stealer.timers
    hold(searches.keys() <= dispatch.nodes.keys(), "nodes that are not there look for work", searches)
    hold(
        all(timers.get(name) is not None for name in searches) and len(searches) == len(timers), "who looks, and when?"
    )
    hold(
        dispatch._stealer._queues.keys() <= dispatch.rounds.keys(), "somebody looks for slices of rounds that are over"
    )
    _check_laden(dispatch)
    hold(dispatch._liveness.at is not None or not dispatch.rounds, "nobody looks at silence")
    _check_line(dispatch)
    watch = master.cluster.watch
    watch.check_suspicions()
    kept = master.cluster.plan.jobs_kept + watch.rounds + 1
    hold(len(dispatch._jobs) <= kept, f"{len(dispatch._jobs)} jobs are kept")
    for node in dispatch.nodes.values():
        hold(node.credit >= 0, "credit is overdrawn", node)
        hold(len(node.jobs) + len(node.forget) <= 2 * kept, "jobs of a node are kept", node)
        if node.state is NodeState.LOST:
            hold(not node.jobs and not node.transfers, "something is kept for a lost node", node)
    if master.cluster.strict:
        watch.look_into_depth()


def _check_line(dispatch: Dispatch) -> None:
    """Who waits has nodes without room, or none at all yet; what nodes have is counted."""
    waiting = dispatch._line._waiting
    hold(waiting.keys().isdisjoint(dispatch.rounds), "rounds wait that have begun", list(waiting))
    begun = max(dispatch.rounds, default=0)
    hold(all(number > begun for number in waiting), f"round {begun} has overtaken", list(waiting))
    hold(not waiting or not dispatch._line._fits(next(iter(waiting.values())).data), "a round waits that could begin")
    at = Counter(name for round_ in dispatch.rounds.values() for name in round_.debts)
    for name, node in dispatch.nodes.items():
        if node.state in PRESENT:
            hold(node.rounds == at[name], f"{name} has {at[name]} rounds, it is known to have", node.rounds)


def _check_roster(dispatch: Dispatch) -> None:
    """What is kept of all nodes together is what a walk through them gives."""
    roster, nodes, rounds = dispatch._roster, dispatch.nodes.values(), dispatch.rounds.values()
    owed = Counter({node.name: sum(len(r.debts.get(node.name, ())) for r in rounds) for node in nodes})
    by_state = {state: {node.name for node in nodes if node.state is state} for state in NodeState}
    hold(roster.owed == +owed, "it is not known what nodes owe:", roster.owed, owed)
    hold(roster.ready.keys() == by_state[NodeState.READY], "it is not known who is ready", roster.ready)
    hold(roster.suspect.keys() == by_state[NodeState.SUSPECT], "it is not known who is suspect", roster.suspect)
    hold(roster.present.keys() == roster.ready.keys() | roster.suspect.keys(), "it is not known who is there")
    hold(roster._idle.keys() == roster.ready.keys() - roster.owed.keys(), "it is not known who is idle", roster._idle)
    hold(roster.somebody_comes == any(node.state in COMING for node in nodes), "it is not known whether somebody comes")
    hold(
        roster.capacity == sum(node.workers for node in roster.useful.values()),
        "it is not known how many workers there are",
    )
    laden = {node.name for node in nodes if owed[node.name] > node.workers}
    hold(roster.overloaded == laden, "it is not known who has much to do:", roster.overloaded, laden)
    for node in nodes:
        for job in node.jobs.values():
            hold(job.told <= dispatch.nodes.keys() and node.name in job.told, "jobs are told to", job.told)
    for data in dispatch._holdings._data.values():
        hold(data.told.keys() <= dispatch.nodes.keys(), "data is told to", data.told)


def _check_laden(dispatch: Dispatch) -> None:
    """Who could share something is ranked by at least as much."""
    for number, laden in dispatch._stealer._queues.items():
        for name in dispatch.rounds[number].debts:
            key, known = laden._key(name), laden._keys.get(name)
            hold(key is None or (known is not None and known <= key), f"{name} could share {key}, it is known {known}")
            hold(known is None or (known, name) in laden._heap, f"{name} is not among those that could share")


def _check_round(dispatch: Dispatch, round_: Round) -> None:
    number, states, owners = round_.number, round_.states, round_.owners
    queued = {index for index, state in enumerate(states) if state is QUEUED}
    hold(round_.queued == queued, f"it is not known what of round {number} waits: {round_.queued} {queued}")
    several = {index for index, its in enumerate(owners) if len(its) > 1}
    hold(round_.shared == several, f"it is not known what of round {number} is shared: {round_.shared} {owners}")
    debts = 0
    for name, indices in round_.debts.items():
        record = dispatch.nodes.get(name)
        if record is None or record.state not in PRESENT:
            raise Broken(f"round {number} is owed by {name}, which is gone")
        debts += len(indices)
        for index in indices:
            if states[index] is not SENT or name not in owners[index]:
                raise Broken(f"{name} owes slice {index} of round {number}, which is {states[index]}: {owners[index]}")
    if debts != sum(map(len, owners)) or states.count(SENT) != len(owners) - owners.count(()):
        raise Broken(f"the books of round {number} differ: {states} {owners} {round_.debts}")
    hold(states.count(DONE) == round_.tree.covered, f"slices of round {number} are done and not here")
    if QUEUED in round_.states:
        hold(not dispatch.capacity, f"slices of round {round_.number} wait, and there are ready nodes")
        hold(any(node.state in COMING for node in dispatch.nodes.values()),
             f"round {round_.number} waits for nodes that do not come")  # fmt: skip


def check_attempts(run: Run, round_: NodeRound, work: Work) -> None:
    """No two workers are told that they are the first ones at a slice."""
    firsts = {index for index in work.slices if round_.attempts.get(index, 1) == 1}
    twice = run.firsts & firsts
    hold(not twice, f"round {run.number}: other workers were the first at", twice)
    run.firsts |= firsts


def check_failure(cluster: Cluster, run: Run, failure: Failure) -> None:
    """A round fails for a reason that there is."""
    what = failure.what
    reasons: dict[str, Any] = {
        "task": failure.slice in run.raised,
        "lost": run.deaths[failure.slice] >= POISON,
        "timeout": _is_time(cluster, run),
        "cancelled": run.cancelled,
        "closed": cluster.master.leaving,
        "room": cluster.no_room,
        "load": run.job.unloadable or run.job.changing,
        "unreachable": not any(n.state in PRESENT | COMING for n in cluster.master.dispatch.nodes.values()),
    }
    hold(reasons.get(what), f"round {run.number} has failed for no reason:", failure)


def _is_time(cluster: Cluster, run: Run) -> bool:
    """Whether a round has its deadline now, or had it while the master was away."""
    if run.plan.deadline is None:
        return False
    due = run.began + run.plan.deadline
    return due <= cluster.now and (cluster.now < due + 1e-6 or cluster.master.thawed_at >= due)


def check_once_on_each_worker(cluster: Cluster, run: Run) -> None:
    """Without data, and when nothing goes wrong, mapfunc runs once on each worker."""
    if run.job.data is not None or run.disturbed:
        return
    cluster.counts["once on each worker"] += 1
    records = cluster.master.dispatch.nodes.values()
    ready = [node for node in records if node.state is NodeState.READY]
    workers = {(node.name, worker) for node in ready for worker in range(node.workers)}
    found = Counter((name, worker) for name, worker, _ in run.by)
    hold(found == dict.fromkeys(workers, 1), f"round {run.number} ran on {found}, not once on each worker")


def check_one_at_a_time(cluster: Cluster, run: Run, index: int, begins: Worker) -> None:
    """Where nothing may be tried twice at a time nobody begins a slice that somebody else is at."""
    others = [w for w in run.at.get(index, ()) if w is not begins and w.is_at(run.number, index)]
    run.at[index] = [*others, begins]
    nodes = cluster.master.dispatch.nodes
    if run.number not in cluster.master.dispatch.rounds or begins.node.name not in nodes:
        return  # it is over, or the host is removed, which it has not heard
    for worker in others:
        record = nodes.get(worker.node.name)
        known = record is not None and record.state in PRESENT
        if known and worker.node.alive and not worker.node.doomed and worker.kill_at is None:
            raise Broken(f"slice {index} of round {run.number} begins, and {worker} of {worker.node.name} is at it")


# Nodes


def check_node(node: Node) -> None:
    """The books of a node agree with each other, no slice is forgotten, and nobody is idle who could work."""
    scheduler = node.scheduler
    idle = []
    for seat, worker in zip(scheduler.seats, node.workers):
        if seat.busy != bool(worker.seq) or seat.ready != worker.up:
            raise Broken(f"{node.name} takes {worker} for {seat}")
        if worker.up and not worker.seq:
            idle.append(seat.index)
        round_ = scheduler.rounds.get(seat.round) if seat.busy and seat.round is not None else None
        if seat.calls != (worker.taking is not None):
            raise Broken(f"{node.name} takes {worker} for {seat}, which takes calls or does not")
        if (
            worker.seq
            and worker.kill_at is None
            and not seat.calls
            and (round_ is None or seat.index not in round_.works)
        ):
            raise Broken(f"{worker} of {node.name} is at what nobody wants, and is not told to stop")
    call_checks.check_node(node, idle)
    hold(node.params.keys() == scheduler.rounds.keys(), f"params of {node.name} are kept:", list(node.params))
    paths = set()
    wanted = set()
    for round_ in scheduler.rounds.values():
        _check_node_round(node, round_, idle)
        paths.update(held.path for held in round_.held)
        wanted |= round_.pinned
    paths.discard(None)
    if paths != node.files.data.keys():
        raise Broken(f"{node.name} keeps {list(node.files.data)} and needs {paths}")
    for ref in scheduler.wants:
        if ref not in wanted and ref.kind != MODULE:
            raise Broken(f"{node.name} waits for {ref}, which no round wants")
    hold(node.refs.pins.keys() == wanted, f"{node.name} has pinned", node.refs.pins)


def check_roots(node: Node, header: dict[str, Any]) -> None:
    """Whoever holds a complete subtree reduces it, unless the job collects; only roots travel."""
    run = node.cluster.runs[header["round"]]
    tree = Tree(run.nslices, folds=run.job.kind != "list")
    for lo, hi, _ in header["roots"]:
        hold(tree.add((lo, hi), None), f"{node.name} sends some slices of round {header['round']} twice")
    hold(not tree.pairs(), f"{node.name} sends what it could fold of round {header['round']}: {header['roots']}")


def _check_node_round(node: Node, round_: NodeRound, idle: list[int]) -> None:
    scheduler, number = node.scheduler, round_.number
    known = {*round_.ready, *round_.offered}
    known.update(*round_.waiting.values())
    if not known <= round_.owed:
        raise Broken(f"{node.name} is going to map slices of round {number} that it does not owe: {round_}")
    for worker, work in round_.works.items():
        seat = scheduler.seats[worker]
        if not seat.busy or seat.round != number:
            raise Broken(f"nobody is at {work} of round {number} on {node.name}: {seat}")
        known.update(work.slices)
    if not round_.owed <= known:
        raise Broken(f"{node.name} has forgotten the slices {round_.owed - known} of round {number}: {round_}")
    for ref in round_.missing:
        if ref not in scheduler.wants:
            raise Broken(f"{node.name} waits for {ref} and has not asked for it")
    given = any(m.kind is Kind.TASK for m in node.link.down.under_way)  # what is whose may be about to change
    if idle and not round_.lacking and (round_.has_data or not given):
        own = set(round_.data.order[idle[0] :: round_.workers])
        if round_.offered or (round_.ready and (round_.has_data or not own.isdisjoint(round_.ready))):
            raise Broken(f"worker {idle[0]} of {node.name} is idle, and there is work: {round_}")
        if not round_.owed and round_.tree.pairs() and not round_.folds.unfoldable:
            raise Broken(f"worker {idle[0]} of {node.name} is idle, and there is something to fold: {round_}")
    if round_.settled and round_.tree.values:
        raise Broken(f"{node.name} keeps the roots of round {number} to itself")


# At rest


def check_rest(cluster: Cluster) -> None:
    """Nothing is left of what has been."""
    master, dispatch = cluster.master, cluster.master.dispatch
    call_checks.check_rest(cluster)
    for run in cluster.runs.values():
        hold(run.end is not None, f"round {run.number} has not ended")
    hold(not dispatch.rounds, "rounds are left:", list(dispatch.rounds))
    hold(not len(dispatch._line), "rounds have not begun:", dispatch._line._waiting)
    hold(dispatch.next_deadline() is None, "dispatch goes on looking for work:", dispatch._stealer.searches)
    for name, record in dispatch.nodes.items():
        hold(not record.transfers, f"{name} still waits for", record.transfers)
        hold(not master.blobs[name], f"contents are kept for {name}:", master.blobs[name])
    for name, node in cluster.nodes.items():
        if node.alive and not node.leaving:
            state = dispatch.nodes[name].state if name in dispatch.nodes else None
            hold(state is NodeState.READY, f"{name} is alive and well, and for the master it is", state)
            _check_node_at_rest(node)
            _check_data(cluster, node)
    if not master.leaving:
        lost = [key for key in cluster.leases if key not in dispatch._holdings._data]
        hold(not lost, "the user holds what the master has forgotten:", lost)
    left = {name for name, node in cluster.nodes.items() if not node.alive or node.leaving}
    ready = {name for name, record in dispatch.nodes.items() if record.state in PRESENT}
    hold(not ready & left, "the master relies on nodes that are gone:", ready & left)


def _check_data(cluster: Cluster, node: Node) -> None:
    """A node has what the user holds, and nothing else."""
    dispatch, scheduler, record = cluster.master.dispatch, node.scheduler, cluster.master.dispatch.nodes[node.name]
    held = [data for data in dispatch._holdings._data.values() if node.name in data.told]
    hold(all(data.leases for data in held), "nobody holds", held)
    numbers = {data.number for data in held}
    known = scheduler.data.keys()
    hold(known == numbers, f"{node.name} keeps the data {known}; held are", numbers)
    jobs = record.jobs.keys() | set(record.forget)
    hold(scheduler.jobs.keys() <= jobs, f"{node.name} keeps the jobs {list(scheduler.jobs)} and is to know", jobs)
    refs = {of_slice(ref) for data in held for ref in data.refs}
    codes = {job.code for job in scheduler.jobs.values()}
    for ref in node.refs.entries:
        if ref.kind in (SLICE, CODE):
            hold(ref in refs or ref in codes, f"{node.name} keeps what nobody holds:", ref)


def _check_node_at_rest(node: Node) -> None:
    scheduler = node.scheduler
    hold(not scheduler.rounds, f"{node.name} was not told of the end of", scheduler.rounds)
    hold(not any(seat.busy or not seat.ready for seat in scheduler.seats), f"{node.name} has", scheduler.seats)
    hold(not scheduler.wants, f"{node.name} still waits for", scheduler.wants)
    hold(not scheduler._params and not node.params, f"{node.name} keeps params")
    parts = [ref for ref in node.refs.entries if ref.kind == SLICE and ref not in node.refs]
    hold(not parts, f"{node.name} keeps what other data might be put to:", parts)
    hold(
        not node.refs.pins and not node.files.data,
        f"{node.name} keeps",
        node.refs.pins,
        list(node.files.data),
    )
    hold(scheduler.next_deadline() is None, f"{node.name} goes on looking for late attempts")
