"""A node of a simulated cluster: the real Scheduler and its books, with processes, files and bytes played.

What is done with messages and decisions is what qjam_worker.node.node and qjam_worker.node.pool do.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qjam_worker.ipc.files import Mapped, NoRoom
from qjam_worker.node.commands import Command, Drop, Ended, Forget, Give, Interrupt, Tell, refusal
from qjam_worker.node.folds import Fold
from qjam_worker.node.module_cache import FIELDS, ModuleCache
from qjam_worker.node.pool import GRACE
from qjam_worker.node.results import Held
from qjam_worker.node.rounds import NodeRound, Work
from qjam_worker.node.scheduler import Scheduler
from qjam_worker.values import segmented_sum
from qjam_worker.values.reduction import Span, Tree
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import Ref, of_params
from qjam_worker.worker.user_modules import FIELDS

from . import checks
from .node_calls import NodeCalls, Taking
from .plans import MIB, HostPlan
from .usercode import SMALL, reduce_of, unpacked
from .world import Broken, Link, Message, Process, told

if TYPE_CHECKING:
    from .cluster import Cluster

CREDIT = 16 * MIB
HUNG = float("inf")
MODULE = {name: kind() for name, kind in FIELDS.items()}


class Refs:
    """qjam_worker.node.store.Store without bytes."""

    def __init__(self, limit: int, room: int, allocate: Callable[[], None]) -> None:
        self.limit = limit
        self.room = room
        self.bytes = 0
        self.entries: OrderedDict[Ref, list[int]] = OrderedDict()  # ref -> bytes here, bytes in all
        self.pins: dict[str, int] = {}
        self._allocate = allocate

    def __contains__(self, ref: Ref) -> bool:
        entry = self.entries.get(ref)
        return entry is not None and entry[0] == entry[1]

    def have(self, ref: Ref) -> int:
        return self.entries[ref][0] if ref in self.entries else 0

    def pin(self, ref: Ref) -> None:
        self.pins[ref] = self.pins.get(ref, 0) + 1

    def unpin(self, ref: Ref) -> None:
        left = self.pins.pop(ref) - 1
        if left:
            self.pins[ref] = left

    def use(self, ref: Ref) -> None:
        self.entries.move_to_end(ref)

    def drop(self, ref: Ref) -> None:
        entry = self.entries.pop(ref, None)
        if entry is not None:
            self.bytes -= entry[1]

    def write(self, ref: Ref, offset: int, total: int, size: int) -> None:
        entry = self.entries.get(ref)
        if entry is None:
            while self.bytes + total > self.limit:
                unpinned = next((other for other in self.entries if other not in self.pins), None)
                if unpinned is None:
                    break
                self.drop(unpinned)
            if self.bytes + total > self.room:
                raise NoRoom("the disk is full")
            self._allocate()
            entry = self.entries[ref] = [0, total]
            self.bytes += total
        if entry[1] != total or offset + size > total:
            raise Broken(f"a chunk at {offset} of {ref} goes beyond its end")
        if offset <= entry[0]:
            entry[0] = max(entry[0], offset + size)


class Files:
    """The files of results, by path."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.data: dict[str, bytes] = {}
        self._made = 0

    def put(self, data: bytes) -> str:
        self._made += 1
        path = f"{self.node.name}/{self._made}"
        self.data[path] = data
        self.node.cluster.files[path] = self
        return path

    def create(self, name: str, size: int) -> Mapped:
        """For Held.in_file."""
        self.node.allocate()
        data = bytearray(size)
        path = self.put(data)  # type: ignore[arg-type]
        return Mapped(path, memoryview(data))


