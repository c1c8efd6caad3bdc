"""Master: a pool of workers on one or more hosts. Its `run` maps a function over data and reduces the results."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from qjam_worker.importing import check_not_importing
from qjam_worker.ipc.cores import usable_cores
from qjam_worker.values import codec, definitions
from qjam_worker.wire.messages import MAX_SLICES

from . import arguments
from .code.user_code import LARGE, Sources, UserCode
from .data.datasets import BaseDataSet, DataSet
from .data.leases import Lease, Leases
from .dispatch.commands import Failure
from .dispatch.rounds import JobSpec
from .engine.engine import Engine
from .engine.pending import Pending
from .engine.printer import Printer
from .errors import BootstrapError, MasterClosed, QjamError, RoundTimeout, TaskError, WorkerLost
from .hosts import LOCAL, HostSpec, resolve
from .launch.fleet import Fleet
from .launch.supervisor import STOP_TIMEOUT, SupervisedHost, Supervisor
from .log import say
from .remote_worker import RemoteWorker, WorkerStatus
from .report import HostReport
from .stats import Stats

NEVER = 1e9  # seconds; a longer timeout is no timeout
PING_TIMEOUT = 5.0


Hosts = int | str | HostSpec | RemoteWorker | Iterable[str | HostSpec | RemoteWorker] | None


class Master:
    """Workers on `hosts`. They start now, and stop at `close`, at the end of a `with` block, or when the program ends.

    `hosts`: None (one worker per usable core of this machine), a number of workers on this machine, a text such as
    "alice@node1:2222*8" or "local*4", or a list of texts, HostSpecs and RemoteWorkers. If a host is named again, its
    workers add up. All hosts but `local` are reached by ssh, with the keys and the configuration that `ssh` would use;
    they need only python 3.9 or newer.
    `echo`: whether to print here what user code prints, each line after `[host worker]`.
    `memory_limit`: bytes, or a text such as "2GB", that one worker may allocate beside the data; None: no limit.
    `speculation`: whether an idle worker may also try a slice that takes another worker much longer than slices usually
    take. The first answer counts, the other attempt is stopped. Turn it off if mapfunc must not run twice on a slice.
    `min_workers`: if some hosts do not start, go on if at least so many workers do; None: all hosts must start.
    `host_keys`: "known" refuses a host whose key is not in known_hosts; "accept-new" adds a new key to that file.
    `ssh_config`: a file to read instead of ~/.ssh/config; None: the file that QJAM_SSH_CONFIG names, if it is set.
    `route`: how hosts reach this machine: "direct", "tunnel" or "stdio"; None: the first of these that works.
    `address`: more addresses of this machine for hosts to try, as `address` or `address:port`. The address of a router
    needs a port, which the router must forward to the same port of this machine.
    `keep_data`: whether hosts keep slices on disk (in ~/.cache/qjam/data), so that the next program need not send them
    again. True: up to 20 GB per host; bytes or a text such as "100GB": up to that much. Hosts never use more than half
    of the free disk, and delete the least recently used slices first. False: nothing stays on any host.

    `ship`: names of your own packages that are installed in site-packages here, if hosts shall get them from here, as
    they get the modules of your project. They must be pure Python.

    A host that is lost later is started again in the background, with messages to the logger "qjam".

    Raises TypeError or ValueError for wrong arguments. Raises BootstrapError if a host does not start: the text has a
    table of all hosts, the attribute `hosts` one HostReport per host. Raises RuntimeError in a worker that imports a
    module which makes a Master at its top level: that belongs under `if __name__ == "__main__":`.
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
        ship: Sequence[str] = (),
    ) -> None:
        check_not_importing()
        specs = [_counted(spec) for spec in resolve(_specs(hosts))]
        limit = arguments.memory_limit_bytes(memory_limit)
        keep = arguments.keep_data_bytes(keep_data)
        options = arguments.options(host_keys, ssh_config, route, address, limit, keep)
        arguments.check_speculation(speculation)
        arguments.check_min_workers(min_workers, specs)
        sources = Sources(arguments.ship(ship))
        self._owner = os.getpid()
        self._sources = sources
        self._engine = Engine(self._sources.lookup, speculation=speculation)
        self._leases = Leases(self._engine.let_go)
        self._fleet = Fleet(options, self._engine)
        self._printer = Printer(echo, self._engine.acknowledge)
        self._supervisor = Supervisor(self._engine, self._fleet, limit, keep)
        self._finisher = _Finisher()
        self._told_of_large_params = False
        self._close = weakref.finalize(
            self, _close, os.getpid(), self._engine, self._fleet, self._printer, self._finisher, self._supervisor
        )
        try:
            self._engine.start(self._printer.put, self._supervisor)
            self._supervisor.start(specs, min_workers)
        except BaseException:
            self._close()
            raise

    def __repr__(self) -> str:
        state = "" if self._close.alive else "closed, "
        hosts = ", ".join(str(host.spec) for host in self._supervisor)
        return f"<Master: {state}{len(self.workers)} worker{'' if len(self.workers) == 1 else 's'} on {hosts}>"

    def __reduce__(self) -> str:
        raise TypeError("a Master cannot be pickled or sent to workers; perhaps a function or params refer to it")

    def __enter__(self) -> Master:  # noqa: PYI034  typing.Self is of python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def workers(self) -> list[RemoteWorker]:
        """All workers, host by host."""
        return [worker for host in self._supervisor for worker in self._workers(host)]

    def _workers(self, host: SupervisedHost) -> list[RemoteWorker]:
        engine, supervisor = self._engine, self._supervisor
        record = engine.dispatch.nodes.get(host.node_name)
        return [
            RemoteWorker(
                host.address,
                index,
                partial(_status_of, engine, supervisor, host, index),
                lambda: engine.ping(host.node_name, PING_TIMEOUT),
            )
            for index in range(0 if record is None else record.workers)
        ]

    @property
    def start_reports(self) -> list[HostReport]:
        """One report for the start of each host, also of hosts that did not start."""
        return list(self._supervisor.reports)

    def add_hosts(self, hosts: Hosts, *, min_workers: int | None = None) -> list[RemoteWorker]:
        """Start workers on more hosts, wait until they are ready, and return them. Rounds may run meanwhile.

        `hosts` and `min_workers` are as for Master; `local` is this machine. Running rounds continue without the new
        workers. Later rounds use them, and send them the slices that they take over.

        Raises ValueError if one of the hosts was added before. Raises BootstrapError if one does not start; then all
        new hosts are removed again.
        """
        self._check_open()
        specs = [_counted(spec) for spec in resolve(_specs(hosts))]
        arguments.check_min_workers(min_workers, specs)
        arguments.check_new_hosts(specs, [host.address for host in self._supervisor])
        try:
            started = self._supervisor.start(specs, min_workers)
        except (OSError, BootstrapError):
            self._check_open()  # it was closed meanwhile
            raise
        return [worker for host in started for worker in self._workers(host)]

    def remove_hosts(self, hosts: Hosts) -> None:
        """Stop all workers of `hosts` and wait until they have ended. Rounds may run meanwhile: the others do the work.

        `hosts` is as for Master; numbers of workers in it are ignored.

        Raises ValueError for an unknown host, and if no host would be left.
        """
        self._check_open()
        known = {host.address: host for host in self._supervisor}
        addresses = arguments.hosts_to_remove(resolve(_specs(hosts)), list(known))
        try:
            self._supervisor.remove([known[address] for address in addresses])
        except OSError:
            self._check_open()  # it was closed meanwhile
            raise

    def stats(self) -> Stats:
        """A copy of the counters so far: rounds, and bytes sent and received."""
        return replace(self._engine.stats)

    def run(self, module: Any, params: Any = None, dataset: Any = None, *, timeout: float | None = None) -> Any:
        """Map `module.mapfunc(params, slice)` over the slices of `dataset` and return the reduced result.

        `module`: a module with `mapfunc(params, slice)` and optionally `reduce(a, b)`, or a function f(params, slice).
        Without `reduce` results are added: numbers, arrays, and lists and tuples of them. (With one slice nothing is
        added, so the result may be anything.) `params`: any value, sent with every call; arrays in it are read-only in
        the workers. `dataset`: a DataSet, list, tuple or array; its slices are sent once and stay on the hosts. None:
        mapfunc(params, None) runs once on each worker. `timeout`: seconds, None for no limit.

        Results are reduced along a tree that depends only on the slices: with a given `slice_size` the result is the
        same to the last bit on any number of workers. Its arrays belong to the caller.

        Raises TaskError (user code raised an exception, which is the `__cause__`), WorkerLost (a slice ended its worker
        process several times), RoundTimeout, MasterClosed, BootstrapError (no host is left), TypeError or ValueError
        for wrong arguments. Ctrl-C cancels the round. The Master can be used after any of these but MasterClosed.
        """
        user_code, pending = self._prepare(module, params, dataset, timeout, None)
        try:
            self._engine.run(pending)
        except BaseException:
            self._engine.cancel(pending)
            raise
        self._printer.flush()
        return _outcome(pending, user_code, self._sources, timeout)

    def submit(
        self, module: Any, params: Any = None, dataset: Any = None, *, timeout: float | None = None
    ) -> Future[Any]:
        """Like `run`, but return a Future at once. Cancelling it cancels the round. `params` are copied."""
        future: Future[Any] = Future()

        def finish(pending: Pending) -> None:
            finisher.put(lambda: _settle(future, pending, user_code, sources, timeout))

        sources, finisher = self._sources, self._finisher  # no reference to self: an unreferenced Master is closed
        user_code, pending = self._prepare(module, params, dataset, timeout, finish)
        buffers = [memoryview(bytes(buffer)) for buffer in pending.params.buffers]
        pending.params = pending.params._replace(buffers=buffers)
        engine = self._engine
        engine.submit(pending)
        running = weakref.ref(pending)  # whoever keeps the future need not keep the data

        def cancel(done: Future[Any]) -> None:
            if done.cancelled() and (still := running()) is not None:
                engine.cancel(still)

        future.add_done_callback(cancel)
        return future

    def close(self) -> None:
        """End running rounds with MasterClosed, stop all workers, remove all files. May be called again."""
        self._close()

    def _check_open(self) -> None:
        if not self._close.alive:
            raise MasterClosed("this Master is closed; make a new one")
        if os.getpid() != self._owner:
            raise MasterClosed(
                f"this Master belongs to process {self._owner}, and this is a fork of it; make a new one here"
            )

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
        if isinstance(params, BaseDataSet):
            raise TypeError(
                f"params is a {type(params).__name__}: the order is run(module, params, dataset); without params write "
                "run(module, None, dataset)"
            )
        user_code = self._sources.user_code(module)
        capacity = max(1, self._engine.dispatch.capacity)
        data: BaseDataSet | None = None
        code_bytes = len(user_code.code or b"")
        if dataset is None:
            spec = JobSpec((user_code.key, capacity), user_code.header, None, capacity, code_bytes=code_bytes)
        else:
            data = DataSet(dataset).bind(capacity)
            refs = _hashes(data)
            if not refs:
                raise ValueError(
                    "dataset has no slices, so there is nothing to map over; with None mapfunc runs once on each worker"
                )
            lease = self._lease(dataset, data, refs)
            key = user_code.key, lease.key
            spec = JobSpec(key, user_code.header, refs, len(refs), data.in_file(), lease, code_bytes)
        try:
            encoded = codec.encode(params, classes=definitions.changed())
        except codec.CodecError as error:
            raise TypeError(f"params cannot be sent to workers: {error}") from error
        if not self._told_of_large_params and sum(map(len, encoded.buffers), len(encoded.header)) > LARGE:
            self._told_of_large_params = True
            say(
                f"params take more than {LARGE // 10**6} MB, which every call sends to every host: what stays the same "
                "is better a DataSet, which is sent once, or a global that a module loads on the workers"
            )
        deadline = None if timeout is None or timeout > NEVER else time.monotonic() + timeout
        return user_code, Pending(spec, user_code.code, encoded, data, deadline, on_end)

    def _lease(self, given: Any, data: BaseDataSet, refs: list[str]) -> Lease:
        """Who holds the data: the data set, or the array that was passed as it is; nobody holds a list."""
        if isinstance(given, (BaseDataSet, np.ndarray)):
            return self._leases.of(given if isinstance(given, np.ndarray) else data, refs, data.size_in_bytes)
        return Lease(tuple(refs), data.size_in_bytes(), held=False)


