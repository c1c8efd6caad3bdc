"""The hosts of a master: started, started again when they are lost, let go. Time is the test's, hosts are made up.

The last tests are about this machine's node, with its processes.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from processes import all_end, descendants, parent
from qjam import BootstrapError, HostReport, HostSpec, Master
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.states import NodeState
from qjam.engine import call_queue as call_queue_module
from qjam.engine import carrying_out, inbox, loop
from qjam.engine.engine import Engine
from qjam.launch import supervisor as supervisor_module
from qjam.launch.supervisor import FIRST_PAUSE, MAX_PAUSE, RESTARTS, START_TIMEOUT, STEADY, SupervisedHost, Supervisor
from qjam.log import say

EVER = 1e6  # seconds


class Stage:
    """A Supervisor with an engine whose loop is the test. `comes`: whether a node that is launched is ready at once;
    `reached`: whether a host that is launched over ssh is told to begin.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.comes = self.reached = True
        self.launched: list[str] = []  # the names of nodes
        self.welcomes: dict[str, float] = {}
        self.reports: dict[str, HostReport] = {}
        self.disconnected: list[str] = []
        self.forgotten: list[str] = []
        self.engine = Engine(lambda name: b"")
        fleet: Any = SimpleNamespace(
            start=self.start_remote,
            disconnect=self.disconnected.append,
            forget=self.forgotten.append,
            report=self.reports.__getitem__,
            welcomed_at=self.welcomes.get,
        )
        self.supervisor = Supervisor(self.engine, fleet, None)
        self.engine._carrier.observer = self.supervisor
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=time.perf_counter)
        patch.setattr(supervisor_module, "time", clock)
        for module in (carrying_out, inbox, loop):
            patch.setattr(module, "time", clock)
        patch.setattr(call_queue_module, "time", clock)
        patch.setattr(self.engine, "add_local", lambda name, make: self.launch(name))
        patch.setattr(self.engine, "ask", lambda call: call())
        patch.setattr(self.engine, "wait_for_node", self.wait_for_node)
        patch.setattr(self.engine, "wait_for_bye", lambda name, timeout: True)
        patch.setattr(self.engine._router, "send", lambda name, frames: True)

    def start_remote(self, hosts: Mapping[str, tuple[HostSpec, Mapping[str, str]]]) -> None:
        for name, (spec, keys) in hosts.items():
            assert set(keys) == {"server", "public", "secret"}
            self.reports[name] = HostReport(spec.address, route="direct")
            if self.reached:
                self.welcomes[name] = self.now
            self.launch(name)

    def launch(self, name: str) -> None:
        self.launched.append(name)
        if self.comes:
            self.come(name)

    def come(self, name: str) -> None:
        """The node connects and has its workers."""
        workers = list(range(self.engine.dispatch.nodes[name].workers))
        self.engine._carrier.act(self.engine.dispatch.on_hello(name, {"workers": len(workers), "credit": 1}))
        self.engine._carrier.act(self.engine._inbox._on_ready(name, {"workers": workers}))

    def lose(self, name: str, why: str = "killed") -> None:
        self.engine.lose_node(name, why)
        self.turn()

    def turn(self) -> None:
        """What other threads have asked the loop for."""
        while self.engine._calls.posted:
            self.engine._calls.posted.popleft()()

    def wait_for_node(self, name: str, timeout: float) -> tuple[NodeState, str]:
        if name in self.engine._peers and not self.engine._peers[name].changed.is_set():
            self.pass_time(timeout)
        return Engine.wait_for_node(self.engine, name, 0.0)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and have done what is due meanwhile."""
        until = self.now + seconds
        while self.engine._calls.timers and self.engine._calls.timers[0][0] <= until:
            self.now = max(self.now, self.engine._calls.timers[0][0])
            self.engine._loop._on_time(self.now)
            self.turn()
        self.now = until

    def start(self, *hosts: str, min_workers: int | None = None) -> list[SupervisedHost]:
        return self.supervisor.start([HostSpec(host) for host in hosts], min_workers)

    @property
    def states(self) -> dict[str, str]:
        """By host: the state of its node."""
        return {
            supervised.address: self.engine.dispatch.nodes[supervised.node_name].state.value
            for supervised in self.supervisor
        }


@pytest.fixture
def stage() -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        made = Stage(patch)
        yield made
    made.engine._calls.timers.clear()
    made.engine._carrier.observer = None
    made.engine.start(lambda *printed: None)
    made.engine.stop()


def names(hosts: list[SupervisedHost]) -> list[str]:
    return [supervised.node_name for supervised in hosts]


def pauses(caplog: pytest.LogCaptureFixture) -> list[float]:
    """Those that were announced before starts."""
    return [float(found) for found in re.findall(r"started again in (\d+\.\d) s", caplog.text)]


# ---- the first start ------------------------------------------------------------------------------------------


def test_hosts_that_come_are_members_with_a_report_each(stage: Stage) -> None:
    came = stage.start("local", "there")
    assert [supervised.address for supervised in came] == ["local", "there"]
    assert stage.supervisor.node_names == names(came) == stage.launched
    assert [(report.host, report.route) for report in stage.supervisor.reports] == [
        ("local", "local"),
        ("there", "direct"),
    ]
    assert all("ready" in report.phases for report in stage.supervisor.reports)
    assert [stage.supervisor.route(supervised) for supervised in came] == ["local", "direct"]
    assert len(stage.supervisor) == 2


def test_a_host_that_does_not_come_in_time_does_not_stay(stage: Stage) -> None:
    stage.comes = False
    for host in ("local", "there"):
        with pytest.raises(BootstrapError, match=f"{host}: ready: not ready after {START_TIMEOUT:.0f} s") as caught:
            stage.start(host)
        assert [report.failed for report in caught.value.hosts] == ["ready"]
        assert len(stage.supervisor) == 0
        assert stage.engine.dispatch.nodes == {}
    assert set(stage.launched) <= set(stage.disconnected) & set(stage.forgotten)
    stage.pass_time(EVER)
    assert len(stage.launched) == 2


def test_a_host_has_as_long_as_its_phases_take_and_then_a_minute_to_be_ready(stage: Stage) -> None:
    stage.comes = stage.reached = False

    def welcome() -> None:
        stage.welcomes[stage.launched[0]] = stage.now

    stage.engine.call_later(1000.0, welcome)
    stage.engine.call_later(1000.0 + START_TIMEOUT - 2.0, lambda: stage.come(stage.launched[0]))
    (supervised,) = stage.start("there")
    assert stage.states == {"there": "ready"}
    assert stage.supervisor.reports[0].phases["ready"] == START_TIMEOUT - 2.0
    assert not supervised.starting


def test_a_host_that_is_lost_while_it_starts_is_not_started_again(stage: Stage) -> None:
    stage.comes = False
    stage.engine.call_later(5.0, lambda: stage.lose(stage.launched[0], "its disk is full"))
    with pytest.raises(BootstrapError, match="there: ready: its disk is full"):
        stage.start("there")
    stage.pass_time(EVER)
    assert len(stage.launched) == 1
    assert len(stage.supervisor) == 0


def test_a_host_that_is_lost_while_others_are_waited_for_has_not_come(stage: Stage) -> None:
    stage.comes = False
    first = "there"
    stage.engine.call_later(1.0, lambda: stage.come(stage.launched[0]))
    stage.engine.call_later(5.0, lambda: stage.lose(stage.launched[0], "its disk is full"))
    stage.engine.call_later(9.0, lambda: stage.come(stage.launched[1]))
    with pytest.raises(BootstrapError, match="1 of 2 hosts did not start") as caught:
        stage.start(first, "elsewhere")
    assert [(report.failed, report.why) for report in caught.value.hosts] == [("ready", "its disk is full"), (None, "")]
    assert len(stage.supervisor) == 0


def test_with_enough_workers_those_that_came_stay_and_the_others_go(stage: Stage, caplog: Any) -> None:
    stage.comes = False
    stage.engine.call_later(1.0, lambda: stage.come(stage.launched[0]))
    came = stage.start("there", "elsewhere", min_workers=1)
    assert [supervised.address for supervised in came] == ["there"]
    assert stage.states == {"there": "ready"}
    assert "1 of 2 hosts did not start; going on with 1 workers" in caplog.text
    assert [report.failed for report in stage.supervisor.reports] == [None, "ready"]
    assert stage.launched[1] in stage.forgotten


def test_hosts_that_come_later_join_the_others(stage: Stage) -> None:
    first = stage.start("local")
    second = stage.start("there")
    assert stage.supervisor.node_names == names([*first, *second])
    stage.comes = False
    with pytest.raises(BootstrapError):
        stage.start("nowhere")
    assert stage.states == {"local": "ready", "there": "ready"}
    assert [report.host for report in stage.supervisor.reports] == ["local", "there", "nowhere"]


def test_what_is_raised_while_hosts_start_leaves_none(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str, timeout: float) -> tuple[NodeState, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.engine, "wait_for_node", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.start("local", "there")
    assert len(stage.supervisor) == 0
    assert stage.engine.dispatch.nodes == {}


# ---- started again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["local", "there"])
def test_a_lost_host_is_started_again_after_a_pause_as_another_node(stage: Stage, host: str, caplog: Any) -> None:
    (supervised,) = stage.start(host)
    (old,) = stage.launched
    stage.lose(old, "killed")
    assert stage.states == {host: "starting"}
    assert supervised.node_name != old
    (lost,) = caplog.messages
    assert lost.startswith(f"{host} is lost: killed; its work goes to the others, and it is started again in ")
    assert lost.endswith(f" {FIRST_PAUSE:.1f} s (1 of {RESTARTS})")
    stage.pass_time(FIRST_PAUSE - 0.01)
    assert stage.launched == [old]
    stage.pass_time(0.02)
    assert stage.launched == [old, supervised.node_name]
    assert stage.states == {host: "ready"}
    assert old in stage.disconnected
    assert old in stage.forgotten
    assert caplog.messages[1] == f"{host} is back after {FIRST_PAUSE:.1f} s, with 1 workers"
    assert supervised.node_name.startswith(f"{host}/")


def test_a_host_keeps_its_place_among_the_others_and_its_workers(stage: Stage) -> None:
    stage.supervisor.start([HostSpec("local", workers=3), HostSpec("there", workers=2)], None)
    stage.lose(stage.launched[0])
    assert [supervised.address for supervised in stage.supervisor] == ["local", "there"]
    stage.pass_time(FIRST_PAUSE)
    assert [stage.engine.dispatch.nodes[name].workers for name in stage.supervisor.node_names] == [3, 2]


def test_a_lost_node_may_not_connect_any_more(stage: Stage) -> None:
    stage.start("there")
    (old,) = stage.launched
    assert old in stage.engine._router.admission._names.values()
    stage.lose(old)
    assert old not in stage.engine._router.admission._names.values()
    stage.pass_time(FIRST_PAUSE)
    assert stage.supervisor.node_names[0] in stage.engine._router.admission._names.values()


def test_a_node_is_lost_once_whoever_tells(stage: Stage, caplog: Any) -> None:
    stage.start("there")
    (old,) = stage.launched
    for why in ("its connection is gone", "its ssh session has ended", "killed"):
        stage.lose(old, why)
    stage.pass_time(EVER)
    assert len(stage.launched) == 2
    assert len(pauses(caplog)) == 1


def test_hosts_are_started_again_each_by_itself(stage: Stage) -> None:
    stage.start("local", "there")
    stage.lose(stage.launched[0])
    stage.pass_time(FIRST_PAUSE / 2)
    stage.lose(stage.launched[1])
    stage.pass_time(FIRST_PAUSE / 2)
    assert stage.states == {"local": "ready", "there": "starting"}
    stage.pass_time(FIRST_PAUSE / 2)
    assert stage.states == {"local": "ready", "there": "ready"}


def test_the_pause_doubles_up_to_a_limit_and_after_so_many_starts_the_host_is_given_up(
    stage: Stage, caplog: Any
) -> None:
    stage.start("there")
    stage.comes = False
    stage.lose(stage.launched[0])
    for number in range(1, RESTARTS + 1):
        stage.pass_time(MAX_PAUSE)
        assert len(stage.launched) == number + 1
        stage.lose(stage.launched[-1], f"no route, {number}")
    expected = [min(FIRST_PAUSE * 2**number, MAX_PAUSE) for number in range(RESTARTS)]
    assert pauses(caplog) == expected
    assert re.search(rf"there is lost.*: no route, {RESTARTS}", caplog.messages[-1])
    assert "started again in" not in caplog.messages[-1]
    stage.pass_time(EVER)
    assert len(stage.launched) == RESTARTS + 1
    assert stage.states == {"there": "lost"}
    assert stage.engine.dispatch.nodes[stage.supervisor.node_names[0]].why == f"no route, {RESTARTS}"


def test_a_host_that_is_soon_lost_again_is_started_less_and_less_often(stage: Stage, caplog: Any) -> None:
    stage.start("there")
    for _ in range(3):
        stage.lose(stage.launched[-1])
        stage.pass_time(STEADY)
        assert stage.states == {"there": "ready"}
    assert pauses(caplog) == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]


def test_a_host_that_was_there_for_long_begins_anew(stage: Stage, caplog: Any) -> None:
    stage.start("there")
    for _ in range(2 * RESTARTS):
        stage.lose(stage.launched[-1])
        stage.pass_time(FIRST_PAUSE + STEADY + 1.0)
        assert stage.states == {"there": "ready"}
    assert pauses(caplog) == [FIRST_PAUSE] * (2 * RESTARTS)


def test_how_long_a_host_was_away_counts_from_when_it_was_lost_first(stage: Stage, caplog: Any) -> None:
    stage.start("there")
    stage.comes = False
    stage.lose(stage.launched[-1])
    stage.pass_time(10.0)
    stage.lose(stage.launched[-1])
    stage.comes = True
    stage.pass_time(10.0)
    away = 10.0 + 2 * FIRST_PAUSE
    assert caplog.messages[-1] == f"there is back after {away:.1f} s, with 1 workers"


def test_a_start_of_this_machine_that_is_never_ready_is_given_up(stage: Stage, caplog: Any) -> None:
    stage.start("local")
    stage.comes = False
    stage.lose(stage.launched[0])
    stage.pass_time(FIRST_PAUSE + START_TIMEOUT)
    assert len(caplog.messages) == 1
    stage.comes = True
    stage.pass_time(START_TIMEOUT / 5 + 2 * FIRST_PAUSE)
    assert f"local is lost: not ready after {START_TIMEOUT:.0f} s; " in caplog.messages[1]
    assert stage.states == {"local": "ready"}


def test_a_start_over_ssh_has_a_minute_to_be_ready_from_the_welcome_on(stage: Stage, caplog: Any) -> None:
    stage.start("there")
    stage.comes = stage.reached = False
    stage.lose(stage.launched[0])
    stage.pass_time(1000.0)  # the limits of the phases are the fleet's
    assert len(caplog.messages) == 1
    stage.welcomes[stage.launched[1]] = stage.now
    stage.pass_time(START_TIMEOUT)
    assert len(caplog.messages) == 1
    stage.pass_time(START_TIMEOUT / 5)
    assert f"not ready after {START_TIMEOUT:.0f} s; " in caplog.messages[1]


def test_nobody_watches_a_host_that_is_ready(stage: Stage) -> None:
    stage.start("local", "there")
    for name in list(stage.launched):
        stage.lose(name)
    stage.pass_time(EVER)
    assert stage.states == {"local": "ready", "there": "ready"}
    assert stage.engine._calls.timers == []


# ---- leaving --------------------------------------------------------------------------------------------------


def test_a_removed_host_leaves_nothing(stage: Stage) -> None:
    local, there = stage.start("local", "there")
    stage.supervisor.remove([there])
    assert stage.states == {"local": "ready"}
    assert list(stage.engine.dispatch.nodes) == [local.node_name]
    assert there.node_name in stage.disconnected
    assert there.node_name in stage.forgotten
    assert there.node_name not in stage.engine._router.admission._names.values()
    stage.lose(there.node_name)
    stage.pass_time(EVER)
    assert len(stage.launched) == 2
    assert stage.supervisor.route(local) == "local"


@pytest.mark.parametrize("comes", [True, False])
def test_a_host_that_is_removed_while_it_starts_has_not_come(stage: Stage, comes: bool) -> None:
    """However early: when nobody has asked yet how its start goes."""
    stage.comes = comes
    start_remote, fleet = stage.supervisor._fleet.start, stage.supervisor._fleet

    def start(hosts: Mapping[str, tuple[HostSpec, Mapping[str, str]]]) -> None:
        start_remote(hosts)
        stage.supervisor.remove(list(stage.supervisor))

    fleet.start, fleet.forget = start, lambda name: stage.reports.pop(name, None)
    with pytest.raises(BootstrapError, match="it was removed"):
        stage.start("there")
    assert stage.supervisor.node_names == []


def test_a_host_that_is_removed_before_it_is_started_again_is_not(stage: Stage) -> None:
    _, there = stage.start("local", "there")
    stage.lose(there.node_name)
    stage.supervisor.remove([there])
    stage.pass_time(EVER)
    assert len(stage.launched) == 2
    assert stage.states == {"local": "ready"}


def test_a_host_that_is_removed_while_it_is_started_again_is_disconnected(stage: Stage, caplog: Any) -> None:
    _, there = stage.start("local", "there")
    stage.comes = False
    stage.lose(there.node_name)
    stage.pass_time(FIRST_PAUSE)
    assert stage.launched[2] == there.node_name
    stage.supervisor.remove([there])
    assert there.node_name in stage.disconnected
    assert there.node_name in stage.forgotten
    stage.lose(there.node_name, "its ssh session has ended")
    stage.pass_time(EVER)
    assert len(stage.launched) == 3
    assert len(caplog.messages) == 1


def test_a_host_that_was_given_up_can_be_removed_and_started_anew(stage: Stage) -> None:
    _, there = stage.start("local", "there")
    there.restarts = RESTARTS
    stage.lose(there.node_name)
    assert stage.states == {"local": "ready", "there": "lost"}
    stage.supervisor.remove([there])
    stage.start("there")
    assert stage.states == {"local": "ready", "there": "ready"}


def test_when_the_master_is_closed_no_host_is_started_any_more(stage: Stage) -> None:
    stage.start("local", "there")
    stage.lose(stage.launched[0])
    stage.engine.say_goodbye()
    stage.turn()
    stage.lose(stage.launched[1])
    stage.pass_time(EVER)
    assert len(stage.launched) == 2


def test_when_the_master_is_closed_a_start_that_is_under_way_is_not_made_again(stage: Stage) -> None:
    stage.start("there")
    stage.comes = False
    stage.lose(stage.launched[0])
    stage.pass_time(FIRST_PAUSE)
    stage.engine.say_goodbye()
    stage.turn()
    stage.lose(stage.launched[1])
    stage.pass_time(EVER)
    assert len(stage.launched) == 2


# ---- what is said ---------------------------------------------------------------------------------------------


def test_what_is_said_is_logged_and_a_handler_that_raises_ends_nothing(stage: Stage, caplog: Any) -> None:
    stage.supervisor.on_note("something", logging.INFO)
    assert caplog.messages == []  # INFO is for those who ask for it
    with caplog.at_level(logging.INFO, "qjam"):
        stage.supervisor.on_note("something", logging.INFO)
    stage.supervisor.on_note("more")
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("qjam", "INFO", "something"),
        ("qjam", "WARNING", "more"),
    ]

    def complain(record: logging.LogRecord) -> bool:
        raise ValueError(record)

    logger = logging.getLogger("qjam")
    logger.addFilter(complain)
    try:
        say("this is not shown")
        stage.start("there")
        stage.lose(stage.launched[0])
        stage.pass_time(FIRST_PAUSE)
    finally:
        logger.removeFilter(complain)
    assert stage.states == {"there": "ready"}


# ---- this machine's node, with its processes --------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are started again soon."""
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor_module, "MAX_PAUSE", 0.02)


