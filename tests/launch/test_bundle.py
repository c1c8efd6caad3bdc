"""The bundle is all that a node needs beside its third-party packages."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

from qjam.launch import bundle


def test_equal_sources_give_equal_bundles() -> None:
    assert bundle.build() == bundle.build()


def test_it_holds_every_module_of_the_installed_worker_and_nothing_else() -> None:
    import qjam_worker

    folder = Path(qjam_worker.__file__).parent
    installed = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} | {"py.typed"}
    names = set(zipfile.ZipFile(io.BytesIO(bundle.build().data)).namelist())
    assert names == {f"qjam_worker/{name}" for name in installed}


def test_a_node_runs_from_it_without_qjam(tmp_path: Path) -> None:
    archive = tmp_path / "bundle.zip"
    archive.write_bytes(bundle.build().data)
    program = f"""
import importlib.abc, sys
class NoQjam(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition('.')[0] == 'qjam' or name == 'paramiko':
            raise ImportError(name + ' must not be needed on a host')
sys.meta_path.insert(0, NoQjam())
sys.path.insert(0, {str(archive)!r})
import selectors, zmq
from qjam_worker.node import node, options
from qjam_worker.wire import frames, sockets
assert node.__file__.startswith({str(archive)!r})
with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
    router.bind("inproc://here")
    dealer = context.socket(zmq.DEALER)
    dealer.routing_id = b"a"
    dealer.connect("inproc://here")
    made = node.Node(sockets.Dealer(dealer), options.NodeOptions(1))
    try:
        made.start()
        seen = []
        while "ready" not in seen:
            made.receive()
            made.poll(0.1)
            while router.poll(0):
                message = frames.unpack(router.recv_multipart()[1:])
                seen.append(message.header.get("state", message.kind.name))
        print(*seen)
    finally:
        made.close()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["HELLO", "ready"]
