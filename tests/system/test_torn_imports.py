"""An import that is interrupted: what python leaves of it is in no way of the next task."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest

import pyzmq_garbage  # noqa: F401
from gates import Gate
from qjam import Master
from ssh_hosts import home, ssh_host  # noqa: F401

# A package with a part that can be begun only once, as an extension has: it stays in sys.modules when the import of the
# package around it ends by an exception.
PACKAGE = {
    "half/__init__.py": """
        from . import core

        core.begin()
        """,
    "half/core.py": """
        from gates import announce, wait_at

        begun = False

        def begin():
            global begun
            assert not begun, "half is half imported"
            begun = True
            announce(ARRIVALS)
            wait_at(WAY)
        """,
    "importer.py": """
        def mapfunc(swallow, part):
            import os
            try:
                import half
            except BaseException:
                if not swallow:
                    raise
            return os.getpid()
        """,
}


@pytest.fixture
def gates(tmp_path):
    made = Gate(tmp_path / "arrivals"), Gate(tmp_path / "way")
    yield made
    for gate in made:
        gate.close()


@pytest.fixture
def importer(tmp_path, gates, monkeypatch):
    for name, source in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        source = source.replace("ARRIVALS", repr(gates[0].path)).replace("WAY", repr(gates[1].path))
        (tmp_path / name).write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("importer")
    del sys.modules["importer"]


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("host", ["local", "testhost"])
def test_a_worker_that_is_interrupted_in_an_import_is_replaced(importer, gates, ssh_host, host, swallow):
    arrivals, way = gates
    options = {} if host == "local" else {"ssh_config": ssh_host().config}
    with Master(f"{host}*1", **options) as master:
        before = master.workers[0].pid
        running = master.submit(importer, swallow)
        arrivals.heard()
        running.cancel()
        again = master.submit(importer, False)
        arrivals.heard()
        way.open()
        assert again.result() == master.workers[0].pid != before


def test_a_worker_that_is_interrupted_elsewhere_stays(importer, gates):
    arrivals, way = gates
    with Master(1) as master:
        way.open()
        before = master.run(importer, False)
        arrivals.heard()
        running = master.submit(lingering(arrivals.path))
        arrivals.heard()
        running.cancel()
        assert master.run(importer, False) == before


def lingering(path):
    def linger(params, part):
        import threading

        from gates import announce

        announce(path)
        threading.Event().wait()

    return linger
