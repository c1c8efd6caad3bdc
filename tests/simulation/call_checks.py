"""What always holds for calls."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from qjam.dispatch.calls import POISON, AtNode
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.states import PRESENT, NodeState
from qjam_worker.node.calls import LOOK
from qjam_worker.node.pool import GRACE
from qjam_worker.wire.frames import Kind
from qjam_worker.worker.calls import FLUSH

from .calls import at_node
from .world import hold

if TYPE_CHECKING:
    from .cluster import Cluster
    from .master import Master
    from .node import Node

SLACK = 0.005  # seconds
# How much may be at one node. (In reality 8192 and 16 MiB.)
MAX_WINDOW, MAX_BYTES = 24, 4000


# The master


def check_master(master: Master) -> None:
    """The books of the master agree with each other, and nobody waits beside an idle node."""
    dispatch = master.dispatch
    calls = dispatch.calls
    if not calls.calls and not calls._queued and not calls.at:
        return
    queued = [call for queue in calls._queues.values() for call in queue]
    hold(len(queued) == calls._queued, f"{len(queued)} calls are queued and {calls._queued} are counted")
    hold(all(calls._queues.values()), "there are empty queues")
    hold(len({call.id for call in queued}) == len(queued), "a call is queued twice")
    hold(master.leaving or calls.at.keys() <= {name for name, node in dispatch.nodes.items() if node.state in PRESENT},
         "calls are kept for", list(calls.at))  # fmt: skip
    hold(not calls._unneeded, "functions are kept that nobody needs:", calls._unneeded)
    waiting = [call for call in queued if not call.over]
    ids = {call.id for call in waiting}
    for name, at in calls.at.items():
        _check_at_node(dispatch, name, at)
        ids |= at.calls.keys()
        much = at.nbytes > MAX_BYTES
        if waiting and name in dispatch._roster.useful and len(at.calls) < dispatch.nodes[name].up and not much:
            hold(all(name in call.nodes for call in waiting), f"calls are queued, and {name} has {len(at.calls)}")
    hold(all(call.deaths < POISON for call in calls.calls.values()), "a call goes on ending workers")
    hold(ids >= calls.calls.keys(), "calls are forgotten:", calls.calls.keys() - ids)
    hold(not waiting or dispatch._roster.useful or dispatch._roster.somebody_comes, "calls wait for nobody")
    hold(dispatch._liveness.at is not None or not calls.calls, "nobody looks at silence, and there are calls")


def _check_at_node(dispatch: Dispatch, name: str, at: AtNode) -> None:
    workers = dispatch.nodes[name].workers
    hold(at.nbytes == sum(len(call.data) for call in at.calls.values()), f"it is not known what {name} has: {at}")
    hold(2 * workers <= at.window <= max(MAX_WINDOW, 2 * workers), f"the window of {name} is {at.window}")
    hold(len(at.calls) <= max(MAX_WINDOW, 2 * workers), f"{name} has {len(at.calls)} calls")
    largest = max((len(call.data) for call in at.calls.values()), default=0)
    hold(at.nbytes <= MAX_BYTES + largest, f"{name} has {at.nbytes} bytes of arguments")
    for call in at.calls.values():
        hold(name in call.nodes, f"{name} has {call}")
        hold(name in call.function.at, f"{name} has {call}, and is not to know its function")


# A node


def check_node(node: Node, idle: list[int]) -> None:
    """The books of a node agree with each other and with what the workers have; nobody is idle beside the queue."""
    calls, desk, now = node.calls, node.calls.desk, node.world.now
    if desk is None:
        return
    taking = {worker.index: worker.taking for worker in node.workers if worker.taking is not None}
    hold(
        desk._running - desk._spoilt == taking.keys() - desk._spoilt,
        f"{node.name} has workers take calls:",
        desk._running,
        list(taking),
    )
    well = node.thawed_at
    if calls.idle_since is not None:
        took = now - max(calls.idle_since, well)
        hold(took < LOOK + SLACK, f"workers {idle} of {node.name} were idle for {took} s, and there are calls: {desk}")
    if not (idle and desk.waiting):
        calls.idle_since = None
    elif calls.idle_since is None:  # a worker may have taken one, and not said so yet
        calls.idle_since = now
    for worker in taking:
        ring = calls.rings[worker]
        if ring.records and not ring.spoilt:
            hold(now - max(ring.since, well) < LOOK + FLUSH + SLACK, f"{node.name} does not read what has returned")
    calls.adrift = {call: since for call, since in calls.adrift.items() if call in desk._given}
    taken = [t.record.call for t in taking.values() if t.record is not None]
    returned = [one.call for ring in calls.rings for one in ring.records]
    unwritten = [record.call for record in desk._unwritten]
    found = Counter([*(r.call for r in calls.queue.records), *unwritten, *taken, *returned, *calls.adrift])
    if found != Counter(desk._given.keys()):
        hold(False, f"{node.name} has been given {sorted(desk._given)}; {sorted(found.elements())} are found;"
             f" unwritten {unwritten}, taken {taken}, returned {returned}, adrift {calls.adrift}")  # fmt: skip
    for call, since in calls.adrift.items():
        late = now - max(since, well, *(worker.died_at for worker in node.workers))
        hold(desk._doubtful or late < 2 * LOOK + SLACK, f"call {call} was lost with a worker of {node.name}")
    if calls.adrift:
        hold(desk.at is not None, f"{node.name} does not look for calls that were lost with a worker")
    for worker in node.workers:
        hold(worker.taking is None or worker.kill_at is None or now < worker.kill_at + SLACK or node.thawed_at == now,
             f"{worker} of {node.name} goes on")  # fmt: skip
    hold(desk._unwanted <= desk._given.keys(), "calls that are gone are unwanted:", desk._unwanted)
    hold(desk._begun <= desk._given.keys() >= desk._stopping.keys(), "calls that are gone have begun")
    users = sum(arena.users for arena in calls.arenas._arenas.values())
    known = desk._functions.keys() | desk._homeless.keys()
    hold(users == len(desk._given) + len(desk._functions), f"the arenas of {node.name} have {users} users: {desk}")
    of = {record.function for record in desk._given.values()}
    hold(of <= known, f"{node.name} has forgotten functions that it needs:", of)


def look(cluster: Cluster) -> None:
    """What master and nodes believe agrees; what takes longer to look at."""
    dispatch = cluster.master.dispatch
    calls = dispatch.calls
    for name, node in cluster.nodes.items():
        record = dispatch.nodes.get(name)
        if not node.alive or node.leaving or node.link.broken or record is None or record.state not in PRESENT:
            continue
        believed = sorted(calls.at[name].calls) if name in calls.at else []
        hold(believed == at_node(node), f"the master takes it that {name} has {believed}; it has {at_node(node)}")
        desk = node.calls.desk
        over = {number for number, call in calls.at[name].calls.items() if call.over} if name in calls.at else set()
        told = {number for m in node.link.down.under_way if m.kind is Kind.RECALL for number in m.header["cancelled"]}
        told.update(number for m in node.link.up.under_way if m.kind is Kind.RETURNS for number in m.header["ids"])
        told |= desk._unwanted if desk is not None else set()
        hold(over <= told, f"{name} does not know that nobody wants", over - told)
        if node.frozen or desk is None:
            continue
        for worker in node.workers:
            run = worker.taking.run if worker.taking is not None and worker.taking.state == "runs" else None
            if run is not None and run.call.id in desk._unwanted and worker.taking is not None:
                since = max(worker.taking.since, node.thawed_at, node.calls.unwanted_since[run.call.id])
                hold(cluster.now < since + GRACE + 0.1, f"{run} was cancelled, and {worker} of {name} goes on")
        functions = desk._functions.keys() | desk._homeless.keys()
        known = {run.call.function.number for run in cluster.callers.runs if name in run.call.function.at}
        known |= {number for m in node.link.down.under_way if m.kind is Kind.FORGET for number in m.header["functions"]}
        hold(functions <= known, f"{name} keeps functions for ever:", set(functions) - known)


def check_rest(cluster: Cluster) -> None:
    """Nothing is left of what has been."""
    calls = cluster.master.dispatch.calls
    for run in cluster.callers.runs:
        hold(run.end is not None or run.cancelled, f"{run} has not ended")
        hold(run.call.over, f"{run} is not over")
        hold(not run.call.nodes or cluster.master.leaving, f"{run} is over, and is at", run.call.nodes)
    if cluster.master.leaving:
        return
    hold(not calls.calls, "calls are left:", calls)
    hold(all(call.over for queue in calls._queues.values() for call in queue), "calls wait")
    counts = Counter(id(run.call.function) for run in cluster.callers.runs if run.call.nodes)
    for run in cluster.callers.runs:
        function = run.call.function
        hold(function.calls == counts[id(function)], f"function {function.number} has {function.calls} calls")
    for name, at in calls.at.items():
        hold(not at.calls, f"{name} has calls:", at.calls)
        hold(not at.recalled, f"{name} is taken to be asked for calls")
    for node in cluster.nodes.values():
        record = cluster.master.dispatch.nodes.get(node.name)
        if node.alive and not node.leaving and record is not None and record.state is NodeState.READY:
            _check_node_at_rest(node)


def _check_node_at_rest(node: Node) -> None:
    desk, calls = node.calls.desk, node.calls
    if desk is None:
        return
    hold(not desk._given and not desk.waiting, f"{node.name} has", desk)
    hold(desk.at is None and not desk._running, f"{node.name} goes on looking for calls")
    hold(not (desk._begun or desk._unwanted or desk._stopping or desk._returns), f"{node.name} keeps calls that ended")
    arenas = {name: arena for name, arena in calls.files.items() if name.startswith("result")}
    hold(not arenas, f"{node.name} keeps results", list(arenas))
