"""Master: a pool of workers on one or many hosts, and `run`, which maps a function over data on them."""

from __future__ import annotations

import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

from qjam_worker.ipc.cores import usable_cores
from qjam_worker.values import codec

from . import arguments
from .code.user_code import Sources, UserCode
from .data.datasets import BaseDataSet, DataSet
from .dispatch.commands import Failure
from .dispatch.rounds import JobSpec
from .engine.engine import Engine
from .engine.pending import Pending
from .engine.printer import Printer
from .errors import BootstrapError, MasterClosed, QjamError, RoundTimeout, TaskError, WorkerLost
from .hosts import HostSpec, resolve
from .launch.fleet import Fleet
from .launch.supervisor import STOP_TIMEOUT, SupervisedHost, Supervisor
from .remote_worker import RemoteWorker, WorkerStatus
from .report import HostReport
from .stats import Stats

# A timeout of more seconds than this is none.
NEVER = 1e9
# More slices than this are a mistake, and would not fit the message that tells a node of them.
MOST_SLICES = 1_000_000
PING_TIMEOUT = 5.0


Hosts = int | str | HostSpec | RemoteWorker | Iterable[str | HostSpec | RemoteWorker] | None


class Master:
    """Workers on `hosts`, started now and stopped by `close`, at the end of a `with` block, or with the program.

    `hosts`: None (one worker a usable core of this machine), a number of workers on this machine, a text such as
    "alice@node1:2222*8" or "local*4", or a list of texts, HostSpecs and RemoteWorkers; a host named again gets one
    worker more. Hosts but `local` are reached by ssh, with the keys and the configuration that `ssh` would use, and
    need nothing but python 3.9 or newer.
    `echo`: whether what user code prints is shown here, each line behind `[host worker]`.
    `memory_limit`: bytes, or a text such as "2GB", that one worker may take for itself beside the data; None: no limit.
    `speculation`: whether an idle worker tries a slice that another one takes much longer with than is usual; the first
    answer counts, the other attempt is stopped. Turn it off where mapfunc does things that must not be done twice.
    `min_workers`: go on without hosts that do not start as long as that many workers come; None: all must come.
    `host_keys`: "known" refuses a host whose key is not in known_hosts; "accept-new" records it there and goes on.
    `ssh_config`: a file to read in place of ~/.ssh/config; None is that of QJAM_SSH_CONFIG, if there is one.
    `route`: how hosts reach this machine: "direct", "tunnel" or "stdio"; None takes the first that works.
    `address`: further addresses of this machine, `address` or `address:port`, that hosts may try to reach it at. One of
    a router before it needs the port that is forwarded to the same port here.
    `keep_data`: whether hosts keep slices on disk (~/.cache/qjam/data there), so that a program that comes after has to
    send none of them again. True keeps up to 20 GB a host, bytes or a text such as "100GB" that much, and never more
    than half of the free disk; what was used least recently goes first. False leaves nothing on any host.

    A host that is lost later is started again in the background; the logger "qjam" tells of it.

    Raises TypeError or ValueError for arguments that cannot be meant, BootstrapError when a host does not start: its
    text has a table of all hosts, its `hosts` a HostReport for each.
    """

    def __init__(
        self,
        hosts: Hosts = None,
        *,
        echo: bool = True,
        min_workers: int | None = None,
        host_keys: str = "known",
        ssh_config: str | os.PathLike[str] | None = None,
        route: str | None = None,
        address: str | Sequence[str] = (),
        memory_limit: int | str | None = None,
        keep_data: bool | int | str = False,
        speculation: bool = True,
    ) -> None:
        specs = [_counted(spec) for spec in resolve(_specs(hosts))]
        limit = arguments.memory_limit_bytes(memory_limit)
        keep = arguments.keep_data_bytes(keep_data)
        options = arguments.options(host_keys, ssh_config, route, address, limit, keep)
        arguments.check_speculation(speculation)
        arguments.check_min_workers(min_workers, specs)
        self._owner = os.getpid()
        self._sources = Sources()
        self._engine = Engine(self._sources.lookup, speculation=speculation)
        self._fleet = Fleet(options, self._engine)
        self._printer = Printer(echo, self._engine.acknowledge)
        self._members = Supervisor(self._engine, self._fleet, limit, keep)
        self._finisher = _Finisher()
        self._close = weakref.finalize(
            self, _close, os.getpid(), self._engine, self._fleet, self._printer, self._finisher, self._members
        )
        try:
            self._engine.start(self._printer.put, self._members)
            self._members.start(specs, min_workers)
        except BaseException:
            self._close()
            raise

    def __repr__(self) -> str:
        state = "" if self._close.alive else "closed, "
        hosts = ", ".join(str(member.spec) for member in self._members)
        return f"<Master: {state}{len(self.workers)} worker{'' if len(self.workers) == 1 else 's'} on {hosts}>"

    def __reduce__(self) -> str:
        raise TypeError(
            "a Master cannot be pickled or sent to workers; it was perhaps captured by a function or params"
        )

    def __enter__(self) -> Master:  # noqa: PYI034  typing.Self is of python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def workers(self) -> list[RemoteWorker]:
        """All workers, host by host."""
        return [worker for member in self._members for worker in self._workers(member)]

    def _workers(self, member: SupervisedHost) -> list[RemoteWorker]:
        engine, members = self._engine, self._members
        record = engine.dispatch.nodes.get(member.name)
        return [
            RemoteWorker(
                member.host,
                index,
                partial(_status_of, engine, members, member, index),
                lambda: engine.ping(member.name, PING_TIMEOUT),
            )
            for index in range(0 if record is None else record.workers)
        ]

    @property
    def start_reports(self) -> list[HostReport]:
        """How the start of each host went, those that did not come included."""
        return list(self._members.reports)

    def add_hosts(self, hosts: Hosts, *, min_workers: int | None = None) -> list[RemoteWorker]:
        """Start workers on further hosts, also while rounds run, and give them when they are ready.

        `hosts` and `min_workers` are as for Master, and with `local` among the hosts this machine too. Rounds that are
        under way go on; the next ones use the new workers, which are sent the slices that they take over.

        Raises ValueError for a host that is here already, BootstrapError when a host does not start: none of the new
        ones stays then.
        """
        self._check_open()
        specs = [_counted(spec) for spec in resolve(_specs(hosts))]
        arguments.check_min_workers(min_workers, specs)
        arguments.check_new_hosts(specs, [member.host for member in self._members])
        try:
            came = self._members.start(specs, min_workers)
        except (OSError, BootstrapError):
            self._check_open()  # it was closed meanwhile
            raise
        return [worker for member in came for worker in self._workers(member)]

    def remove_hosts(self, hosts: Hosts) -> None:
        """Stop all workers of hosts, also while rounds run: what they were doing is done by the others.

        `hosts` are as for Master, without numbers of workers or with. Gives back when they have gone.

        Raises ValueError for a host that is not here, and where none would be left.
        """
        self._check_open()
        known = {member.host: member for member in self._members}
        wanted = arguments.hosts_to_remove(resolve(_specs(hosts)), list(known))
        try:
            self._members.remove([known[host] for host in wanted])
        except OSError:
            self._check_open()  # it was closed meanwhile
            raise

    def stats(self) -> Stats:
        """A copy of the figures since the start: rounds, and bytes sent and received for each purpose."""
        return replace(self._engine.stats)

    def run(self, module: Any, params: Any = None, dataset: Any = None, *, timeout: float | None = None) -> Any:
        """Map `module.mapfunc(params, slice)` over the slices of `dataset` and give the reduced result.

        `module`: a module with `mapfunc(params, slice)` and, if results do not simply add up, `reduce(a, b)`; or a
        function f(params, slice), whose results are added: numbers, arrays, and lists and tuples of them. (One slice
        has nothing to be added to, so any result passes then.) `params`: any value; sent on every call; arrays arrive
        read-only. `dataset`: a DataSet, list, tuple or array; its slices are sent once and stay on the hosts. Without
        one mapfunc(params, None) runs once on each worker. `timeout`: seconds, None for no limit.

        The result is reduced along a tree that depends on the slices alone: with `slice_size` given it is bitwise the
        same on any number of workers. Arrays in it are the caller's own.

        Raises TaskError (user code raised; the original exception is its cause), WorkerLost (a slice ends its worker
        process again and again), RoundTimeout, MasterClosed, BootstrapError (no host is left), TypeError or
        ValueError for arguments that cannot be right. Ctrl-C cancels the round. After any of these the pool is usable.
        """
        entry, pending = self._prepare(module, params, dataset, timeout, None)
        try:
            self._engine.run(pending)
        except BaseException:
            self._engine.cancel(pending)
            raise
        self._printer.flush()
        return _outcome(pending, entry, self._sources, timeout)

    def submit(
        self, module: Any, params: Any = None, dataset: Any = None, *, timeout: float | None = None
    ) -> Future[Any]:
        """Like `run`, but gives a Future at once; cancelling it cancels the round. `params` are copied."""
        future: Future[Any] = Future()

        def finish(pending: Pending) -> None:
            finisher.put(lambda: _settle(future, pending, entry, sources, timeout))

        sources, finisher = self._sources, self._finisher  # not self: a master that nobody holds is closed
        entry, pending = self._prepare(module, params, dataset, timeout, finish)
        buffers = [memoryview(bytes(buffer)) for buffer in pending.params.buffers]
        pending.params = pending.params._replace(buffers=buffers)
        engine = self._engine
        engine.submit(pending)
        future.add_done_callback(lambda done: engine.cancel(pending) if done.cancelled() else None)
        return future

    def close(self) -> None:
        """End running rounds (MasterClosed), stop all workers, remove all that was made; may be called again."""
        self._close()

    def _check_open(self) -> None:
        if not self._close.alive:
            raise MasterClosed("this Master is closed; make a new one")
        if os.getpid() != self._owner:
            raise MasterClosed(f"this Master belongs to process {self._owner}, and this is a fork of it; make one here")

    def _prepare(
        self,
        module: Any,
        params: Any,
        dataset: Any,
        timeout: float | None,
        on_end: Callable[[Pending], None] | None,
    ) -> tuple[UserCode, Pending]:
        self._check_open()
        arguments.check_timeout(timeout)
        entry = self._sources.entry(module)
        capacity = max(1, self._engine.dispatch.capacity)
        data: BaseDataSet | None = None
        if dataset is None:
            spec = JobSpec((entry.key, capacity), entry.header, None, capacity)
        else:
            data = DataSet(dataset).bind(capacity)
            file = data.in_file()  # before the hashes: once it changes it is not the file that hosts look for
            refs = _hashes(data)
            if not refs:
                raise ValueError(
                    "dataset has no slices, so there is nothing to map over; None runs once on each worker"
                )
            spec = JobSpec((entry.key, tuple(refs)), entry.header, refs, len(refs), file)
        try:
            encoded = codec.encode(params)
        except codec.CodecError as error:
            raise TypeError(f"params cannot be sent to workers: {error}") from error
        deadline = None if timeout is None or timeout > NEVER else time.monotonic() + timeout
        return entry, Pending(spec, entry.code, encoded, data, deadline, on_end)


