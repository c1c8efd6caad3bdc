"""What tests run over arrays, in a module that imports nothing heavy: workers import it too."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gates import announce, wait_at


def first(params, part):
    return float(params[0])


def twice(params, part):
    return 2 * params


def sometimes(params, part):
    if part is not None and part[0] == params[0]:
        raise ValueError("not this one")
    return params + part[0]


def keep(params, part):
    """Keeps a view of the params of each round, and counts those that are as they were."""
    import builtins

    kept = builtins.__dict__.setdefault("kept_params", [])
    kept.append(params[1:])
    return float(sum(array[0] == array[-1] == number for number, array in enumerate(kept)))


def fork(params, part):
    """Leaves the reading of the params to a child, which does so when it is told."""
    name, values = params
    if os.fork() == 0:
        try:
            deadline = time.monotonic() + 30
            while not os.path.exists(f"{name}.go") and time.monotonic() < deadline:
                time.sleep(0.001)
            Path(f"{name}.tmp{os.getpid()}").write_text(str(values[0]))
            os.rename(f"{name}.tmp{os.getpid()}", f"{name}.{os.getpid()}")
        finally:
            os._exit(0)
    return 1.0


def wait_for_file(path, part):
    while not os.path.exists(path):
        time.sleep(0.001)
    return 1


def touch_and_wait(params, part):
    """Reads all of the params and stays with them until the test has looked."""
    array, here, go_on = params
    total = float(array.sum())
    announce(here, total)
    wait_at(go_on)
    return total
