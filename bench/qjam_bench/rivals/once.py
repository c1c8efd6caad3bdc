"""python -m qjam_bench.rivals.once NAME WORKERS starts one party once and prints the seconds of that as JSON."""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from qjam_bench import ends

from . import PARTIES


def main(name: str, workers: int) -> dict[str, float]:
    """Give the seconds of its imports, and of its start: from then until all workers have given their first answer."""
    ends.prepare()
    began = time.perf_counter()
    rival = PARTIES[name]
    rival.bring_in()
    imported = time.perf_counter()
    with rival.party("one", workers) as party:
        answer = party.first(np.ones(1))
        ended = time.perf_counter()
        if answer[0] != workers:
            raise SystemExit(f"{name} gave a wrong sum")
    return {"imports": imported - began, "seconds": ended - imported}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]))) + "\n")
