"""This machine's node: in a thread of the master's process, its workers in processes of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from qjam_worker.node import Node


class LocalNode:
    """The running node. `lost(name, why)` is called when it ends without having been told to."""

    def __init__(
        self, context: Any, endpoint: str, name: str, workers: int, lost: Callable[[str, str], None]
    ) -> None:
        self.name = name
        self._lost = lost
        self._connect = lambda: Node.connect(context, endpoint, name, workers)
        self._thread = threading.Thread(target=self._run, name="qjam-node", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._connect().run()
        except Exception as error:  # whatever it is, the master must hear of it
            self._lost(self.name, f"{type(error).__name__}: {error}")

    def join(self) -> None:
        """Wait until it has left and everything that it started is gone."""
        self._thread.join()
