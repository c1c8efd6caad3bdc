"""The life of a node and of a slice, as tables: what is not in them cannot happen."""

from __future__ import annotations

import enum


class NodeState(enum.Enum):
    """The life of a node."""

    STARTING = "starting"
    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    LOST = "lost"
    CLOSED = "closed"


NODE_TRANSITIONS: dict[tuple[NodeState, str], NodeState] = {
    (NodeState.STARTING, "hello"): NodeState.JOINING,
    (NodeState.JOINING, "ready"): NodeState.READY,
    (NodeState.READY, "silent"): NodeState.SUSPECT,
    (NodeState.SUSPECT, "heard"): NodeState.READY,
    **{(state, "lost"): NodeState.LOST for state in NodeState if state is not NodeState.CLOSED},
    **{(state, "close"): NodeState.CLOSED for state in NodeState},
}


COMING = frozenset({NodeState.STARTING, NodeState.JOINING, NodeState.SUSPECT})  # may yet be ready
PRESENT = frozenset({NodeState.READY, NodeState.SUSPECT})  # has workers, as far as is known

# The life of one slice in one round. Plain text: these change several times a slice and round, and to hash an
# enum's member takes longer than all the rest of it.
QUEUED, SENT, DONE, FAILED = "queued", "sent", "done", "failed"

SLICE_TRANSITIONS: dict[tuple[str, str], str] = {
    (QUEUED, "send"): SENT,
    (QUEUED, "result"): DONE,  # late, from a node that had been given up
    (SENT, "result"): DONE,
    (SENT, "lost"): QUEUED,
    (SENT, "poison"): FAILED,
    (DONE, "result"): DONE,
    (DONE, "lost"): DONE,
}
