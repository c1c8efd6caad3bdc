"""A program that makes a Master without `if __name__ == "__main__":`, and is imported by workers."""

from __future__ import annotations

import importlib
import sys

import pytest

import pyzmq_garbage  # noqa: F401
from processes import output
from qjam import Master, TaskError
from ssh_hosts import home, ssh_host  # noqa: F401

SAYS = (
    r"a worker imports guardless, which makes a Master .*guardless.py, line 3\): write `if __name__ == \"__main__\":`"
)


@pytest.fixture
def guardless(tmp_path, monkeypatch):
    """A module that makes a Master at its top level, by a function of another module."""
    (tmp_path / "maker.py").write_text("from qjam import Master\n\ndef make():\n    return Master(1)\n")
    (tmp_path / "guardless.py").write_text(
        "import maker\n\nmaster = maker.make()\n\ndef mapfunc(params, part):\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("guardless")
    yield module
    module.master.close()
    for name in ("guardless", "maker"):
        del sys.modules[name]


@pytest.mark.parametrize("hosts", ["local*2", "testhost*2"])
def test_it_is_an_error_that_says_what_to_write(guardless, ssh_host, hosts):
    options = {} if hosts.startswith("local") else {"ssh_config": ssh_host().config}
    with Master(hosts, **options) as master:
        for _ in range(2):
            with pytest.raises(TaskError, match=SAYS) as caught:
                master.run(guardless)
            assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(TaskError, match=SAYS):
            master.run(lambda params, part: importlib.import_module("guardless").mapfunc(params, part))


def test_a_master_inside_mapfunc_is_made_as_before():
    def nested(params, part):
        from qjam import Master

        with Master(1) as inner:
            return inner.run(lambda params, part: 20)

    with Master(2) as master:
        assert master.run(nested) == 40


def test_a_script_with_a_guard_and_a_module_with_a_function_are_fine(tmp_path):
    (tmp_path / "pools.py").write_text("from qjam import Master\n\ndef make():\n    return Master(2)\n")
    program = """
        import pools

        def mapfunc(params, part):
            return 1

        if __name__ == "__main__":
            with pools.make() as master:
                print(master.run(mapfunc))
    """
    assert output(tmp_path, program) == "2\n"