class Broken:
    """Fork servers of this machine's node that cannot be started: while it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._python = sys.executable

    def __enter__(self) -> None:
        self._patch.setattr(sys, "executable", "/bin/false")

    def __exit__(self, *_: object) -> None:
        self._patch.setattr(sys, "executable", self._python)


def kill_fork_server(master: Master) -> set[int]:
    """Gives all processes that there were."""
    (fork_server,) = {parent(worker.pid or 0) for worker in master.workers}
    there = {fork_server, *descendants(fork_server)}
    os.kill(fork_server, signal.SIGKILL)
    return there


class Waiting(logging.Handler):
    """Waits for what the logger "qjam" is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self._more = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self.said.append(record.getMessage())
            self._more.notify_all()

    def until(self, text: str, times: int = 1) -> None:
        with self._more:
            assert self._more.wait_for(lambda: sum(text in line for line in self.said) >= times, 20.0), self.said


@pytest.fixture
def log() -> Iterator[Waiting]:
    handler = Waiting()
    logger = logging.getLogger("qjam")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_the_loop_alone_changes_what_it_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    # Hosts are added while it runs: a node that another thread adds under its hands ends it.
    add, threads = Dispatch.add_node, set[str]()

    def watched(*arguments: Any) -> None:
        threads.add(threading.current_thread().name)
        add(*arguments)

    monkeypatch.setattr(Dispatch, "add_node", watched)
    with Master(1):
        assert threads == {"qjam-engine"}


