"""`ulimit -n` is low, here or on a host: work is done, or an error names the limit."""

from __future__ import annotations

import re

import pytest

import pyzmq_garbage  # noqa: F401
from processes import output
from qjam import HostSpec, Master, QjamError
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
