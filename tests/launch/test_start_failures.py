"""Hosts that do not start: the phase that failed, the reason, what the host has said; and those that did start."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import processes
import pyzmq_garbage  # noqa: F401
from faults import kill_sessions
from gates import Gate
from namespaces import namespace, namespaces_work
from needs import need, program
from processes import all_end, descendants, output
from qjam import BootstrapError, HostSpec, Master
from qjam.launch import fleet
from qjam.report import PHASES, HostReport
from ssh_hosts import block, home, run_seven, ssh_host  # noqa: F401
from sshd import private_sshd, sshd_works

OLD_PYTHON = """#!/bin/sh
exec python3 -c 'import sys; sys.version_info = (3, 5, 2); exec(sys.argv[2])' "$@"
"""
BROKEN_NUMPY = """#!/bin/sh
PYTHONPATH={site} exec python3 "$@"
"""
CLOSED_PORT = 1  # tcpmux: nobody has it


@pytest.fixture(autouse=True)
def _needs() -> None:
    need(sshd_works())


@contextlib.contextmanager
def stranger(says: bytes) -> Iterator[int]:
    """Something on a port that is no ssh server; it says its words to whoever connects, and waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        peers = []

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peers.append(server.accept()[0])
                    peers[-1].sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for peer in peers:
                peer.close()


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def key(path: Path, passphrase: str) -> Path:
    command = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, home: Path) -> BootstrapError:
    """One start of a good host and of many that are bad, each in its way; the error is what the tests look at."""
    need(sshd_works())
    folder = tmp_path_factory.mktemp("bad")
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSH_AUTH_SOCK", "")

        def start(name: str, **options: str):
            return stack.enter_context(
                private_sshd(folder, name=name, home=home, options={"MaxStartups": "100:30:200"} | options)
            )

        good = start("good")
        site = folder / "site"
        (site / "numpy").mkdir(parents=True)
        (site / "numpy" / "__init__.py").write_text("raise ImportError('libopenblas.so.0: cannot open it')\n")
        nowhere = {"HostName": "127.0.0.1", "Port": CLOSED_PORT}
        here = {
            "unresolvable": {"HostName": "no-such-host.invalid"},
            "refused": nowhere,
            "stranger": {"Port": stack.enter_context(stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n"))},
            "silent": {"Port": stack.enter_context(stranger(b"")), "ConnectTimeout": 1},
            "proxy": {"ProxyCommand": "sh -c 'echo the gateway is shut >&2; exit 3'"},
            "noproxy": {"ProxyCommand": "no-such-program %h"},
            "behind-refused": {"ProxyJump": "refused"},
            "behind-good": {**nowhere, "ProxyJump": "good"},
            "behind-closed": {"ProxyJump": "closed"},
            "behind-unknown": {"ProxyJump": "unknown"},
            "unknown": {"UserKnownHostsFile": folder / "empty"},
            "keyless": {"IdentityFile": "none"},
            "missing-key": {"IdentityFile": "/no/such/key"},
            "wrong-key": {"IdentityFile": key(folder / "wrong", "")},
            "locked-key": {"IdentityFile": key(folder / "locked", "a passphrase")},
            "broken-key": {"IdentityFile": folder / "broken"},
        }
        (folder / "broken").write_text("this is no key\n")
        (folder / "broken").chmod(0o600)
        blocks = [block(good)] + [block(good, name, **lines) for name, lines in here.items()]
        others = {
            "two-keys": {"AuthenticationMethods": "publickey,password", "PasswordAuthentication": "yes"},
            "password": {"PubkeyAuthentication": "no", "PasswordAuthentication": "yes"},
            "nologin": {"ForceCommand": "echo This account is not available; exit 1"},
            "closed": {"AllowTcpForwarding": "no"},
            "sessionless": {"MaxSessions": "0"},
        }
        blocks += [block(start(name, **options)) for name, options in others.items()]
        hosts = ["good*2", *here, *(name for name in others if name != "closed")]
        if not namespaces_work():
            net = stack.enter_context(namespace())
            net.blackhole()
            blocks.append(block(good, "dropped", HostName=net.host, ConnectTimeout=1))
            hosts.append("dropped")
        pythons = {
            "pythonless": "no-such-python",
            "old": script(folder / "old-python", OLD_PYTHON),
            "numpyless": script(folder / "broken-numpy", BROKEN_NUMPY.format(site=site)),
            "dying": script(folder / "dying", "#!/bin/sh\necho the disk is on fire >&2\nkill -9 $$\n"),
        }
        blocks += [block(good, name) for name in pythons]
        hosts += [HostSpec(name, python=python) for name, python in pythons.items()]
        (folder / "config").write_text("".join(blocks))
        with pytest.raises(BootstrapError) as caught:
            Master(hosts, ssh_config=folder / "config")
        return caught.value


@pytest.fixture
def report(failed: BootstrapError):
    """The report of a host."""
    reports = {report.host: report for report in failed.hosts}

    def find(name: str) -> HostReport:
        if name == "dropped":
            need(namespaces_work())
        return reports[name]

    return find


@pytest.mark.parametrize(
    ("host", "phase", "why"),
    [
        ("unresolvable", "resolve", r"no-such-host\.invalid"),
        ("refused", "connect", r"127\.0\.0\.1 port 1: Connection refused"),
        ("dropped", "connect", r"port \d+: no answer within 1 s"),
        ("stranger", "connect", r"no ssh server answers.*HTTP/1\.1 400"),
        ("silent", "connect", r"no ssh server answers.*within 1 s"),
        ("proxy", "connect", r"ProxyCommand.*exit status 3"),
        ("noproxy", "connect", r"ProxyCommand.*exit status 127"),
        ("behind-refused", "connect", r"jump host refused: .*Connection refused"),
        ("behind-good", "connect", r"the jump host cannot reach 127\.0\.0\.1 port 1: Connect failed$"),
        ("behind-closed", "connect", r"the jump host cannot reach 127\.0\.0\.1 port \d+: .*prohibited$"),
        ("behind-unknown", "connect", r"jump host unknown: .*its host key is not known"),
        ("unknown", "host key", r"its host key is not known"),
        ("keyless", "auth", r"there is no key"),
        ("missing-key", "auth", r"there is no key"),
        ("wrong-key", "auth", r"no key lets \w+ in: .*/wrong is not accepted"),
        ("locked-key", "auth", r"/locked has a passphrase and no agent holds it: run ssh-add /\S+/locked"),
        ("broken-key", "auth", r"/broken cannot be read"),
        ("two-keys", "auth", r"identity is accepted, but .*password"),
        ("password", "auth", r"the server takes password only"),
        ("sessionless", "python", r"the server starts no command"),
        ("nologin", "python", r"did not start there \(exit status 1\)"),
        ("pythonless", "python", r"'no-such-python' was not found there .*install python3.*python=.*REMOTE_PYTHON"),
        ("old", "python", r"is python 3\.5\.2; qjam needs 3\.9 or newer"),
        ("dying", "python", r"did not start there \(.*signal"),
        ("numpyless", "bundle", r"numpy cannot be imported there \(ImportError: libopenblas"),
    ],
)  # fmt: skip
def test_a_host_that_fails_tells_the_phase_and_the_reason(report, host, phase, why):
    assert report(host).failed == phase
    assert re.search(why, report(host).why)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("nologin", "This account is not available"),
        ("pythonless", "no-such-python.*: No such file"),
        ("dying", "the disk is on fire"),
        ("proxy", "the gateway is shut"),
    ],
)
def test_the_last_words_of_a_host_are_shown(report, failed, host, words):
    """Indented below the reason, those of its stdout (>) and those of its stderr (|)."""
    told = [*report(host).why.splitlines()[1:], *report(host).stderr]
    assert any(re.search(words, line) for line in told)
    assert re.search(rf"^{host}: .*(\n    [>|] .*)*{words}", str(failed), re.MULTILINE)


