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
        def mapfunc(arrivals, part):
            import os
            import signal
            from gates import announce
            try:
                import half
                while arrivals:
                    signal.pause()
            except KeyboardInterrupt:
                announce(arrivals, "interrupted after the import")
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


@pytest.fixture(params=["local", "testhost"])
def master(request, ssh_host):
    options = {} if request.param == "local" else {"ssh_config": ssh_host().config}
    with Master(f"{request.param}*1", **options) as master:
        yield master


def test_an_import_that_is_interrupted_comes_to_its_end(importer, gates, master):
    arrivals, way = gates
    before = master.workers[0].pid
    running = master.submit(importer, arrivals.path)
    arrivals.heard()
    running.cancel()
    way.open()
    assert arrivals.heard() == "interrupted after the import"
    assert master.run(importer) == master.workers[0].pid == before


def test_a_worker_whose_import_does_not_end_is_replaced(importer, gates, master):
    arrivals, way = gates
    before = master.workers[0].pid
    running = master.submit(importer)
    arrivals.heard()
    running.cancel()
    again = master.submit(importer)
    arrivals.heard()
    way.open()
    assert again.result() == master.workers[0].pid != before


def test_a_worker_that_is_interrupted_elsewhere_stays(importer, gates):
    arrivals, way = gates
    with Master(1) as master:
        way.open()
        before = master.run(importer)
        arrivals.heard()
        running = master.submit(lingering(arrivals.path))
        arrivals.heard()
        running.cancel()
        assert master.run(importer) == before


def lingering(path):
    def linger(params, part):
        import threading

        from gates import announce

        announce(path)
        threading.Event().wait()

    return linger