def _hashes(data: BaseDataSet) -> list[str]:
    if len(data) > MAX_SLICES:
        raise ValueError(f"dataset has {len(data):,} slices; the limit is {MAX_SLICES:,}: make slice_size larger")
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


def _status_of(engine: Engine, supervisor: Supervisor, host: SupervisedHost, index: int) -> WorkerStatus:
    node = engine.dispatch.nodes.get(host.node_name)
    if node is None:  # it was removed
        return WorkerStatus("closed")
    pid = node.pids[index] if index < len(node.pids) else None
    return WorkerStatus(node.state.value, pid, supervisor.route(host))


def _close(
    owner: int, engine: Engine, fleet: Fleet, printer: Printer, finisher: _Finisher, supervisor: Supervisor
) -> None:
    """Close a Master, in a separate thread: Ctrl-C must not interrupt it halfway, and the garbage collector may call
    this in one of the threads that it ends.
    """
    if os.getpid() != owner:
        return  # in a fork of the program: threads and workers belong to the parent

    def close() -> None:
        engine.say_goodbye()
        deadline = time.monotonic() + STOP_TIMEOUT
        for name in supervisor.node_names:
            engine.wait_for_bye(name, max(0.0, deadline - time.monotonic()))
        fleet.close()
        finisher.close()
        engine.stop()
        printer.close()  # last: prints all output that has arrived

    thread = threading.Thread(target=close, name="qjam-close")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down and starts no more threads
        close()
        return
    if not threading.current_thread().name.startswith("qjam-"):
        thread.join()


