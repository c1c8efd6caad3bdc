"""Nodes that owe slices and are silent: ping them, then let others try their slices, in the end give them up."""

from __future__ import annotations

from dataclasses import dataclass, field

from qjam_worker.wire.frames import Kind

from .calls import Calls
from .commands import Command, Note, Send
from .nodes import NodeRecord, Roster
from .states import NodeState

# Seconds of silence after which a node that owes slices is pinged, is suspect, is lost. The last is for what nobody
# foresees: the kernel reports broken links after 15 s and the heartbeat frozen hosts after 30 s, but one message may
# take minutes on a slow link.
PING_AFTER, SUSPECT_AFTER, LOST_AFTER = 1.0, 3.0, 600.0
# Seconds between two sweeps. A sweep that comes more than AWAY seconds late means that the master itself was away.
SWEEP, AWAY = 1.0, 1.0


@dataclass
class Sweep:
    """What one look at all silent nodes has found."""

    commands: list[Command] = field(default_factory=list)
    suspect: list[str] = field(default_factory=list)  # nodes that are so from now on
    lost: list[tuple[str, str]] = field(default_factory=list)  # nodes to be given up, each with the reason


class Liveness:
    """Sweeps over all nodes that owe slices or calls, every `SWEEP` seconds as long as there are rounds."""

    def __init__(self, roster: Roster, calls: Calls) -> None:
        self._roster, self._calls = roster, calls
        self.at: float | None = None  # when the next sweep is due

    def begin(self, now: float) -> None:
        """A round has begun."""
        if self.at is None:
            self.at = now + SWEEP

    def sweep(self, now: float, rounds: bool) -> Sweep:
        """Look at all of them. `rounds`: whether any round or call is left."""
        assert self.at is not None
        away, self.at = now - self.at > AWAY, now + SWEEP if rounds else None
        found = Sweep()
        owing = dict.fromkeys([*self._roster.owed, *self._calls.busy])
        for name in [name for name in owing if name in self._roster.present]:
            node = self._roster.present[name]
            if away:
                node.heard, node.pinged = now, False
            else:
                self._judge(node, now, found)
        return found

    def _judge(self, node: NodeRecord, now: float, found: Sweep) -> None:
        silence = now - node.heard
        if silence >= LOST_AFTER:
            found.lost.append((node.name, f"nothing was heard of it for {silence:.0f} s"))
        elif silence >= SUSPECT_AFTER and node.state is NodeState.READY:
            self._roster.move(node, "silent")
            found.suspect.append(node.name)
            note = f"nothing was heard of {node.host} for {silence:.1f} s; others do its work as well"
            found.commands.append(Note(note))
        elif silence >= PING_AFTER and not node.pinged:
            node.pinged = True
            found.commands.append(Send(node.name, Kind.PING, {"t": now}))