class Modules:
    """Where a worker hears of modules."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def send(self, message: dict[str, Any]) -> None:
        self.worker.on_module(message["name"])


class Worker:
    """One place in the pool. A process in it maps, folds, fails, hangs, is interrupted and is replaced."""

    def __init__(self, node: Node, index: int) -> None:
        self.node = node
        self.index = index
        self.up = False
        self.seq = 0  # of what it has been given; 0 when idle
        self.token = 0  # changes when what it was going to do is not going to happen
        self.slowness = 1.0
        self.modules: Modules | None = Modules(self)
        self.known: set[str] = set()  # modules
        self.jobs: set[int] = set()
        self.round: NodeRound | None = None
        self.work: Work | None = None
        self.began = 0.0
        self.steps: list[tuple[float, int, str]] = []  # until when, at which slice, how it ends
        self.items: list[tuple[Span, bytes]] = []
        self.kill_at: float | None = None
        self.waits_for: str | None = None
        self.taking: Taking | None = None  # calls
        self.life = 0  # changes with its process
        self.died_at = 0.0

    def __repr__(self) -> str:
        return f"worker {self.index}"

    def is_at(self, number: int, index: int) -> bool:
        """Whether it has begun a slice, or is going to, and has not answered."""
        return bool(self.seq and self.round and self.work and self.round.number == number and index in self.work.slices)

    # Given by the pool

    def ring(self, round_: NodeRound, work: Work, items: list[tuple[Span, bytes]]) -> None:
        """Begin with a piece of work."""
        world, cluster = self.node.world, self.node.cluster
        self.node.assigned += 1
        self.begin(self.node.assigned)
        self.round, self.work, self.items = round_, work, items
        run = cluster.runs[round_.number]
        checks.check_attempts(run, round_, work)
        slices = [items[-1][0][0]] if work.fold is not None else work.slices
        time = world.now + 2e-5
        self.steps = []
        for index in slices:
            how = run.how_it_goes(index, work.fold is not None, self)
            seconds = run.job.seconds * self.node.plan.slowness * self.slowness * (0.5 + world.noise(run.number, index))
            if work.fold is not None:
                seconds *= 0.05
            time = HUNG if how == "hang" else time + seconds
            self.steps.append((time, index, how))
            if how != "done":
                break
        modules = cluster.plan.jobs[run.plan.job].modules
        name = f"m{run.plan.job}{world.now * 1e6 % modules:.0f}" if modules else ""
        if modules and work.fold is None and name not in self.known:
            self.waits_for = name
            world.at(world.now + 1e-5, self.node, self._import, self.token, name)
        else:
            self._go_on()

    def begin(self, seq: int) -> None:
        """It is busy from now on."""
        self.seq, self.began, self.steps = seq, self.node.world.now, []
        self.token += 1

    def _import(self, token: int, name: str) -> None:
        if token == self.token:
            self.node.on_import(self, name)

    def on_module(self, name: str) -> None:
        """An import is answered."""
        if self.waits_for != name:
            return
        self.waits_for = None
        self.known.add(name)
        if self.kill_at is not None:
            self._answer_soon("cancelled", 1e-4)
            return
        later = self.node.world.now - self.began
        self.steps = [(until + later, index, how) for until, index, how in self.steps]
        self._go_on()

    def _go_on(self) -> None:
        self.token += 1
        until, _, how = self.steps[-1]
        if how == "hang":
            run = self.node.cluster.runs[self.round.number]  # type: ignore[union-attr]
            self.hang(20.0 + 60.0 * self.node.world.noise(run.number, self.seq))
        else:
            self.node.world.at(until, self.node, self._end, self.token, how)

    def hang(self, seconds: float) -> None:
        """Never answer; somebody kills it after so long."""
        self.token += 1
        self.steps = [(HUNG, index, how) if until > self.node.world.now else (until, index, how)
                      for until, index, how in self.steps]  # fmt: skip
        self.node.world.at(self.node.world.now + seconds, self.node, self._killed, self.seq)

    def _killed(self, seq: int) -> None:
        if seq == self.seq:
            self.exit("was killed by somebody who saw it hang")

    def slow_down(self, factor: float) -> None:
        """What it is at, and what comes, takes so many times as long."""
        now = self.node.world.now
        self.slowness = max(1.0, self.slowness * factor)
        if self.seq and self.steps and self.waits_for is None and self.kill_at is None and self.steps[-1][0] < HUNG:
            self.steps = [
                (now + (until - now) * factor if until > now else until, index, how) for until, index, how in self.steps
            ]
            self.node.longest = max(self.node.longest, min(100.0, self.steps[-1][0] - now))
            self._go_on()

    # How it ends

    def _end(self, token: int, how: str) -> None:
        if token != self.token:
            return
        if how == "kill":
            self.exit("was killed by signal 9")
        elif how == "raise":
            self._answer_now("error")
        else:
            self._answer_now("done")

    def _answer_soon(self, what: str, delay: float) -> None:
        self.token += 1
        self.node.world.at(self.node.world.now + delay, self.node, self._late_answer, self.token, what)

    def _late_answer(self, token: int, what: str) -> None:
        if token == self.token:
            self._answer_now(what)

    def _answer_now(self, what: str) -> None:
        round_, work, items = self.round, self.work, self.items
        assert round_ is not None
        assert work is not None
        at = self.at
        self.rest()
        self.node.on_answer(self, what, round_, work, items, at)

    def rest(self) -> None:
        """It is idle from now on."""
        self.token += 1
        self.seq, self.kill_at, self.waits_for = 0, None, None
        self.round = self.work = self.taking = None
        self.items = []

    @property
    def at(self) -> int | None:
        """The slice that it is at."""
        if not self.seq or not self.steps:
            return None
        return next((index for until, index, _ in self.steps if until >= self.node.world.now), self.steps[-1][1])

    def interrupt(self, *, asked: bool = True) -> None:
        """Stop: user code gets a KeyboardInterrupt, and a signal that cannot be caught if that does not help."""
        if not self.seq or self.kill_at is not None or self.taking is not None:
            return
        world = self.node.world
        if not asked:
            self._answer_soon("cancelled", 1e-4)
            return
        self.kill_at = world.now + GRACE
        ends = self.steps[-1][0]
        if ends - world.now < 5e-5:
            return  # its answer is under way
        drawn = world.noise(7, self.seq, self.index)
        world.at(self.kill_at, self.node, self._kill, self.seq)
        if self.waits_for is None and drawn > 0.2:
            self._answer_soon("cancelled", 1e-4 + 0.01 * drawn)

    def _kill(self, seq: int) -> None:
        if seq == self.seq and self.kill_at is not None:
            self.exit("was killed by signal 9 (it was to stop)")

    def exit(self, how: str) -> None:
        """The process ends."""
        at, taking = self.at, self.taking
        self.rest()
        self.up = False
        self.forget()
        self.node.on_worker_exit(self, taking, how, at)

    def forget(self) -> None:
        """Another process takes its place."""
        self.jobs.clear()
        self.known.clear()
        self.life += 1
        self.died_at = self.node.world.now

    def spare(self) -> None:
        """It has stopped what it was to stop."""
        self.kill_at = None

    def replaced(self) -> None:
        self.up = True
        self.node.on_worker_replaced(self)


class Node(Process):
    """All of one node. A host that is started again has another one, with another name."""

    def __init__(self, cluster: Cluster, name: str, host: int, plan: HostPlan, link: Link) -> None:
        super().__init__(cluster, name)
        self.cluster = cluster
        self.host = host
        self.plan = plan
        self.link = link
        self.leaving = False
        self.doomed = False  # whether the master will hear of its end by other ways
        self.no_room = 0  # so many of the next files cannot be made
        self.assigned = 0
        self.given_at = 0.0  # when a worker was last given work of a round
        self.longest = 0.0  # seconds that any of its workers has something to do
        self.given_up: set[int] = set()
        self.refs = Refs(plan.shelf, plan.room, self.allocate)
        self.scheduler = Scheduler(plan.workers, self.refs)
        self.workers = [Worker(self, index) for index in range(plan.workers)]
        self.imports = ModuleCache()
        self.params: dict[int, Ref | None] = {}
        self.files = Files(self)
        self.calls = NodeCalls(self)
        self._commands: deque[Command] = deque()
        self._acting = False
        self._perform: dict[type, Callable[[Any], None]] = {
            Tell: lambda command: self.send(*command),
            Give: self._give,
            Interrupt: lambda command: self.workers[command.worker].interrupt(),
            Forget: self._forget,
            Drop: self._drop,
            Ended: lambda command: self._release(command.round),
            **self.calls.perform,
        }
        self._handlers: dict[Kind, Callable[[dict[str, Any], list[Any]], None]] = {
            Kind.WELCOME: lambda header, buffers: self.act(self.scheduler.on_welcome(header)),
            Kind.JOB: self._on_job,
            Kind.DATA: lambda header, buffers: self.act(self.scheduler.on_data(header)),
            Kind.TASK: self._on_task,
            Kind.SHARE: lambda header, buffers: self.act(self.scheduler.on_share(header, self.world.now)),
            Kind.RELEASE: lambda header, buffers: self.act(self.scheduler.on_release(header)),
            Kind.REFS: self._on_refs,
            **self.calls.handlers,
            Kind.CANCEL: lambda header, buffers: self.act(self.scheduler.on_cancel(header, self.world.now)),
            Kind.PING: lambda header, buffers: self.send(Kind.PONG, header),
            Kind.BYE: lambda header, buffers: self.leave(header["reason"]),
        }

    # Its life

    def start(self) -> None:
        """Report to the master; the workers come a little later."""
        self.send(Kind.HELLO, {"workers": len(self.workers), "credit": CREDIT})
        self.world.at(self.world.now + 0.1 + 0.2 * self.world.noise(self.link.key, 3), self, self._on_pool_ready)

    def _on_pool_ready(self) -> None:
        if self.leaving:
            return
        self.send(Kind.STATE, {"state": "ready", "workers": [100 + worker.index for worker in self.workers]})
        for worker in self.workers:
            worker.up = True
            self.act(self.scheduler.on_ready(worker.index, self.world.now))

    def leave(self, reason: str) -> None:
        """Stop the workers, say BYE, end."""
        self.leaving = True
        for worker in self.workers:
            worker.token += 1
        self.world.at(self.world.now + 0.5 * self.world.noise(self.link.key, 4), self, self._bye, reason)

    def _bye(self, reason: str) -> None:
        self.send(Kind.BYE, {"reason": reason})
        self.die()

    def die(self) -> None:
        """All of it is gone."""
        self.alive = False
        for path in self.files.data:
            self.cluster.files.pop(path, None)
        self.calls.files.clear()

    def send(self, kind: Kind, header: dict[str, Any], buffers: list[Any] = []) -> None:  # noqa: B006  never changed
        if self.world.trace is not None:
            self.world.say(self.name, f"-> master: {told(kind, header)}")
        if kind is Kind.RESULT:
            checks.check_roots(self, header)
        size = 100 + (sum(map(len, buffers)) if kind in (Kind.RESULT, Kind.RETURNS) else 0)
        master = self.cluster.master
        message = Message(kind, header, buffers)
        self.link.up.send(master, lambda received: master.on_message(self, received), message, size)

    def receive(self, message: Message) -> None:
        if not self.leaving:
            self._handlers[message.kind](message.header, message.buffers)

    def next_deadline(self) -> float | None:
        due = self.scheduler.next_deadline(), self.calls.next_deadline()
        return None if self.leaving else min((at for at in due if at is not None), default=None)

    def on_timer(self) -> None:
        self.calls.on_timer()
        self.act(self.scheduler.on_timer(self.world.now))

    def check(self) -> None:
        if self.alive and not self.leaving:
            checks.check_node(self)

    def allocate(self) -> None:
        """Make a file, if there is room."""
        if self.no_room:
            self.no_room -= 1
            self.world.counts["fault: no room"] += 1
            self.cluster.no_room = True
            raise NoRoom("no room")

    # Decisions

    def act(self, commands: list[Command]) -> None:
        self._commands.extend(commands)
        if self._acting:
            return
        self._acting = True
        while self._commands:
            command = self._commands.popleft()
            self._perform[type(command)](command)
        self._acting = False

    def _on_job(self, header: dict[str, Any], buffers: list[Any]) -> None:
        self.imports.begin(header["entry"]["epoch"])
        self.act(self.scheduler.on_job(header))

    def _forget(self, command: Forget) -> None:
        for worker in self.workers:
            worker.jobs.discard(command.job)

    def _on_task(self, header: dict[str, Any], buffers: list[Any]) -> None:
        number = header["round"]
        if number not in self.scheduler.rounds:
            if header["params"] == "have":
                return
            if number in self.params:
                raise Broken(f"the params of round {number} are kept twice")
            try:
                if header["params"] == "inline":
                    self.allocate()
            except NoRoom as error:
                self.act([refusal(number, str(error))])
                return
            self.params[number] = of_params(number) if header["params"] == "ref" else None
        self.act(self.scheduler.on_task(header, self.world.now))

    def _release(self, number: int) -> None:
        ref = self.params.pop(number)
        if ref is not None:
            self.refs.drop(ref)

    def _drop(self, command: Drop) -> None:
        for ref in command.refs:
            if ref in self.refs.pins:
                raise Broken(f"{self.name} is to remove {ref}, and a round needs it")
            self.world.counts["released"] += ref in self.refs
            self.refs.drop(ref)

    def _on_refs(self, header: dict[str, Any], buffers: list[Any]) -> None:
        ref = Ref(*header["ref"])
        if header.get("gone"):
            self.imports.refuse(ref)
            if ref not in self.refs:
                self.refs.drop(ref)
            self.act(self.scheduler.on_gone(ref))
            return
        try:
            if header["offset"] <= self.refs.have(ref):  # else there was no room for what comes before
                self.refs.write(ref, header["offset"], header["total"], buffers[0])
        except NoRoom as error:
            self.cluster.no_room = True
            for number in self.scheduler.wanting(ref):
                self.act(self.scheduler.on_no_room(number, str(error), self.world.now))
            self.imports.refuse(ref)
        self.send(Kind.CREDIT, {"bytes": buffers[0]})
        if ref not in self.refs:
            return
        self.act(self.scheduler.on_arrived(ref, self.world.now))
        if ref in self.imports:
            self.refs.drop(ref)
            self.imports.arrived(ref, MODULE)

    def _give(self, command: Give) -> None:
        index, round_, work = command
        now = self.world.now
        if round_.number not in self.scheduler.rounds:  # given up since this was decided
            self.act(self.scheduler.on_cancelled(index, now))
            return
        worker, job = self.workers[index], round_.job
        if work.fold is not None and self.cluster.runs[round_.number].job.kind == "list":
            raise Broken(f"{self.name} folds what round {round_.number} collects")
        if worker.seq or not worker.up:
            raise Broken(f"{work} is given to {worker}, which is not idle")
        if self.world.trace is not None:
            self.world.say(self.name, f"{worker} gets {work} of round {round_.number}")
        items = []
        if work.fold is None:
            params = self.params[round_.number]
            for ref in (params, *(round_.data.refs[i] for i in work.slices)):
                if ref is not None:
                    self._look_up(ref)
        else:
            try:
                items = self._fold_items(work.fold)
            except NoRoom as error:
                self.act(self.scheduler.on_failed(index, "room", str(error), now))
                return
        if job.number not in worker.jobs:
            worker.jobs.add(job.number)
            if job.code is not None:
                self._look_up(job.code)
        self.given_at = now
        worker.ring(round_, work, items)
        if worker.steps:
            self.longest = max(self.longest, min(worker.steps[-1][0] - now, 100.0))

    def _fold_items(self, fold: Fold) -> list[tuple[Span, bytes]]:
        items = []
        for span, held in fold.items():
            path, _ = held.in_file(self.files, "fold")  # type: ignore[arg-type]
            items.append((span, bytes(self.cluster.read(path))))
        if fold.parts > 1 and fold.out is None:
            made = self.files.create("fold", len(items[0][1]))
            fold.out = Held(made.view, True, made.path)
        if fold.out is not None:
            self.cluster.read(str(fold.out.path))  # it is there
        return items

    def _look_up(self, ref: Ref) -> None:
        if ref not in self.refs:
            raise Broken(f"{ref} is not here, and a worker is to map it")
        self.refs.use(ref)

    # What the workers say

    def on_answer(
        self, worker: Worker, what: str, round_: NodeRound, work: Work, items: list[tuple[Span, bytes]], at: int | None
    ) -> None:
        now, run = self.world.now, self.cluster.runs[round_.number]
        if self.world.trace is not None:
            self.world.say(self.name, f"{worker} answers {what} to {work} of round {round_.number}")
        if what == "done":
            roots = [(span, self._hold(*packed)) for span, packed in self._results(run, work, items)]
            commands = self.scheduler.on_done(worker.index, roots, now)
        elif what == "error":
            message = {"slice": at, "text": "user code raises", "summary": "raises", "pickled": b"pickled"}
            answered = work.fold is None and at is not None and at not in round_.owed
            commands = self.scheduler.on_error(worker.index, message, now)
            if answered and any(isinstance(command, Tell) and command.kind is Kind.ERROR for command in commands):
                raise Broken(f"{self.name} tells that slice {at} has raised, which somebody has answered")
        else:
            commands = self.scheduler.on_cancelled(worker.index, now)
        self.act(commands)

    def _results(self, run: Any, work: Work, items: list[tuple[Span, bytes]]) -> list[tuple[Span, tuple[bytes, bool]]]:
        """What a worker process makes of its work."""
        if work.fold is None and len(work.slices) == 1:
            index = work.slices[0]
            return [((index, index + 1), run.packed(index, index + 1))]
        tree = Tree(run.nslices)
        if work.fold is None:  # spans stand for their values: what a block of slices makes is known
            for index in work.slices:
                tree.add((index, index + 1), (index, index + 1))
                tree.fold_from((index, index + 1), lambda left, right: (left[0], right[1]))
            return [(span, run.packed(*span)) for span in tree.spans]
        if work.fold.out is not None:
            views = {span: memoryview(data) for span, data in items}
            if work.fold.out.flat is not None:  # else the round is over
                segmented_sum.add_up(views, run.nslices, work.fold.out.flat, work.part, work.fold.parts)
            return []
        for span, data in items:
            tree.add(span, unpacked(data))
        tree.fold(reduce_of(run.job.kind))
        return [(span, run.pack(tree.values[span])) for span in tree.spans]

    def _hold(self, data: bytes, plain: bool) -> Held:
        if len(data) <= SMALL:
            return Held(memoryview(data), plain)
        return Held(memoryview(data), plain, self.files.put(data))

    def on_import(self, worker: Worker, name: str) -> None:
        ref = self.imports.ask(worker, 1, name)  # type: ignore[arg-type]
        if ref is not None:
            self.act(self.scheduler.on_import(worker.index, ref))

    def on_worker_exit(self, worker: Worker, taking: Taking | None, how: str, at: int | None) -> None:
        commands = self.calls.on_exit(worker, taking, how)
        if self.world.trace is not None:
            self.world.say(self.name, f"{worker} {how} at slice {at}")
        self.imports.forget(worker)  # type: ignore[arg-type]
        self.world.at(self.world.now + 0.01 + 0.04 * self.world.noise(5, self.assigned), self, worker.replaced)
        self.act([*commands, *self.scheduler.on_exit(worker.index, how, at, 100, self.world.now)])

    def on_worker_replaced(self, worker: Worker) -> None:
        self.send(Kind.STATE, {"state": "replaced", "worker": worker.index, "pid": 101})
        self.act(self.scheduler.on_ready(worker.index, self.world.now))