class _Finisher:
    """Threads that decode and reduce the results of `submit`, because the engine's loop runs no user code.

    Each result has its own thread: a callback of one future may wait for another.
    """

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    def put(self, call: Callable[[], None]) -> None:
        """Make `call` in a new thread."""

        def run() -> None:
            try:
                call()
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="qjam-finish", daemon=True)
        self._threads.add(thread)
        thread.start()

    def close(self) -> None:
        """Wait for the calls to end, STOP_TIMEOUT seconds for each."""
        for thread in list(self._threads):
            thread.join(STOP_TIMEOUT)


def _settle(
    future: Future[Any], pending: Pending, user_code: UserCode, sources: Sources, timeout: float | None
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(_outcome(pending, user_code, sources, timeout))
    except BaseException as error:  # noqa: BLE001  goes to whoever waits for the future
        future.set_exception(error)
    finally:
        del future, pending  # the error's traceback leads to this frame


def _outcome(pending: Pending, user_code: UserCode, sources: Sources, timeout: float | None) -> Any:
    """Return the result of a finished round, or raise its exception."""
    if pending.roots is not None:
        return pending.reduced(user_code.reduce)
    raise _error(pending.take_failure(), sources, timeout)  # in no variable: its traceback leads to this frame


def _error(failure: Failure, sources: Sources, timeout: float | None) -> BaseException:
    error = _EXCEPTIONS[failure.what](failure, timeout)
    cause = error.__cause__
    if isinstance(cause, ImportError):
        sources.forget()
    if isinstance(error, TaskError) and isinstance(cause, ModuleNotFoundError) and error.host != LOCAL:
        error.what += sources.hint(cause.name or "")
    return error


def _task_error(failure: Failure, timeout: float | None) -> BaseException:
    error = TaskError(failure.host, failure.worker, failure.slice, failure.text, failure.summary)
    if failure.error is not None:
        try:
            error.__cause__ = codec.decode(failure.error, [], copy=True)
        except Exception:  # noqa: BLE001, S110  its class cannot be imported here; the text remains
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
