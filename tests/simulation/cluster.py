"""A whole cluster: the hosts, the user who submits rounds, and what goes wrong, as a plan has it."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import qjam.dispatch.calls
import qjam_worker.ipc.arenas
import qjam_worker.node.calls
from qjam.data.leases import Lease
from qjam.dispatch import line
from qjam.dispatch.commands import Done, Fail, Failure
from qjam.dispatch.jobs import JobSpec
from qjam.dispatch.rounds import RoundSpec
from qjam.dispatch.states import DONE, NodeState
from qjam_worker.node import results
from qjam_worker.values.outcomes import VALUE
from qjam_worker.values.reduction import Tree
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import CODE, MODULE, PARAMS, SLICE, Ref, of_slice

from . import checks, usercode
from .call_checks import MAX_BYTES, MAX_WINDOW
from .calls import Callers
from .master import Master
from .node import Files, Node, Worker
from .plans import CallsPlan, HostPlan, Incident, JobPlan, Plan, RoundPlan
from .usercode import SMALL
from .watch import Watch
from .world import Broken, Link, Message, World

# Virtual seconds after the last thing that is planned for all to come to its end.
CALM = 4000.0
HEARTBEAT = 30.0


class Run:
    """One round: what its user code does, and what has become of it."""

    def __init__(self, number: int, plan: RoundPlan, job: JobPlan, nslices: int, began: float) -> None:
        self.number = number
        self.plan = plan
        self.job = job
        self.nslices = nslices
        self.began = began
        self.end: Done | Fail | None = None
        self.ended_at = 0.0
        self.cancelled = False
        self.attempts: Counter[int] = Counter()
        self.firsts: set[int] = set()  # the slices that a worker was given as the first one
        self.folds = 0
        self.by: list[tuple[str, int, int]] = []  # node, worker, slice of each attempt
        self.raised: set[int | None] = set()
        self.deaths: Counter[int | None] = Counter()
        self.at: dict[int, list[Worker]] = {}  # who has begun a slice
        self.disturbed = False  # whether anything has gone wrong meanwhile
        self._packed: dict[tuple[int, int], tuple[bytes, bool]] = {}

    def how_it_goes(self, index: int, fold: bool, worker: Worker) -> str:
        """What the next attempt at a slice, or at folding, comes to: done, raise, kill or hang."""
        plan = self.plan
        if fold:
            self.folds += 1
            if plan.fold_raises:
                self.raised.add(None)
                return "raise"
            if self.folds <= plan.fold_kills:
                return "kill"
            return "hang" if plan.fold_hangs and self.folds == 1 else "done"
        attempt = self.attempts[index]
        self.attempts[index] += 1
        self.by.append((worker.node.name, worker.index, index))
        if not worker.node.cluster.plan.speculation:
            checks.check_one_at_a_time(worker.node.cluster, self, index, worker)
        for what, when in (("raise", plan.raises), ("kill", plan.kills), ("hang", plan.hangs)):
            first, last = when.get(index, (0, 0))
            if first <= attempt < last:
                if what == "raise":
                    self.raised.add(index)
                worker.node.cluster.counts[f"fault: user code {what}s"] += 1
                self.disturbed = True
                return what
        return "done"

    def packed(self, lo: int, hi: int) -> tuple[bytes, bool]:
        """The flat result of a subtree."""
        span = lo, hi
        if span not in self._packed:
            self._packed[span] = self.pack(self._value(lo, hi))
        return self._packed[span]

    def _value(self, lo: int, hi: int) -> Any:
        if hi - lo == 1:
            return usercode.mapped(self.job.kind, self.number, lo)
        middle = lo + (1 << (hi - lo - 1).bit_length() - 1)
        return usercode.reduce_of(self.job.kind)(self._value(lo, middle), self._value(middle, hi))

    def pack(self, value: Any) -> tuple[bytes, bool]:
        return usercode.packed(value)

    def check(self, roots: list[Any]) -> None:
        """Each slice once, and the value of the tree by the book, bit for bit."""
        tree = Tree(self.nslices)
        slices: list[int] = []
        for (lo, hi), encoded in roots:
            slices += range(lo, hi)
            tree.add((lo, hi), usercode.codec.decode(encoded.header, encoded.buffers, copy=True))
        if slices != list(range(self.nslices)):
            raise Broken(f"the result of round {self.number} is of the slices {slices}, not of each one once")
        tree.fold(usercode.reduce_of(self.job.kind))
        expected = usercode.serial(self.job.kind, self.number, self.nslices)
        if usercode.packed(tree.values[0, self.nslices]) != usercode.packed(expected):
            raise Broken(f"the result of round {self.number} differs from that of the serial tree")


class Cluster(World):
    """`play` runs it from its beginning to its rest. Broken when anything does not hold."""

    def __init__(self, plan: Plan, *, trace: bool = False, strict: bool = False) -> None:
        super().__init__(plan, trace=trace)
        self.strict = strict  # look at everything after each event
        self.master = Master(self)
        self.nodes: dict[str, Node] = {}
        self.files: dict[str, Files] = {}
        self.runs: dict[int, Run] = {}
        self.callers = Callers(self)
        self.no_room = False
        self.errors: Counter[tuple[str, int, int | None]] = Counter()
        self.watch = Watch(self)
        self.limit = plan.ends + CALM
        self.leases: dict[tuple[str, ...], Lease] = {}  # that the user holds
        self._launched = 0

    # From beginning to end

    def play(self) -> None:
        with _constants(self):
            try:
                self._play()
            except Broken:
                raise
            except Exception as error:
                raise Broken(f"{type(error).__name__}: {error}") from error

    def _play(self) -> None:
        plan = self.plan
        for host, host_plan in enumerate(plan.hosts):
            self.master.add(host, host_plan, first=True)
        for round_plan in plan.rounds:
            self.at(0.0 if round_plan.at == 0.0 else 0.5 + round_plan.at, None, self._submit, round_plan)
        for calls in plan.calls:
            self.at(0.0 if calls.at == 0.0 else 0.5 + calls.at, None, self.callers.submit, calls)
        for incident in plan.incidents:
            self.at(0.5 + incident.at, None, self._happen, incident)
        if plan.close is not None:
            self.at(0.5 + plan.close, None, self._close)
        self.at(0.25, None, self.watch.look)
        self.run(self.limit)
        checks.check_rest(self)
        if not self.master.leaving and self.master.dispatch.capacity:
            self._probe()

    def _probe(self) -> None:
        """Whatever has happened, what is left of the pool is of use."""
        self.say("user", "tries whether the pool is still of use")
        jobs = [JobPlan("float", 5, data=99), JobPlan("text", 1, data=None)]
        had, self.plan = self.plan.jobs, replace(self.plan, jobs=[*self.plan.jobs, *jobs])
        began = self.now
        for node in self.nodes.values():
            node.no_room = 0
        numbers = [self._submit(RoundPlan(self.now, job)) for job in range(len(had), len(had) + 2)]
        calls = self.callers.submit(CallsPlan(self.now, 7, submitter=9))
        self.at(self.now, None, self.watch.look)
        self.run(self.now + 120.0)
        checks.check_rest(self)
        for call in calls:
            if call.end != VALUE or call.ended_at - began > 100.0:
                raise Broken(f"{call}, after all others, has come to {call.end}")
        for number in numbers:
            run = self.runs[number]
            if not isinstance(run.end, Done) or run.ended_at - began > 100.0:
                raise Broken(f"round {number}, after all others, has come to {run.end}")

    def is_stale(self, call: Any, args: tuple[Any, ...]) -> bool:
        worker = getattr(call, "__self__", None)
        return isinstance(worker, Worker) and bool(args) and args[0] not in (worker.token, worker.seq)

    def late(self) -> str:
        rounds = list(self.master.dispatch.rounds)
        if rounds:
            return f"the rounds {rounds} do not end"
        if self.master.dispatch.calls.calls:
            return f"calls do not end: {list(self.master.dispatch.calls.calls.values())[:5]}"
        return "it does not come to rest"

    def disturb(self, what: str) -> None:
        """Something goes wrong."""
        self.counts[f"fault: {what}"] += 1
        for run in self.runs.values():
            if run.end is None:
                run.disturbed = True

    # The user

    def _submit(self, plan: RoundPlan) -> int:
        number = len(self.runs) + 1
        job = self.plan.jobs[plan.job]
        dispatch = self.master.dispatch
        nslices, refs = job.nslices, None
        if job.data is None:
            nslices = max(1, dispatch.capacity)
        else:
            refs = [f"d{job.data}-{0 if job.alike and index % 3 else index}" for index in range(nslices)]
        entry = {"code": str(plan.job) if job.code else None, "reduce": job.kind == "text", "epoch": 1,
                 "job": plan.job, "collect": job.kind == "list"}  # fmt: skip
        run = self.runs[number] = Run(number, plan, job, nslices, self.now)
        self.watch.rounds = max(self.watch.rounds, sum(run.end is None for run in self.runs.values()))
        if self.trace is not None:
            self.say("user", f"submits round {number}: {nslices} slices of job {plan.job} ({job}); {plan}")
        lease = None if refs is None else self._lease(plan, job, tuple(refs))
        spec = RoundSpec(JobSpec(plan.job, entry), nslices, lease)
        run.disturbed = self.master.frozen or not all(self._is_well(name) for name in dispatch.nodes)
        self.at(self.now, self.master, self.master.submit, number, spec, plan.deadline)
        if plan.cancel is not None:
            self.at(self.now + plan.cancel, None, self._cancel, number)
        return number

    def _lease(self, plan: RoundPlan, job: JobPlan, refs: tuple[str, ...]) -> Lease:
        size = sum(self.size(of_slice(ref)) for ref in set(refs))
        if not job.held:
            return Lease(refs, size, held=False)
        lease = self.leases.setdefault(refs, Lease(refs, size))
        if plan.let_go is not None:
            self.at(self.now + plan.let_go, None, self._let_go, lease, plan.at_once)
        return lease

    def _let_go(self, lease: Lease, at_once: bool) -> None:
        if lease.held:
            self.say("user", f"lets go of {lease.key}{', at once' if at_once else ''}")
            self.counts["data is let go"] += 1
            lease.held = False
            del self.leases[lease.key]
            self.at(self.now, self.master, self.master.let_go, lease, at_once)

    def _is_well(self, name: str) -> bool:
        node = self.nodes.get(name)
        if node is None or not node.alive or node.frozen or node.link.broken or node.link.up_at > self.now:
            return False
        workers_are_well = all(worker.up and worker.slowness == 1.0 for worker in node.workers)
        return workers_are_well and self.master.dispatch.nodes[name].state is NodeState.READY

    def _cancel(self, number: int) -> None:
        run = self.runs[number]
        if run.end is None:
            self.say("user", f"cancels round {number}")
            run.cancelled = True
            self.disturb("cancelled")
            self.at(self.now, self.master, self.master.cancel, number)

    def _close(self) -> None:
        self.say("user", "closes the master")
        self.disturb("closed")
        self.at(self.now, self.master, self.master.say_goodbye)

    def on_end(self, number: int, end: Done | Fail) -> None:
        """A round is over."""
        run = self.runs[number]
        if run.end is not None:
            raise Broken(f"round {number} ends twice")
        run.end, run.ended_at = end, self.now
        if self.trace is not None:
            self.say("master", f"round {number} is over: {'done' if isinstance(end, Done) else end.failure}")
        if isinstance(end, Done):
            self.counts["outcome: done"] += 1
            run.check(end.roots)
            checks.check_once_on_each_worker(self, run)
            if run.plan.deadline is not None:
                self.counts["done before its deadline"] += 1
        else:
            self.counts[f"outcome: {end.failure.what}"] += 1
            checks.check_failure(self, run, end.failure)

    # What the master's side needs to know

    def on_heard(self, name: str, message: Message) -> None:
        """The master is told something by a node that it knows."""
        header = message.header
        number = header.get("round")
        if message.kind is Kind.STATE and header["state"] == "lost" and number in self.master.dispatch.rounds:
            slices = header["slices"]
            blamed = header["slice"] if header["slice"] is not None else slices[0] if slices else None
            self.runs[number].deaths[blamed] += 1
        elif message.kind is Kind.ERROR and header["what"] == "task":
            round_ = self.master.dispatch.rounds.get(number)
            if round_ is not None and header["slice"] is not None and round_.states[header["slice"]] == DONE:
                self.counts["errors that came too late"] += 1
                self.runs[number].raised.discard(header["slice"])
            self.errors[name, number, header["slice"]] += 1
            most = 1 if header["slice"] is not None else len(self.nodes[name].workers)  # folds of several at a time
            if self.errors[name, number, header["slice"]] > most:
                raise Broken(f"slice {header['slice']} of round {number} has raised on {name}, and was tried again")

    def duplicates(self, node: Node) -> bool:
        often = self.plan.duplicates
        if often and self.noise(9, node.link.key, self.steps) < often:
            self.counts["fault: result comes twice"] += 1
            return True
        return False

    def size(self, ref: Ref) -> int:
        """The bytes of a ref."""
        drawn = zlib.crc32(ref.key.encode()) / (1 << 32)
        if ref.kind == PARAMS:
            return self.runs[int(ref.key)].plan.params
        if ref.kind in (CODE, MODULE):
            return 10_000
        data = int(ref.key[1:].partition("-")[0])
        most = max([100, *(job.size for job in self.plan.jobs if job.data == data)])
        return 1 + int(2 * most * drawn)

    def content(self, number: int, ref: Ref) -> tuple[int, Failure | None]:
        run = self.runs.get(number)
        if ref.kind == MODULE:
            lacks = self.noise(zlib.crc32(str(ref).encode())) < 0.2
            return 10_000, Failure("load", "no such module") if lacks else None
        if run is None or run.end is not None:
            return 0, Failure("load", "it is wanted for a round that is over")
        if run.job.unloadable and ref.kind == SLICE:
            self.counts["fault: slice cannot be made"] += 1
            return 0, Failure("load", "the slice cannot be made")
        return self.size(ref), None

    def has_changed(self, number: int, ref: Ref) -> bool:
        """Whether a slice is another one, now that all of it is sent, than when it was hashed."""
        if ref.kind != SLICE or not self.runs[number].job.changing:
            return False
        self.counts["fault: slice has changed"] += 1
        return True

    def read(self, path: str) -> bytes:
        if path not in self.files:
            raise Broken(f"{path} is read, and it has been removed")
        return self.files[path].data[path]

    def remove(self, path: str) -> None:
        """In place of unlink."""
        files = self.files.pop(path, None)
        if files is not None:
            del files.data[path]

    def remove_arena(self, path: str) -> None:
        """In place of unlink, for arenas."""
        name, _, arena = path.partition("/")
        if self.nodes[name].calls.files.pop(arena, None) is None:
            raise Broken(f"{path} is removed twice")

    # Hosts

    def launch(self, host: int, name: str, plan: HostPlan, launches: int, calm: bool) -> None:
        self._launched += 1
        link = Link(self, self._launched, plan.latency, plan.jitter, 1e8)
        node = self.nodes[name] = Node(self, name, host, plan, link)
        drawn = self.noise(10, host, launches)
        delay = plan.start * (0.5 + self.noise(11, host, launches))
        if not calm and drawn < plan.bad_starts:
            self.counts["fault: start fails"] += 1
            self.notice(node, delay, "it does not start")
            node.alive = False
        elif not calm and drawn > 1.0 - plan.stalls:
            self.counts["fault: start stalls"] += 1
            node.doomed, node.alive = True, False
            link.broken = True
        else:
            self.at(self.now + delay, node, node.start)

    def notice(self, node: Node, delay: float, why: str) -> None:
        """The launcher tells the master of the end of a node."""
        node.doomed = True
        self.at(self.now + delay, self.master, self.master.lose, node.name, why)

    def end_of_lease(self, name: str) -> None:
        """The master has let go of a node: it sees that a moment later, and ends."""
        node = self.nodes.get(name)
        if node is not None and node.alive:
            node.doomed = True
            self.at(self.now + 0.05, None, self._end_node, node)

    def _end_node(self, node: Node) -> None:
        if node.alive:
            self.say(node.name, "ends, for its lease is over")
            node.link.lose()
            node.die()

    # What goes wrong

    def _happen(self, incident: Incident) -> None:
        kind, node = incident.kind, self._node(incident.host)
        if kind == "master is away":
            if not self.master.frozen:
                self._tell(incident, "master")
                self.master.freeze(incident.seconds)
        elif kind == "host joins":
            plan = self.plan.joining[incident.host - len(self.plan.hosts)]
            self._tell(incident, f"h{incident.host}")
            self.at(self.now, self.master, self.master.add, incident.host, plan, False)
        elif kind == "host is removed":
            self.at(self.now, self.master, self._remove, incident)
        elif node is not None and node.alive and not node.leaving:
            if kind.startswith("worker"):
                worker = node.workers[incident.worker % len(node.workers)]
                if worker.up and not node.frozen:
                    self._happen_to_worker(incident, node, worker)
            else:
                self._happen_to_node(incident, node)

    def _tell(self, incident: Incident, who: str) -> None:
        self.disturb(incident.kind)
        self.say(who, f"*** {incident.kind} ({incident.seconds} s, {incident.flag})")

    def _node(self, host: int) -> Node | None:
        for name, member in self.master.members.items():
            if member.host == host:
                return self.nodes.get(name)
        return None

    def _remove(self, incident: Incident) -> None:
        members = self.master.members
        member = next((m for m in members.values() if m.host == incident.host and not m.starting), None)
        if member is None or len(members) == 1:
            return
        self._tell(incident, member.name)
        self.master.take_out(member, "its host was removed")

    def _happen_to_worker(self, incident: Incident, node: Node, worker: Worker) -> None:
        if incident.kind == "worker crashes":
            self._tell(incident, node.name)
            worker.exit("was killed by signal 11")
        elif incident.kind == "worker hangs":
            if worker.seq and worker.waits_for is None and worker.kill_at is None:
                self._tell(incident, node.name)
                node.longest = max(node.longest, incident.seconds)
                worker.hang(incident.seconds)
        elif incident.kind == "worker is interrupted":  # by whom we do not know
            if worker.seq and worker.waits_for is None and worker.kill_at is None:
                self._tell(incident, node.name)
                worker.interrupt(asked=False)
        elif worker.slowness == 1.0:
            self._tell(incident, node.name)
            worker.slow_down(100.0)
            self.at(self.now + incident.seconds, node, worker.slow_down, 0.01)
        node.after()

    def _happen_to_node(self, incident: Incident, node: Node) -> None:
        kind = incident.kind
        if kind == "node freezes":
            if node.frozen:
                return
            self._tell(incident, node.name)
            node.freeze(incident.seconds)
            if HEARTBEAT < incident.seconds < 600.0:
                self.notice(node, HEARTBEAT, "its lease is over")
        elif kind == "link is down":
            self._tell(incident, node.name)
            if node.link.up_at < self.now:
                node.link.down_at = self.now
            node.link.up_at = max(self.now + incident.seconds, node.link.up_at)
        elif kind == "no room":
            node.no_room += 1
        else:
            self._tell(incident, node.name)
            delay = 0.02 if incident.flag else 15.0 * self.noise(12, node.link.key)
            node.link.lose(both=kind == "link breaks" or not incident.flag)
            node.die()
            self.notice(node, delay, "it has ended")


@contextmanager
def _constants(cluster: Cluster) -> Iterator[None]:
    """What is of the host in reality: unlink, and how large is large."""
    constants: dict[tuple[Any, str], Any] = {
        (results, "remove"): cluster.remove,
        (results, "SLOT"): SMALL,
        (line, "JOBS_KEPT"): cluster.plan.jobs_kept,
        (line, "EACH"): 0,
        (line, "LEAST"): cluster.plan.window,
        (qjam.dispatch.calls, "MAX_WINDOW"): MAX_WINDOW,
        (qjam.dispatch.calls, "MAX_BYTES"): MAX_BYTES,
        (qjam.dispatch.calls, "MAX_BATCH"): 8,
        (qjam_worker.node.calls, "MAX_RETURNS"): 4,
        (qjam_worker.ipc.arenas, "ARENA"): 1024,
        (qjam_worker.ipc.arenas, "remove"): cluster.remove_arena,
    }
    before = {(module, name): getattr(module, name) for module, name in constants}
    for (module, name), value in constants.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