def test_no_reason_is_a_traceback(failed):
    assert "Traceback" not in str(failed)


def test_the_reasons_name_no_secret(failed):
    assert "a passphrase" not in str(failed).replace("has a passphrase and no agent", "")


def test_the_phases_before_the_failing_one_have_their_times(report):
    for host in ("unresolvable", "refused", "unknown", "wrong-key", "pythonless", "numpyless"):
        phases = report(host).phases
        assert list(phases) == list(PHASES[: PHASES.index(report(host).failed)])
        assert all(seconds >= 0 for seconds in phases.values())


def test_the_table_has_a_line_for_each_host(failed):
    title, heading, *lines = str(failed).splitlines()
    assert re.fullmatch(rf"{len(failed.hosts) - 1} of {len(failed.hosts)} hosts did not start:", title)
    assert re.split(r"\s{2,}", heading) == ["host", *PHASES, "route"]
    for report, line in zip(failed.hosts, lines):
        cells = re.split(r"\s{2,}", line)
        assert cells[0] == report.host
        assert len(cells) == 1 + len(PHASES) + 1
        if report.failed is None:
            assert cells[-1] in ("direct", "tunnel")
            assert all(re.fullmatch(r"\d+\.\d\d", cell) for cell in cells[1:-1])
        else:
            assert cells.index("failed") == 1 + PHASES.index(report.failed)


