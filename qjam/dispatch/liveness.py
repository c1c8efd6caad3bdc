"""Who owes something and says nothing: first asked for a sign of life, then doubted, in the end given up."""

from __future__ import annotations

from qjam_worker.wire.frames import Kind

from .commands import Command, Lose, Note, Send
from .nodes import NodeRecord, Roster
from .states import NodeState

# Seconds of silence of a node that owes something: then it is asked for a sign of life, then others try its slices as
# well, and in the end it is given up. The last is for what nobody foresees: the kernels tell of broken links after 15 s
# and leases of frozen hosts after 30 s, but one message may take minutes on a slow link.
PING_AFTER, SUSPECT_AFTER, LOST_AFTER = 1.0, 3.0, 600.0
# How often silence is looked at. If it takes much longer, then it was the master that was away.
SWEEP, AWAY = 1.0, 1.0


class Liveness:
    """Looks at all nodes that owe something, every `SWEEP` seconds as long as there are rounds."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self.at: float | None = None  # when it is looked at next

    def begin(self, now: float) -> None:
        """There is a round."""
        if self.at is None:
            self.at = now + SWEEP

    def sweep(self, now: float, rounds: bool) -> tuple[list[Command], list[str]]:
        """What follows, and the nodes that are suspect from now on. `rounds`: whether there still are any."""
        assert self.at is not None
        away, self.at = now - self.at > AWAY, now + SWEEP if rounds else None
        commands: list[Command] = []
        suspect: list[str] = []
        for name in [name for name in self._roster.owed if name in self._roster.present]:
            node = self._roster.present[name]
            if away:
                node.heard, node.pinged = now, False
                continue
            before = node.state
            commands += self._judge(node, now)
            if node.state is not before:
                suspect.append(name)
        return commands, suspect

    def _judge(self, node: NodeRecord, now: float) -> list[Command]:
        silence = now - node.heard
        if silence >= LOST_AFTER:
            return [Lose(node.name, f"nothing was heard of it for {silence:.0f} s")]
        if silence >= SUSPECT_AFTER and node.state is NodeState.READY:
            self._roster.move(node, "silent")
            return [Note(f"nothing was heard of {node.host} for {silence:.1f} s; others do its work as well")]
        if silence >= PING_AFTER and not node.pinged:
            node.pinged = True
            return [Send(node.name, Kind.PING, {"t": now})]
        return []
