"""The states of a node and of a slice, and their transitions as tables: a transition that is not there is an error."""

from __future__ import annotations

import enum


class NodeState(enum.Enum):
    """The state of a node."""

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


COMING = frozenset({NodeState.STARTING, NodeState.JOINING, NodeState.SUSPECT})  # may still become ready
PRESENT = frozenset({NodeState.READY, NodeState.SUSPECT})  # has workers, as far as the master knows

# The states of a slice in one round. Plain strings: they change several times per slice and round, and hashing an enum
# member takes longer than the rest of a change.
QUEUED, SENT, DONE, FAILED = "queued", "sent", "done", "failed"

SLICE_TRANSITIONS: dict[tuple[str, str], str] = {
    (QUEUED, "send"): SENT,
    (QUEUED, "result"): DONE,  # late, from a node that was suspect
    (SENT, "result"): DONE,
    (SENT, "lost"): QUEUED,
    (SENT, "poison"): FAILED,
    (DONE, "result"): DONE,
    (DONE, "lost"): DONE,
}
