"""Work for idle nodes: slices that other nodes owe, found without walking through all nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from qjam_worker.wire.messages import LATE

from .nodes import Roster
from .rounds import Round
from .states import NodeState
from .timers import Timers

# An idle node searches for slices that others owe after this share of the time that the round has taken so far, and
# after at least so many seconds.
SEARCH_DELAY, MIN_SEARCH_DELAY = 0.1, 0.005
# Seconds that an idle node waits for an answer before it asks another node.
PATIENCE = 1.0
# The number of nodes, those with the most to do, that a search looks at.
MAX_PROBED = 32


@dataclass
class IdleSearch:
    """An idle node searches for what others owe."""

    since: float  # when it became idle
    waits_for: str | None = None  # the node that it has asked and that has not answered yet


class Take(NamedTuple):
    """The idle node tries these slices of a suspect node, without asking it."""

    round: Round
    indices: list[int]


class Ask(NamedTuple):
    """Ask this node to share so many slices."""

    round: Round
    node: str
    slices: int


class VictimQueue:
    """The nodes that owe slices of one round. First come suspect nodes, then those that have the most slices per worker
    that no other node tries or has asked for. An entry that has become too high is corrected when it comes to the top,
    so that a result costs nothing.
    """

    def __init__(self, round_: Round, roster: Roster) -> None:
        self._round, self._roster = round_, roster
        self._asked: dict[str, dict[str, int]] = {}  # node -> idle node -> number of slices that were asked for
        self._resting: Timers[str] = Timers()  # nodes that had nothing to share: when they may be asked again
        self._keys: dict[str, tuple[bool, float]] = {}
        self._heap: list[tuple[tuple[bool, float], str]] = []
        for name in round_.debts:
            self.touch(name)

    def free(self, name: str) -> int:
        """The number of slices that this node could share."""
        free = self._round.count_single(name)
        if name in self._asked and name not in self._roster.suspect:
            free -= sum(self._asked[name].values())
        return free

    def touch(self, name: str) -> None:
        """The node may have more to do than before."""
        key = self._key(name)
        if key is None:
            self._keys.pop(name, None)
        elif self._keys.get(name) != key:
            self._keys[name] = key
            heappush(self._heap, (key, name))

    def ask(self, name: str, idle: str, count: int) -> None:
        """The node is asked for so many slices for an idle one."""
        self._asked.setdefault(name, {})[idle] = count
        self.touch(name)

    def answered(self, name: str, idle: str) -> None:
        """The node has answered."""
        if self._asked.get(name, {}).pop(idle, None) is not None:
            self.touch(name)

    def refused(self, name: str, now: float) -> None:
        """The node had nothing to share. Nobody asks it for a while; else all idle nodes would ask all busy ones."""
        self._resting.set(name, now + max(MIN_SEARCH_DELAY, SEARCH_DELAY * (now - self._round.began)))

    def first(self, fits: Callable[[str], bool], now: float) -> str | None:
        """The first of them that fits, if one of the first `MAX_PROBED` does."""
        for name in self._resting.due(now):
            self.touch(name)
        passed: list[tuple[tuple[bool, float], str]] = []
        found = None
        while self._heap and found is None and len(passed) < MAX_PROBED:
            key, name = heappop(self._heap)
            if self._keys.get(name) != key:
                continue
            if self._key(name) != key:
                del self._keys[name]
                self.touch(name)
                continue
            passed.append((key, name))
            found = name if fits(name) else None
        for entry in passed:
            heappush(self._heap, entry)
        return found

    def _key(self, name: str) -> tuple[bool, float] | None:
        node, silent = self._roster.present.get(name), name in self._roster.suspect
        if node is None or (self._resting.get(name) is not None and not silent):
            return None
        free = self.free(name)
        return (not silent, -free / node.workers) if free > 0 else None


class WorkStealer:
    """When idle nodes search for work, and what they find."""

    def __init__(self, roster: Roster, rounds: dict[int, Round], speculation: bool) -> None:
        self._roster, self._rounds, self._speculation = roster, rounds, speculation
        self.searches: dict[str, IdleSearch] = {}
        self.timers: Timers[str] = Timers()
        self._queues: dict[int, VictimQueue] = {}  # of rounds of which a search has looked for slices

    def search_in(self, name: str, now: float, delay: float = 0.0) -> None:
        """Have a node search for work in `delay` seconds, at least `MIN_SEARCH_DELAY`."""
        if name not in self.searches:
            self.searches[name] = IdleSearch(now)
        at, before = now + max(MIN_SEARCH_DELAY, delay), self.timers.get(name)
        if before is None or at < before:
            self.timers.set(name, at)

    def wake(self, names: Iterable[str], now: float, delay: float = 0.0) -> None:
        """There may be work for these nodes; those that are idle search for it."""
        if len(self._roster.nodes) > 1:
            for name in names:
                if name not in self._roster.owed and name in self._roster.useful:
                    self.search_in(name, now, delay)

    def drop(self, name: str) -> None:
        """The node is busy or gone: it searches no longer."""
        if self.searches.pop(name, None) is not None:
            self.timers.drop(name)

    def touch(self, round_: Round, name: str) -> None:
        """A node may have more to do in this round than before."""
        if round_.number in self._queues:
            self._queues[round_.number].touch(name)

    def end(self, round_: Round) -> None:
        """The round is over."""
        self._queues.pop(round_.number, None)

    def due(self, now: float) -> list[tuple[str, float]]:
        """The nodes that search now, each with the time since which it is idle."""
        found = []
        for name in self.timers.due(now):
            search = self.searches[name]
            if search.waits_for in self._roster.ready:
                search.waits_for = None  # its answer may be on its way
                self.timers.set(name, now + PATIENCE)
            else:
                found.append((name, self.searches.pop(name).since))
        return found

    def find(self, name: str, since: float, now: float) -> Take | Ask | None:
        """Work for a node that is idle since then: slices of a suspect node, else of the node that has the most."""
        node = self._roster.nodes[name]
        if node.state is not NodeState.READY or name in self._roster.owed:
            return None
        rounds = [round_ for round_ in self._rounds.values() if round_.data.refs]
        for round_ in rounds:
            self.search_in(name, now, (now - round_.began) / 2)
        search = self.searches.get(name) or IdleSearch(now)
        search.since = since
        for round_ in rounds:
            late = self._is_late(round_, now)
            if not (late or self._roster.overloaded or self._roster.held or self._roster.suspect):
                continue
            queue = self._queue_of(round_)
            other = queue.first(self._who_can_share(round_, since, late, now), now)
            if other is None:
                continue
            if other in self._roster.suspect:
                return Take(round_, round_.single(other)[: node.workers])
            search.waits_for = other
            both = node.workers + self._roster.nodes[other].workers
            count = max(1, queue.free(other) * node.workers // both)
            queue.ask(other, name, count)
            return Ask(round_, other, count)
        return None

    def _queue_of(self, round_: Round) -> VictimQueue:
        if round_.number not in self._queues:
            self._queues[round_.number] = VictimQueue(round_, self._roster)
        return self._queues[round_.number]

    def _is_late(self, round_: Round, now: float) -> bool:
        typical = round_.typical_slice_seconds
        return self._speculation and typical > 0 and now - round_.began > LATE * typical

    def _who_can_share(self, round_: Round, since: float, late: bool, now: float) -> Callable[[str], bool]:
        # Slices that are on their way to a node would have to be sent twice.
        fetching = now - round_.began < 2 * (since - round_.began)

        def fits(name: str) -> bool:
            node = self._roster.nodes[name]
            if name in self._roster.suspect:
                return self._speculation
            if fetching and node.transfers:
                return False
            return late or name in self._roster.overloaded or name in self._roster.held

        return fits

    def answered(self, round_: Round | None, name: str, idle: str) -> IdleSearch | None:
        """A node has answered an idle one. Returns the search of the idle one."""
        search = self.searches.get(idle)
        if search is not None and search.waits_for == name:
            search.waits_for = None
        if round_ is not None and round_.number in self._queues:
            self._queues[round_.number].answered(name, idle)
        return search

    def refused(self, round_: Round, name: str, now: float) -> None:
        """A node that was asked has nothing to share."""
        self._queue_of(round_).refused(name, now)