def test_below_the_table_is_the_reason_of_each_failure(failed):
    _, *paragraphs = re.split(r"^(?=[\w-]+: )", str(failed), flags=re.MULTILINE)
    first = [text.split(": ")[:2] for text in paragraphs if text.split(":")[0] in {r.host for r in failed.hosts}]
    told = [[report.host, report.failed] for report in failed.hosts if report.failed]
    assert [pair for pair in first if pair in told] == told


def test_the_good_host_of_a_start_that_failed_came_too(report):
    assert report("good").ready
    assert list(report("good").phases) == list(PHASES)


# Fewer workers than asked for


@pytest.fixture
def three(tmp_path, ssh_host) -> tuple[list[str], Path]:
    """A host that comes, one that cannot be reached, one with no python."""
    sshd = ssh_host()
    config = tmp_path / "config"
    config.write_text(block(sshd, "good") + block(sshd, "refused", Port=CLOSED_PORT) + block(sshd, "pythonless"))
    return ["good*2", "refused*3", HostSpec("pythonless", python="no-such-python")], config


def test_with_min_workers_a_master_goes_on_with_those_that_came(three, caplog):
    hosts, config = three
    with caplog.at_level(logging.WARNING, "qjam"), Master(hosts, ssh_config=config, min_workers=2) as master:
        assert [(worker.host, worker.index) for worker in master.workers] == [("good", 0), ("good", 1)]
        assert [report.failed for report in master.start_reports] == [None, "connect", "python"]
        run_seven(master)
    (record,) = caplog.records
    title, heading, *_ = record.getMessage().splitlines()
    assert (record.name, record.levelname) == ("qjam", "WARNING")
    assert title == "2 of 3 hosts did not start; going on with 2 workers:"
    assert re.split(r"\s{2,}", heading) == ["host", *PHASES, "route"]
    assert "refused: connect: 127.0.0.1 port 1: Connection refused" in record.getMessage()


def test_this_machine_counts_among_those_that_came(three):
    hosts, config = three
    with Master(["local*2", *hosts[1:]], ssh_config=config, min_workers=1) as master:
        assert {worker.host for worker in master.workers} == {"local"}
        run_seven(master)


def test_fewer_than_min_workers_are_an_error_with_the_table(three):
    hosts, config = three
    with pytest.raises(BootstrapError, match="2 of 3 hosts did not start; 2 workers started, min_workers is") as caught:
        Master(hosts, ssh_config=config, min_workers=3)
    assert [report.failed for report in caught.value.hosts] == [None, "connect", "python"]


def test_none_that_came_is_an_error(three):
    hosts, config = three
    with pytest.raises(BootstrapError, match="0 workers started, min_workers is 1"):
        Master(hosts[1:], ssh_config=config, min_workers=1)