def _hashes(data: BaseDataSet) -> list[str]:
    if len(data) > MOST_SLICES:
        raise ValueError(f"dataset has {len(data):,} slices; the most is {MOST_SLICES:,}: make slice_size larger")
    try:
        return data.hash_list()
    except codec.CodecError as error:
        raise TypeError(f"dataset: a slice cannot be sent to workers: {error}") from error


def _specs(hosts: Hosts) -> Any:
    if isinstance(hosts, RemoteWorker):
        return hosts.spec
    if isinstance(hosts, (list, tuple)):
        return [item.spec if isinstance(item, RemoteWorker) else item for item in hosts]
    return hosts


def _counted(spec: HostSpec) -> HostSpec:
    return replace(spec, workers=usable_cores()) if spec.local and spec.workers is None else spec


def _status_of(engine: Engine, members: Supervisor, member: SupervisedHost, index: int) -> WorkerStatus:
    node = engine.dispatch.nodes.get(member.name)
    if node is None:  # it was removed
        return WorkerStatus("closed")
    pid = node.pids[index] if index < len(node.pids) else None
    return WorkerStatus(node.state.value, pid, members.route(member))


def _close(
    owner: int, engine: Engine, fleet: Fleet, printer: Printer, finisher: _Finisher, members: Supervisor
) -> None:
    """In a thread of its own: Ctrl-C meanwhile must not leave half of it undone, and the garbage collector may call
    this in one of the threads that it ends.
    """
    if os.getpid() != owner:
        return  # a fork of the program ends; its threads and workers are its parent's

    def close() -> None:
        engine.say_goodbye()
        deadline = time.monotonic() + STOP_TIMEOUT
        for name in members.names:
            engine.wait_for_bye(name, max(0.0, deadline - time.monotonic()))
        fleet.close()
        finisher.close()
        engine.stop()
        printer.close()  # now that nothing comes any more: the last words too are shown

    thread = threading.Thread(target=close, name="qjam-close")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is on its way out and starts no more threads
        close()
        return
    if not threading.current_thread().name.startswith("qjam-"):
        thread.join()


