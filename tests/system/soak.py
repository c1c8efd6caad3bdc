"""Rounds without end while workers, nodes, connections and links fail: `python -m tests.system.soak --minutes 10`.

This machine and three ssh hosts in network namespaces, one for each way back. Each result is compared bit for bit with
the serial one; each fault is followed until all workers are there again. Needs root, sshd, ip and nft.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import soak_code
from faults import fork_server_of, host_processes, node_of, send, sessions_of
from namespaces import Namespace, namespace, namespaces_work
from qjam import DataSet, Master
from qjam_worker.values.reduction import Tree, default_reduce
from sshd import Sshd, private_sshd, sshd_works, write_config

WORKERS = 2  # of each host
HANG = 180.0  # seconds without a result after which all stacks are shown, and the program ends
PATIENCE = 120.0  # seconds for all workers to be there again


class Host:
    """One ssh host in a network of its own."""

    def __init__(self, sshd: Sshd, network: Namespace) -> None:
        self.sshd = sshd
        self.network = network

    @property
    def node(self) -> int | None:
        return node_of(self.sshd)


class Soak:
    """The master, its hosts, and what was seen."""

    def __init__(self, master: Master, hosts: list[Host], rng: random.Random) -> None:
        self.master = master
        self.hosts = hosts
        self.rng = rng
        self.faults: Counter[str] = Counter()
        self.recoveries: list[tuple[float, str]] = []
        self.results = 0
        self.under_way: tuple[str, float] | None = None  # a fault, and when it happened
        self.undo: set[threading.Timer] = set()  # ends of faults
        data = np.random.default_rng(1).standard_normal((37, 1000)) * np.logspace(-8, 8, 1000)
        self.slices = [data[i : i + 1] for i in range(len(data))]
        self.data = DataSet(data, slice_size=1)
        self.serial: dict[int, bytes] = {}
        self.next_fault = 0.0
        self.kinds: dict[str, Callable[[], bool]] = {
            "worker killed": lambda: send(self._a_worker(), signal.SIGKILL),
            "several workers killed": lambda: _each(send, [(self._a_worker(), signal.SIGKILL) for _ in range(3)]),
            "worker stopped": self._stop_worker,
            "node killed": lambda: send(self._host().node, signal.SIGKILL),
            "fork server killed": lambda: self._kill_fork_server(),
            "sshd session killed": lambda: _each(
                send, [(pid, signal.SIGKILL) for pid in sessions_of(self._host().sshd)]
            ),
            "host process killed": lambda: (
                bool(host_processes()) and send(self.rng.choice(host_processes()), signal.SIGKILL)
            ),
            "node stopped for 3 s": lambda: self._stop_node(3.0),
            "node stopped for 40 s": lambda: self._stop_node(40.0),
            "link down for 3 s": lambda: self._cut(3.0),
            "link down for 30 s": lambda: self._cut(30.0),
            "packets lost for 3 s": lambda: self._blackhole(3.0),
            "packets lost for 30 s": lambda: self._blackhole(30.0),
            "host removed and added": self._remove,
            "two hosts at once": lambda: _each(send, [(host.node, signal.SIGKILL) for host in self.hosts[:2]]),
        }

    def _host(self) -> Host:
        return self.rng.choice(self.hosts)

    def _a_worker(self) -> int | None:
        return self.rng.choice([worker.pid for worker in self.master.workers])

    def _later(self, delay: float, call: Callable[[], Any]) -> bool:
        def undo() -> None:
            call()
            self.undo.discard(timer)

        timer = threading.Timer(delay, undo)
        self.undo.add(timer)
        timer.start()
        return True

    def _stop_worker(self) -> bool:
        pid = self._a_worker()
        return send(pid, signal.SIGSTOP) and self._later(2.0, lambda: send(pid, signal.SIGCONT))

    def _kill_fork_server(self) -> bool:
        node = self._host().node
        return node is not None and send(fork_server_of(node), signal.SIGKILL)

    def _stop_node(self, seconds: float) -> bool:
        pid = self._host().node
        return send(pid, signal.SIGSTOP) and self._later(seconds, lambda: send(pid, signal.SIGCONT))

    def _cut(self, seconds: float) -> bool:
        host = self._host()
        host.network.cut()
        return self._later(seconds, host.network.mend)

    def _blackhole(self, seconds: float) -> bool:
        host = self._host()
        host.network.blackhole()
        return self._later(seconds, host.network.unblackhole)

    def _remove(self) -> bool:
        name = self._host().sshd.name
        self.master.remove_hosts(name)
        self._later(0.5, lambda: self.master.add_hosts(f"{name}*{WORKERS}"))
        return True

    # The loop

    def run(self, seconds: float) -> None:
        """Rounds and faults for so long, and then until all is well again."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or self.under_way is not None or self.undo:
            faulthandler.dump_traceback_later(HANG, exit=True)
            self._round()
            now = time.monotonic()
            self._follow(now)
            if now < end and self.under_way is None and now >= self.next_fault:
                self._fault(now)
        faulthandler.cancel_dump_traceback_later()

    def _round(self) -> None:
        params = self.rng.randrange(12)
        pause = self.rng.choice([0.0, 0.0, 0.001, 0.01])
        got = self.master.run(soak_code, (params, pause), self.data)
        if params not in self.serial:
            tree = Tree(len(self.slices))
            for index, part in enumerate(self.slices):
                tree.add((index, index + 1), soak_code.mapfunc((params, 0.0), part))
            tree.fold(default_reduce)
            self.serial[params] = tree.values[0, len(self.slices)].tobytes()
        assert got.tobytes() == self.serial[params], "a result is not the serial one"
        self.results += 1

    def _fault(self, now: float) -> None:
        kind = self.rng.choice(list(self.kinds))
        if self.kinds[kind]():
            self.faults[kind] += 1
            self.under_way = kind, now
            print(f"{time.strftime('%X')} {kind}", flush=True)

    def _follow(self, now: float) -> None:
        """Whether all workers are there again."""
        if self.under_way is None or self.undo:
            return
        kind, since = self.under_way
        states = [worker.state for worker in self.master.workers]
        if now > since + 0.3 and states.count("ready") == WORKERS * (len(self.hosts) + 1):
            self.recoveries.append((now - since, kind))
            self.under_way = None
            self.next_fault = now + self.rng.uniform(0.0, 0.5)
        elif now > since + PATIENCE:
            raise AssertionError(f"after {kind} not all workers came back within {PATIENCE:.0f} s: {states}")