# Nothing is left


def test_a_start_that_failed_leaves_nothing_on_the_host_that_came(ssh_host, tmp_path):
    sshd = ssh_host()
    config = tmp_path / "config"
    config.write_text(block(sshd) + block(sshd, "refused", Port=CLOSED_PORT))
    with pytest.raises(BootstrapError):
        Master(["testhost*2", "refused"], ssh_config=config)
    assert processes.all_end(sshd.sessions())
    assert list(sshd.temporary.iterdir()) == []


@pytest.mark.parametrize("phase", ["connect", "python"])
def test_ctrl_c_during_a_start_that_hangs_leaves_nothing(ssh_host, tmp_path, phase):
    """Three hosts hang: that each takes a while to end must not add up."""
    sshd = ssh_host()
    gate = Gate(tmp_path / "gate")
    names = ["a", "b", "c"]
    setup = None
    lines = {}
    if phase == "python":
        setup = f"echo waits > {gate.path}; cat > /dev/null"
    else:  # it neither speaks, nor reads, nor ends
        lines["ProxyCommand"] = f"sh -c 'echo waits > {gate.path}; exec sleep 1000'"
    (tmp_path / "config").write_text("".join(block(sshd, name, **lines) for name in names))
    program = processes.start(
        tmp_path,
        f"""
        from qjam import HostSpec, Master
        hosts = [HostSpec(name, setup={setup!r}) for name in {names!r}]
        try:
            Master(["local*2", *hosts], ssh_config="config")
        except KeyboardInterrupt:
            print("interrupted")
        """,
    )
    for _ in names:
        assert gate.heard() == "waits"
    gate.close()
    ours = {program.pid, *descendants(program.pid)}
    os.killpg(program.pid, signal.SIGINT)
    ended = processes.all_end(ours)
    for pid in ours if not ended else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    printed = processes.finish(program)
    assert ended
    assert printed == "interrupted\n"
    assert processes.all_end(sshd.sessions())
    assert list(sshd.temporary.iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_phase_that_never_ends_is_ended(ssh_host, monkeypatch):
    monkeypatch.setitem(fleet.PHASE_TIMEOUT, "python", 1)
    sshd = ssh_host()
    with pytest.raises(BootstrapError, match="python: it was not over after 1 s") as caught:
        Master(HostSpec("testhost", python="cat >/dev/null #"), ssh_config=sshd.config)
    assert caught.value.hosts[0].failed == "python"
    assert all_end(sshd.sessions())


def test_a_machine_without_descriptors_says_so(tmp_path):
    program = """
    import resource
    from pathlib import Path
    from qjam import BootstrapError, Master
    Path("config").write_text("Host h*\\n HostName 127.0.0.1\\n Port 1\\n")
    Master(1).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    try:
        Master([f"h{number}" for number in range(60)], ssh_config="config")
    except BootstrapError as error:
        print(error)
    """
    assert "this machine cannot start one more" in output(tmp_path, program)


def test_a_host_that_is_not_waited_for_any_longer_is_removed_and_no_round_waits_for_it(tmp_path, ssh_host, monkeypatch):
    good, slow = ssh_host("good"), ssh_host("slow")
    (tmp_path / "config").write_text(block(good) + block(slow))
    welcomed_at = fleet.Fleet.welcomed_at
    monkeypatch.setattr(
        fleet.Fleet, "welcomed_at", lambda self, name: -1e9 if name.startswith("slow") else welcomed_at(self, name)
    )
    hosts = ["good", HostSpec("slow", setup="sleep 2")]
    with Master(hosts, ssh_config=tmp_path / "config", min_workers=1) as master:
        assert [worker.host for worker in master.workers] == ["good"]
        assert all_end(slow.sessions())  # what would have come late has been told to go
        run_seven(master)
        kill_sessions(good)
        run_seven(master)  # when it has been started again
        assert [worker.host for worker in master.workers] == ["good"]