class _Finisher:
    """Threads that decode and reduce the results of `submit`: the engine's loop runs no user code. One each, because
    what is called back when a future is done may itself wait for another.
    """

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    def put(self, call: Callable[[], None]) -> None:
        """Make the call."""

        def run() -> None:
            try:
                call()
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="qjam-finish", daemon=True)
        self._threads.add(thread)
        thread.start()

    def close(self) -> None:
        """Wait for the calls to end; one that does not is left behind."""
        for thread in list(self._threads):
            thread.join(STOP_TIMEOUT)


def _settle(future: Future[Any], pending: Pending, entry: UserCode, sources: Sources, timeout: float | None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(_outcome(pending, entry, sources, timeout))
    except BaseException as error:  # noqa: BLE001  belongs to whoever waits for the future
        future.set_exception(error)


def _outcome(pending: Pending, entry: UserCode, sources: Sources, timeout: float | None) -> Any:
    """The result of a round that is over, or its exception."""
    if pending.roots is not None:
        return pending.reduced(entry.reduce)
    assert pending.failure is not None
    error = _EXCEPTIONS[pending.failure.what](pending.failure, timeout)
    if isinstance(error.__cause__, ImportError):
        sources.forget()
    raise error


def _task_error(failure: Failure, timeout: float | None) -> BaseException:
    error = TaskError(failure.host, failure.worker, failure.slice, failure.text, failure.summary)
    if failure.error is not None:
        try:
            error.__cause__ = pickle.loads(failure.error)
        except Exception:  # noqa: BLE001, S110  its class cannot be had here; the text tells all
            pass
    return error


_EXCEPTIONS: dict[str, Callable[[Failure, float | None], BaseException]] = {
    "task": _task_error,
    "lost": lambda f, timeout: WorkerLost(f.host, f.worker, f.slice, f.text),
    "room": lambda f, timeout: QjamError(f"{f.host}: {f.text}"),
    "load": lambda f, timeout: f.error,
    "timeout": lambda f, timeout: RoundTimeout(f"the round did not end within {timeout} s: {f.text}"),
    "cancelled": lambda f, timeout: CancelledError(),
    "closed": lambda f, timeout: MasterClosed(f.text),
    "crashed": lambda f, timeout: QjamError(f.text),
    "node": lambda f, timeout: QjamError(f"{f.host}: {f.text}"),
    "unreachable": lambda f, timeout: BootstrapError(f"no worker is left: {f.text}"),
}
