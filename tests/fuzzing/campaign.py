"""Many cases of all targets, each drawn from the seed and its number alone; what became of their messages; memory."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from . import masters, nodes
from .bench import small
from .parsers import Parsers
from .sockets import Sockets

MESSAGES = 200  # in a case
# What a case of each target gets of all messages.
SHARES = {"masters": 0.55, "nodes": 0.2, "parsers": 0.23, "sockets": 0.02}
WARM_UP = 0.1  # of the messages, before memory is measured
GROWTH = 32.0  # MiB that may be added after that: allocators keep what they have had
FAILURES = 5  # enough to see what they have in common
VERDICTS = ("frames", "schema", "meaning", "left", "harmless", "ignored")


@dataclass
class Failed:
    """One case that has failed."""

    case: str
    error: BaseException
    last: Any

    def __str__(self) -> str:
        lines = "".join(traceback.format_exception(self.error, limit=-8))
        return f"{self.case}: {lines}the last message: {str(self.last)[:2000]}"


class Campaign:
    """To be used as a context manager. `targets`: only these."""

    def __init__(self, seed: str, targets: tuple[str, ...] = tuple(SHARES)) -> None:
        self.seed = seed
        self.targets = targets
        self.tally: Counter[str] = Counter()
        self.told: Counter[str] = Counter()  # messages by target
        self.cases: Counter[str] = Counter()
        self.failures: list[Failed] = []
        self.memory = Memory()
        self._stack = contextlib.ExitStack()
        self._made: dict[str, Any] = {}
        self.run_case: dict[str, Callable[[Random], int]] = {
            "masters": self._masters,
            "nodes": self._nodes,
            "parsers": self._parsers,
            "sockets": self._sockets,
        }
        self.last: Any = None

    def __enter__(self) -> Campaign:  # noqa: PYI034  typing.Self is of python 3.11
        base = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.base = Path(tempfile.mkdtemp(prefix="fuzzing-", dir=base))
        self._stack.callback(shutil.rmtree, self.base, ignore_errors=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(
        self,
        messages: float,
        seconds: float,
        every: float = math.inf,
        tell: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Until so many messages are told, or so many seconds are over. `tell` hears how many, `every` so often."""
        began = told = time.monotonic()
        shares = {target: SHARES[target] for target in self.targets}
        while len(self.failures) < FAILURES:
            target = min(shares, key=lambda name: self.told[name] / shares[name])
            done = sum(self.told.values())
            if done >= messages or time.monotonic() - began > seconds:
                break
            self.case(target, self.cases[target])
            self.cases[target] += 1
            part = max(done / messages, (time.monotonic() - began) / seconds)
            if part > WARM_UP and not self.memory.before:
                self.memory.start()
            if time.monotonic() - told > every:
                told = time.monotonic()
                tell(done)

    def case(self, target: str, number: int) -> None:
        """One case; a failure is kept."""
        self.last = None
        try:
            self.told[target] += self.run_case[target](Random(f"{self.seed}:{target}:{number}"))
        except Exception as error:
            self.failures.append(Failed(f"--seed {self.seed} --only {target}:{number}", error, self._last(target)))
            self.told[target] += MESSAGES

    def _last(self, target: str) -> Any:
        return getattr(self._made.get(target, self.last), "last", None)

    def _masters(self, rng: Random) -> int:
        with small() as clock:
            self.last = episode = masters.Episode(clock, rng, self.tally)
            episode.run(MESSAGES)
        return MESSAGES

    def _nodes(self, rng: Random) -> int:
        with small() as clock:
            self.last = episode = nodes.Episode(clock, rng, self.tally, self.base)
            episode.run(MESSAGES)
        return MESSAGES

    def _parsers(self, rng: Random) -> int:
        parsers = self._one("parsers", Parsers)
        for _ in range(MESSAGES):
            parsers.run(rng)
        return MESSAGES

    def _sockets(self, rng: Random) -> int:
        sockets = self._one("sockets", Sockets)
        before = sockets.told
        for _ in range(5):
            sockets.run(rng)
        sockets.check()
        return int(sockets.told - before)

    def _one(self, target: str, make: Callable[[Counter[str]], Any]) -> Any:
        """The one object that all cases of a target share."""
        if target not in self._made:
            self._made[target] = self._stack.enter_context(contextlib.closing(make(self.tally)))
        return self._made[target]

    def report(self) -> Iterator[str]:
        """What there is to say at the end."""
        yield "messages: " + ", ".join(f"{target} {count:,}" for target, count in sorted(self.told.items()))
        yield "became: " + ", ".join(f"{verdict} {self.tally[verdict]:,}" for verdict in VERDICTS)
        counts = ("rounds", "liars lost", "nodes that left")
        yield ", ".join(f"{name} {self.tally[name]:,}" for name in counts)
        yield str(self.memory)
        for failure in self.failures:
            yield f"FAILED {failure}"


class Memory:
    """What the process takes, after the warm-up and now."""

    def __init__(self) -> None:
        self.before = 0.0
        self.descriptors = 0

    def start(self) -> None:
        self.before, self.descriptors = resident(), descriptors()

    @property
    def growth(self) -> float:
        """In MiB."""
        return resident() - self.before if self.before else 0.0

    def __str__(self) -> str:
        after = resident()
        return (
            f"memory: {self.before:.1f} MiB after the warm-up, {after:.1f} MiB now; "
            f"descriptors: {self.descriptors}, {descriptors()}"
        )


def resident() -> float:
    """Of this process, in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
