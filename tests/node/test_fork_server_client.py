"""The fork server that is forked from a node, and the relay that is forked beside it, when something dies early."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from processes import all_end, descendants
from qjam_worker.ipc.files import Files, sweep
from qjam_worker.node.fork_server_client import Forked


@pytest.mark.parametrize("end", [lambda: os._exit(3), lambda: os.kill(os.getpid(), signal.SIGTERM)])
def test_the_end_of_a_forked_process_can_be_asked_for_again(end):
    pid = os.fork()
    if pid == 0:
        end()
    forked = Forked(pid)
    ended = forked.wait()
    assert ended in (3, -signal.SIGTERM)
    assert forked.wait() == ended


def test_a_sweep_in_the_middle_of_locking_leaves_a_new_directory_alone(tmp_path, monkeypatch):
    rename = os.rename

    def sweep_first(source, target):
        sweep(str(tmp_path))
        rename(source, target)

    monkeypatch.setattr(os, "rename", sweep_first)
    files = Files.make([str(tmp_path)])
    locks = files.lock()
    assert len(locks) == 1
    sweep(str(tmp_path))
    assert [Path(directory).exists() for directory in files.directories] == [True]
    with open(Path(files.directories[0], "lock")) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    files.remove()
    os.close(locks[0])


def test_numpy_is_not_imported_before_the_process_is_prepared_for_it():
    program = "import sys, qjam_worker.node.fork_server_client\n"
    program += "assert not {'numpy', 'msgpack', 'zmq'} & sys.modules.keys()\n"
    subprocess.run([sys.executable, "-c", program], check=True)


NODE = """
import os, sys
from qjam_worker import __main__, stdio_node
from qjam_worker.node import fork_server_client
fork_server_client.prepare(1)
import numpy
made = fork_server_client.fork()
from qjam_worker.wire.sockets import Dealer
def connect(*arguments):
    {end}
Dealer.connect = connect
welcome = dict(node="n", workers=1, keys=None, heartbeat_timeout=15.0)
stdio_node.become_node(dict(welcome=welcome, stdio=True), sys.stdin.buffer, os.dup(1), [], made)
"""


@pytest.mark.parametrize("end", ["raise OSError('no room')", "os.kill(os.getpid(), 9)"])
def test_a_node_that_ends_before_it_has_connected_takes_its_relay_along(end, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", NODE.format(end=end)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as node:
        node.communicate()  # ends with the last that holds its streams
        assert all_end(descendants(node.pid))
    assert not [path for path in tmp_path.iterdir() if "relay" in path.name]
