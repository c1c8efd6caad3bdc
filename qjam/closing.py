"""How a Master ends."""

from __future__ import annotations

import os
import threading
import time

from .calls import Center
from .engine.engine import Engine
from .engine.printer import Printer
from .launch.fleet import Fleet
from .launch.supervisor import STOP_TIMEOUT, Supervisor
from .outcome import Finisher


def close(
    owner: int,
    engine: Engine,
    fleet: Fleet,
    printer: Printer,
    finisher: Finisher,
    center: Center,
    supervisor: Supervisor,
) -> None:
    """Close a Master, in a separate thread: Ctrl-C must not interrupt it halfway, and the garbage collector may call
    this in one of the threads that it ends.
    """
    if os.getpid() != owner:
        return  # in a fork of the program: threads and workers belong to the parent

    def end() -> None:
        engine.say_goodbye()
        deadline = time.monotonic() + STOP_TIMEOUT
        for name in supervisor.node_names:
            engine.wait_for_bye(name, max(0.0, deadline - time.monotonic()))
        fleet.close()
        finisher.close()
        center.close()
        engine.stop()
        printer.close()  # last: prints all output that has arrived

    thread = threading.Thread(target=end, name="qjam-close")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down and starts no more threads
        end()
        return
    if not threading.current_thread().name.startswith("qjam-"):
        thread.join()