def test_this_machines_node_comes_back_when_its_fork_server_can_be_started_again(
    soon: None, monkeypatch: pytest.MonkeyPatch, log: Waiting
) -> None:
    with Master(2) as master:
        old = {worker.pid for worker in master.workers}
        with Broken(monkeypatch):
            ended = kill_fork_server(master)
            log.until("started again", times=3)
        log.until("local is back")
        assert all_end(ended)
        assert master.run(usercode.forty_two) == 84
        assert old.isdisjoint(worker.pid for worker in master.workers)
        assert [worker.state for worker in master.workers] == ["ready", "ready"]


def test_a_round_waits_for_this_machines_node_to_come_back(
    soon: None, monkeypatch: pytest.MonkeyPatch, log: Waiting
) -> None:
    with Master(1) as master:
        with Broken(monkeypatch):
            kill_fork_server(master)
            log.until("local is lost")
            future = master.submit(lambda params, part: params * sum(part), 7, [1, 2, 3])
        assert future.result(20.0) == 42


def test_a_fork_server_that_cannot_be_kept_alive_is_an_error_that_says_so(
    soon: None, monkeypatch: pytest.MonkeyPatch, log: Waiting
) -> None:
    monkeypatch.setattr(supervisor_module, "RESTARTS", 2)
    with Master(1) as master:
        (worker,) = master.workers
        with Broken(monkeypatch):
            kill_fork_server(master)
            log.until("local is lost", times=3)
            with pytest.raises(
                BootstrapError, match="no worker is left: local: the fork server of the workers has died"
            ):
                master.run(usercode.forty_two)
        assert worker.state == "lost"