def _each(call: Callable[..., bool], arguments: list[tuple[Any, ...]]) -> bool:
    """Make all calls; whether any was true."""
    return sum(call(*each) for each in arguments) > 0


def soak(seconds: float, seed: int, folder: Path) -> Soak:
    """Start the hosts, run, and stop them."""
    with contextlib.ExitStack() as stack:
        home = folder / "home"
        hosts = []
        for name, incoming, options in (
            ("direct", "open", {}),
            ("tunnel", "reject", {}),
            ("stdio", "reject", {"AllowTcpForwarding": "no"}),
        ):
            network = stack.enter_context(namespace(incoming=incoming))  # type: ignore[arg-type]
            sshd = stack.enter_context(
                private_sshd(
                    folder, name=name, address=network.host, namespace=network.name, options=options, home=home
                )
            )
            hosts.append(Host(sshd, network))
        config = write_config(folder / "config", [host.sshd for host in hosts])
        names = [f"local*{WORKERS}", *(f"{host.sshd.name}*{WORKERS}" for host in hosts)]
        with Master(names, ssh_config=config) as master:
            assert [worker.route for worker in master.workers[2::2]] == ["direct", "tunnel", "stdio"]
            run = Soak(master, hosts, random.Random(seed))
            run.run(seconds)
            print(master.stats())
        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    if lacking := sshd_works() or namespaces_work():
        sys.exit(lacking)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="qjam-soak-") as folder:
        run = soak(60.0 * arguments.minutes, arguments.seed, Path(folder))
    print(f"{run.results} results, all equal to the serial ones bit for bit; {sum(run.faults.values())} faults:")
    for kind, count in run.faults.most_common():
        times = sorted(took for took, what in run.recoveries if what == kind)
        print(
            f"  {count:4} {kind:26} all workers back after {times[len(times) // 2]:6.2f} s, at most {times[-1]:6.2f} s"
        )


if __name__ == "__main__":
    main()
