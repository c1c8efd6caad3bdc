"""What the scheduler decides: the commands that its node carries out."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

from qjam_worker.wire.frames import Kind
from qjam_worker.wire.messages import MAX_BUFFERS
from qjam_worker.wire.refs import Ref

from .rounds import NodeRound, Work


class Tell(NamedTuple):
    """Send this to the master."""

    kind: Kind
    header: dict[str, Any]
    buffers: list[Any]


class Give(NamedTuple):
    """Give this work to an idle worker."""

    worker: int
    round: NodeRound
    work: Work


class Interrupt(NamedTuple):
    """Stop the worker: nobody needs the result of its work any more."""

    worker: int


class Forget(NamedTuple):
    """Have the workers forget this job."""

    job: int


class Drop(NamedTuple):
    """Remove these refs: no job and no data that the master still knows names them."""

    refs: list[Ref]


class Ended(NamedTuple):
    """The round is over on this node: remove its params."""

    round: int


class GiveCalls(NamedTuple):
    """Have an idle worker take calls, for so many seconds or as long as there are any."""

    worker: int
    seconds: Optional[float]


class YieldCalls(NamedTuple):
    """Have the worker take no more calls for now: a round needs it."""

    worker: int


class StopCall(NamedTuple):
    """Stop the call that this worker runs: nobody needs its result any more."""

    worker: int
    call: int


class Spare(NamedTuple):
    """The worker has stopped its call, and need not be killed."""

    worker: int


class Kill(NamedTuple):
    """User code has spoilt what this worker shares with the node."""

    worker: int


Command = Union[Tell, Give, Interrupt, Forget, Drop, Ended, GiveCalls, YieldCalls, StopCall, Spare, Kill]


def refusal(number: int, text: str) -> Tell:
    """Refuse a round that has not begun here: there is no room for its params."""
    return failure(number, "room", text, None, None, text, None)


def failure(
    number: int,
    what: str,
    text: str,
    worker: Optional[int],
    slice_: Optional[int],
    summary: str,
    pickled: Optional[bytes],
) -> Tell:
    """Tell the master why a round cannot go on here, as it takes an ERROR."""
    header = {"round": number, "what": what, "text": text, "worker": worker, "slice": slice_, "summary": summary}
    return Tell(Kind.ERROR, header, [] if pickled is None else [pickled])


def results_of(round_: NodeRound) -> list[Command]:
    """Send the master all results that the round holds: several messages, where one cannot have as many buffers."""
    results: list[Command] = []
    roots: list[list[int]] = []
    buffers: list[Any] = []
    for lo, hi in round_.tree.spans:
        frames = round_.tree.values[lo, hi].frames()
        if len(buffers) + len(frames) > MAX_BUFFERS:
            results.append(_result(round_, roots, buffers))
            roots, buffers = [], []
        roots.append([lo, hi, len(frames)])
        buffers += frames
    return [*results, _result(round_, roots, buffers)]


def _result(round_: NodeRound, roots: list[list[int]], buffers: list[Any]) -> Tell:
    seconds = round_.typical_slice_seconds or 0.0
    return Tell(Kind.RESULT, {"round": round_.number, "roots": roots, "seconds": seconds}, buffers)