def test_a_master_can_be_closed_while_its_node_is_about_to_be_started_again(
    monkeypatch: pytest.MonkeyPatch, log: Waiting
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE", 0.3)
    with Master(1) as master:
        with Broken(monkeypatch):
            kill_fork_server(master)
            log.until("started again in 0.3 s")
        future = master.submit(usercode.forty_two)
        began = time.monotonic()
        master.close()
        assert time.monotonic() - began < 2.0
        assert type(future.exception(1.0)).__name__ == "MasterClosed"


def test_a_start_that_is_never_ready_leaves_no_process(
    soon: None, monkeypatch: pytest.MonkeyPatch, log: Waiting
) -> None:
    from qjam_worker.node.pool import Pool

    with Master(1) as master:
        before = descendants(os.getpid())
        with monkeypatch.context() as patch:
            patch.setattr(supervisor_module, "START_TIMEOUT", 0.5)
            patch.setattr(Pool, "_on_message", lambda self, worker, channel: self.selector.unregister(channel.read_fd))
            with Broken(patch):
                kill_fork_server(master)
                log.until("local is lost")
            log.until("not ready after 0 s")
            started = descendants(os.getpid()) - before
        log.until("local is back")
        assert all_end(started - descendants_of_workers(master))
        assert master.run(usercode.forty_two) == 42


def descendants_of_workers(master: Master) -> set[int]:
    """The fork server and the workers that are there now."""
    (fork_server,) = {parent(worker.pid or 0) for worker in master.workers}
    return {fork_server, *descendants(fork_server)}
