"""Master: a pool of workers on one or more hosts. Its `run` maps a function over data and reduces the results."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from qjam_worker.importing import check_not_importing
from qjam_worker.ipc.cores import usable_cores
from qjam_worker.values import codec, definitions
from qjam_worker.wire.messages import MAX_SLICES
from qjam_worker.worker.application import applied

from . import arguments, serial
from .calls import Caller, Center
from .closing import close
from .code.user_code import LARGE, Sources, UserCode
from .data.datasets import BaseDataSet, DataSet
from .data.leases import Lease, Leases
from .dispatch.jobs import JobSpec
from .dispatch.rounds import RoundSpec
from .engine.engine import Engine
from .engine.pending import Pending
from .engine.printer import Printer
from .errors import BootstrapError, MasterClosed
from .hosts import SERIAL, HostSpec
from .launch.fleet import Fleet
from .launch.supervisor import SupervisedHost, Supervisor
from .log import say
from .outcome import Finisher, outcome, settle
from .remote_worker import RemoteWorker, WorkerStatus
from .report import HostReport
from .stats import Stats

NEVER = 1e9  # seconds; a longer timeout is no timeout
PING_TIMEOUT = 5.0
MAP_SLICES = 8  # for each worker: `map` cannot know how uneven its items are

Hosts = int | str | HostSpec | RemoteWorker | Iterable[str | HostSpec | RemoteWorker] | None


class Master:
    """Workers on `hosts`. They start now, and stop at `close`, at the end of a `with` block, or when the program ends.

    `hosts`: None (one worker per usable core of this machine), a number of workers on this machine, a text such as
    "alice@node1:2222*8" or "local*4", or a list of texts, HostSpecs and RemoteWorkers. If a host is named again, its
    workers add up. All hosts but `local` are reached by ssh, with the keys and the configuration that `ssh` would use;
    they need only python 3.9 or newer. "serial" is the calling process: no worker is started, and user code runs where
    `run` is called, so that breakpoint(), pdb and profilers work. Slices and the order of adding are those of Master(),
    and so is the result, to the last bit.
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
        specs = arguments.counted(arguments.specs(hosts))
        limit = arguments.memory_limit_bytes(memory_limit)
        keep = arguments.keep_data_bytes(keep_data)
        options = arguments.options(host_keys, ssh_config, route, address, limit, keep)
        arguments.check_speculation(speculation)
        arguments.check_min_workers(min_workers, specs)
        self._sources = Sources(arguments.ship(ship))
        self._owner = os.getpid()
        self._serial = specs[0].serial
        self._engine = Engine(self._sources.lookup, speculation=speculation)
        self._leases = Leases(self._engine.let_go)
        self._fleet = Fleet(options, self._engine)
        self._printer = Printer(echo, self._engine.acknowledge)
        self._supervisor = Supervisor(self._engine, self._fleet, limit, keep)
        self._finisher = Finisher()
        self._center = Center(self._engine)
        self._told_of_large_params = False
        self._close = weakref.finalize(
            self,
            close,
            os.getpid(),
            self._engine,
            self._fleet,
            self._printer,
            self._finisher,
            self._center,
            self._supervisor,
        )
        try:
            self._engine.start(self._printer.put, self._supervisor)
            self._supervisor.start([] if self._serial else specs, min_workers)
        except BaseException:
            self._close()
            raise

    def __repr__(self) -> str:
        state = "" if self._close.alive else "closed, "
        hosts = ", ".join([SERIAL] if self._serial else [str(host.spec) for host in self._supervisor])
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
        if self._serial:
            return [RemoteWorker(SERIAL, 0, self._status_of_serial, lambda: 0.0)]
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

    def _status_of_serial(self) -> WorkerStatus:
        return WorkerStatus("ready" if self._close.alive else "closed", self._owner, SERIAL)

    @property
    def _capacity(self) -> int:
        """The number of workers, as far as it decides how data is cut: a serial Master cuts it as Master() would."""
        return usable_cores() if self._serial else max(1, self._engine.dispatch.capacity)

    @property
    def start_reports(self) -> list[HostReport]:
        """One report for the start of each host, also of hosts that did not start."""
        return [HostReport(SERIAL, route=SERIAL)] if self._serial else list(self._supervisor.reports)

    def add_hosts(self, hosts: Hosts, *, min_workers: int | None = None) -> list[RemoteWorker]:
        """Start workers on more hosts, wait until they are ready, and return them. Rounds may run meanwhile.

        `hosts` and `min_workers` are as for Master; `local` is this machine. Running rounds continue without the new
        workers. Later rounds use them, and send them the slices that they take over.

        Raises ValueError if one of the hosts was added before. Raises BootstrapError if one does not start; then all
        new hosts are removed again.
        """
        self._check_open(with_hosts=True)
        specs = arguments.counted(arguments.specs(hosts))
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
        self._check_open(with_hosts=True)
        known = {host.address: host for host in self._supervisor}
        addresses = arguments.hosts_to_remove(arguments.specs(hosts), list(known))
        try:
            self._supervisor.remove([known[address] for address in addresses])
        except OSError:
            self._check_open()  # it was closed meanwhile
            raise

    def stats(self) -> Stats:
        """A copy of the counters so far: rounds, and bytes sent and received."""
        return replace(self._engine.stats)

    def run(
        self,
        module: Any,
        params: Any = None,
        dataset: Any = None,
        *,
        reduce: Callable[[Any, Any], Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Map `module.mapfunc(params, slice)` over the slices of `dataset`, ADD UP the results and return the sum.

        For a list of the results use `collect`; for one call an item use `map`.

        `module`: a module with `mapfunc(params, slice)` and optionally `reduce(a, b)`, or a function f(params, slice).
        `params`: any value, sent with every call; arrays in it are read-only in the workers. `dataset`: a DataSet,
        list, tuple or array; its slices are sent once and stay on the hosts. None: mapfunc(params, None) runs once on
        each worker. `reduce`: a function reduce(a, b) of two results, called in place of the module's own and of the
        sum. `timeout`: seconds, None for no limit.

        Without any `reduce` numbers and arrays of one shape are added with +, lists and tuples of one length element by
        element, and objects of other classes (Counter, Fraction, timedelta, those of pandas and scipy.sparse, your own)
        with their own +. Bools are counted, as in Python's sum(): ints come back, also for one slice; numpy's bools and
        arrays of them become int64. numpy's other numbers keep their dtype: small integers wrap around, uint8 at 256,
        so return them as int64. Python's ints have no limit. None, text, bytes and dicts are not added: TaskError.

        Results are reduced along a tree that depends only on the slices: with a given `slice_size` the result is the
        same to the last bit on any number of workers. Its arrays belong to the caller.

        Raises TaskError (user code raised an exception, which is the `__cause__`), WorkerLost (a slice ended its worker
        process several times), RoundTimeout, MasterClosed, BootstrapError (no host is left), TypeError or ValueError
        for wrong arguments. Ctrl-C cancels the round. The Master can be used after any of these but MasterClosed.
        """
        arguments.check_order("run", params)
        arguments.check_reduce(reduce)
        return self._carry_out(module, params, dataset, self._sources.user_code(module, reduce), timeout)

    def collect(
        self, module: Any, params: Any = None, dataset: Any = None, *, timeout: float | None = None
    ) -> list[Any]:
        """Map `module.mapfunc(params, slice)` over the slices of `dataset` and return the list of the results.

        There is one result for each slice, in order (without a data set one for each worker), and nothing is added:
        they may be anything that can be sent, None too. A `reduce` of the module is not called. Arguments, exceptions
        and what becomes of arrays are as for `run`.
        """
        arguments.check_order("collect", params)
        user_code = self._sources.user_code(module).collecting()
        results: list[Any] = self._carry_out(module, params, dataset, user_code, timeout)
        return results

    def map(
        self, function: Callable[..., Any], *iterables: Any, chunksize: int | None = None, timeout: float | None = None
    ) -> Iterator[Any]:
        """Call `function(item)` for each item in the workers; return an iterator over the results, in order.

        With several iterables it is `function(a, b)`, up to the end of the shortest, as for the builtin map. Items are
        sent in slices of `chunksize`, of which a worker takes one at a time; None: 8 slices for each worker, so that
        uneven items spread. `map` returns when all results are here. `timeout`: seconds for all of them, None for no
        limit.

        Raises what `run` raises, a TaskError with the index of the item that failed. As there, an item may be called a
        second time where its worker is late or lost.
        """
        self._check_open()
        items = arguments.items_of_map(function, iterables, chunksize)
        arguments.check_timeout(timeout)
        if not items:
            return iter(())
        size = int(chunksize or -(-len(items) // (MAP_SLICES * self._capacity)))
        user_code = self._sources.user_code(function).collecting(size)
        data = DataSet(items, slice_size=size)
        return iter(self._carry_out(function, len(iterables) > 1, data, user_code, timeout))

    def submit(
        self,
        module: Any,
        params: Any = None,
        dataset: Any = None,
        *,
        reduce: Callable[[Any, Any], Any] | None = None,
        timeout: float | None = None,
    ) -> Future[Any]:
        """Like `run`, but return a Future at once. Cancelling it cancels the round. `params` are copied."""
        future: Future[Any] = Future()

        def finish(pending: Pending) -> None:
            finisher.put(lambda: settle(future, pending, user_code, sources, timeout))

        sources, finisher = self._sources, self._finisher  # no reference to self: an unreferenced Master is closed
        arguments.check_order("run", params)
        arguments.check_reduce(reduce)
        user_code = self._sources.user_code(module, reduce)
        pending = self._prepare(user_code, params, dataset, timeout, finish)
        if self._serial:
            self._carry_out_here(pending, module, user_code)
            return future
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

    def executor(
        self,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_pending: int | None = None,
    ) -> Executor:
        """Return a qjam.Executor that shares these workers, for calls that are independent of each other.

            with master.executor() as executor:
                print(executor.submit(pow, 2, 8).result())

        Its shutdown leaves this Master open. Rounds and calls take turns. Raises MasterClosed and what Executor raises.
        """
        kind: Callable[..., Executor] = import_module("qjam.executor").Executor  # which imports this module
        return kind(master=self, initializer=initializer, initargs=initargs, max_pending=max_pending)

    def _caller(
        self, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()
    ) -> Caller | serial.Caller:
        """A submitter of calls to these workers, with a function that prepares each process for them."""
        self._check_open()
        if self._serial:
            return serial.Caller(initializer, initargs)
        return Caller(self._center, self._sources, initializer, initargs)

    def _carry_out(self, module: Any, params: Any, dataset: Any, user_code: UserCode, timeout: float | None) -> Any:
        """Run a round to its end and return its result."""
        pending = self._prepare(user_code, params, dataset, timeout)
        if self._serial:
            self._carry_out_here(pending, module, user_code)
        else:
            try:
                self._engine.run(pending)
            except BaseException:
                self._engine.cancel(pending)
                raise
            self._printer.flush()
        return outcome(pending, user_code, self._sources, timeout)

    def _carry_out_here(self, pending: Pending, module: Any, user_code: UserCode) -> None:
        mapfunc = module.mapfunc if isinstance(module, ModuleType) else module
        serial.carry_out(pending, applied(mapfunc, user_code.reduce, user_code.header), self._engine.stats)

    def close(self) -> None:
        """End running rounds with MasterClosed, stop all workers, remove all files. May be called again."""
        self._close()

    def _check_open(self, *, with_hosts: bool = False) -> None:
        if not self._close.alive:
            raise MasterClosed("this Master is closed; make a new one")
        if os.getpid() != self._owner:
            raise MasterClosed(
                f"this Master belongs to process {self._owner}, and this is a fork of it; make a new one here"
            )
        if with_hosts and self._serial:
            raise ValueError("hosts: this Master runs everything in the calling process; make a new one with hosts")

    def _prepare(
        self,
        user_code: UserCode,
        params: Any,
        dataset: Any,
        timeout: float | None,
        on_end: Callable[[Pending], None] | None = None,
    ) -> Pending:
        self._check_open()
        arguments.check_timeout(timeout)
        data: BaseDataSet | None = None
        job = JobSpec(user_code.key, user_code.header, len(user_code.code or b""))
        if dataset is None:
            spec = RoundSpec(job, self._capacity)
        else:
            data = DataSet(dataset).bind(self._capacity)
            refs = _hashes(data)
            if not refs:
                raise ValueError(
                    "dataset has no slices, so there is nothing to map over; with None mapfunc runs once on each worker"
                )
            spec = RoundSpec(job, len(refs), self._lease(dataset, data, refs), data.in_file())
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
        return Pending(spec, user_code.code, encoded, data, deadline, on_end)

    def _lease(self, given: Any, data: BaseDataSet, refs: list[str]) -> Lease:
        """Who holds the data: the data set, or the array that was passed as it is; nobody holds a list."""
        if isinstance(given, (BaseDataSet, np.ndarray)):
            return self._leases.of(given if isinstance(given, np.ndarray) else data, refs, data.size_in_bytes)
        return Lease(tuple(refs), data.size_in_bytes(), held=False)


def _hashes(data: BaseDataSet) -> list[str]:
    if len(data) > MAX_SLICES:
        raise ValueError(
            f"dataset has {len(data):,} slices; the limit is {MAX_SLICES:,}: make slice_size (chunksize of map) larger"
        )
    try:
        return data.hash_list()
    except codec.CodecError as error:
        raise TypeError(f"dataset: a slice cannot be sent to workers: {error}") from error


def _status_of(engine: Engine, supervisor: Supervisor, host: SupervisedHost, index: int) -> WorkerStatus:
    node = engine.dispatch.nodes.get(host.node_name)
    if node is None:  # it was removed
        return WorkerStatus("closed")
    pid = node.pids[index] if index < len(node.pids) else None
    return WorkerStatus(node.state.value, pid, supervisor.route(host))
