"""`ulimit -n` is low, here or on a host: work is done, or an error names the limit."""

from __future__ import annotations

import re

import pytest

import pyzmq_garbage  # noqa: F401
import usercode
from gates import Gate
from processes import output
from qjam import DataSet, HostSpec, Master, QjamError
from ssh_hosts import home, run_seven, ssh_host  # noqa: F401

HERE = """
    import resource, sys
    import numpy as np
    from qjam import BootstrapError, DataSet, Master

    limit, workers = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if __name__ == "__main__":
        try:
            with Master(workers) as master:
                print(master.run(lambda params, part: part.sum(), None, DataSet(np.ones((200, 500)), slice_size=1)))
        except BootstrapError as error:
            print(error)
    """
# All rounds are submitted while the first one waits at the gate.
MANY = """
    import os, resource, sys
    from qjam import DataSet, Master

    limit, count, gate = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

    def after_the_gate(params, part):
        if params == 0:
            fd = os.open(gate, os.O_RDWR)
            os.read(fd, 1)
            os.close(fd)
        return params * len(part)

    if __name__ == "__main__":
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        os.mkfifo(gate)
        opened = os.open(gate, os.O_RDWR)
        with Master(2) as master:
            pids = [worker.pid for worker in master.workers]
            data = DataSet([1, 2], slice_size=1)
            futures = [master.submit(after_the_gate, number, data) for number in range(count)]
            os.write(opened, b"xx")
            print(sum(future.result() for future in futures), pids == [worker.pid for worker in master.workers])
    """
OUTSTANDING = 1500
REASON = r"Too many open files.* \(this process may have 64 open files: ulimit -n\)"


@pytest.mark.parametrize("limit", [64, 100, 199, 200, 204])
def test_two_workers_do_with_few(tmp_path, limit):
    assert output(tmp_path, HERE, limit, 2) == "100000.0\n"


def test_what_is_too_few_for_many_workers_is_an_error_that_names_the_limit(tmp_path):
    assert re.search(REASON, output(tmp_path, HERE, 64, 32))


@pytest.mark.parametrize("limit", [64, 100, 199, 200, 204])
def test_two_workers_of_a_host_do_with_few(ssh_host, limit):
    with Master(HostSpec("testhost", workers=2, setup=f"ulimit -n {limit}"), ssh_config=ssh_host().config) as master:
        run_seven(master)


def test_what_is_too_few_for_a_host_is_an_error_that_names_the_limit(ssh_host):
    host = HostSpec("testhost", workers=32, setup="ulimit -n 64")
    with pytest.raises(QjamError, match=REASON):
        Master(host, ssh_config=ssh_host().config)


def test_rounds_that_wait_for_their_turn_need_no_descriptor_here(tmp_path):
    printed = output(tmp_path, MANY, 1024, OUTSTANDING, tmp_path / "gate")
    assert printed == f"{2 * sum(range(OUTSTANDING))} True\n"


def test_rounds_that_wait_for_their_turn_need_no_descriptor_on_a_host(tmp_path, ssh_host):
    gate, data = Gate(tmp_path / "gate"), DataSet([1, 2], slice_size=1)
    with Master(HostSpec("testhost", workers=2, setup="ulimit -n 1024"), ssh_config=ssh_host().config) as master:
        pids = [worker.pid for worker in master.workers]
        first = master.submit(usercode.sum_after_the_gate, gate.path, data)
        futures = [master.submit(usercode.add_up, number, data) for number in range(OUTSTANDING)]
        gate.open(2)
        assert first.result() == 3
        assert len([future.result() for future in futures]) == OUTSTANDING
        assert [worker.pid for worker in master.workers] == pids
    gate.close()
