"""The calls that a node has: handed to its workers through one queue, and back to the master as they return.

A call is in the queue, with the worker whose ring names it, or in a ring; but for a moment, before a worker names what
it has taken, and before it writes what that has come to. So what a dead worker had in such a moment is what is in none
of these once each living worker has been seen out of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional, Protocol

import msgpack

from qjam_worker.ipc.call_pipe import Record
from qjam_worker.ipc.files import NoRoom
from qjam_worker.ipc.returns import CALL, IDLE, WROTE, Return
from qjam_worker.values import arguments
from qjam_worker.values.outcomes import AGAIN, IN_FILE, LOST, RAISED, STOPPED, VALUE
from qjam_worker.wire.frames import Kind, nbytes
from qjam_worker.wire.refs import Ref, of_argument

from .commands import Command, Drop, Kill, Spare, StopCall, Tell

# Seconds between two looks at rings whose workers may have more to tell.
LOOK = 0.002
MAX_RETURNS = 4096  # calls in one message


class Queue(Protocol):
    """The queue that the workers read."""

    def __len__(self) -> int: ...
    def put(self, records: list[Record]) -> int: ...
    def drain(self) -> list[Record]: ...


class Arenas(Protocol):
    """Where arguments lie."""

    def put(self, data: bytes, users: int = 1) -> tuple[int, int]: ...
    def free(self, number: int) -> None: ...


class Ring(Protocol):
    """Where a worker tells what its calls came to."""

    words: Any

    def take(self) -> list[Return]: ...
    def clear(self) -> None: ...


class LargeParts(Protocol):
    """Where large parts of arguments lie."""

    def __contains__(self, ref: Ref) -> bool: ...
    def pin(self, ref: Ref) -> None: ...
    def unpin(self, ref: Ref) -> None: ...
    def is_pinned(self, ref: Ref) -> bool: ...
    def path(self, ref: Ref) -> str: ...
    def size(self, ref: Ref) -> int: ...


class Lacking(NamedTuple):
    """A call that waits for large parts of its arguments."""

    function: int
    data: Any
    refs: list[Ref]


class CallDesk:
    """All calls of a node. Methods return the commands that follow.

    `open_file` gives the buffers of a result that lies in a file, which it removes.
    """

    def __init__(
        self,
        queue: Queue,
        arenas: Arenas,
        rings: Sequence[Ring],
        open_file: Callable[[str, list[int]], list[Any]],
        store: LargeParts,
    ) -> None:
        self.queue = queue
        self._store = store
        self.rings = rings
        self.at: Optional[float] = None  # when to look again, in seconds
        self._arenas, self._open_file = arenas, open_file
        self._given: dict[int, Record] = {}  # all that have not returned
        self._unwritten: deque[Record] = deque()  # for which the queue had no room
        self._functions: dict[int, tuple[int, int]] = {}  # where their descriptions lie
        self._homeless: dict[int, bytes] = {}  # descriptions for which there was no room
        self._running: set[int] = set()  # workers that take calls
        self._spoilt: set[int] = set()  # of these, whose rings cannot be read
        self._wrote: dict[int, int] = {}  # by worker: what its ring said when it was told to
        self._seen: dict[int, tuple[int, float]] = {}  # worker -> the call that it ran at the last look, and since when
        self._begun: set[int] = set()  # calls that the master knows to have begun
        self._unwanted: set[int] = set()  # calls that are to be stopped
        self._stopping: dict[int, int] = {}  # call -> the worker that was told so
        self._lacking: dict[int, Lacking] = {}  # calls whose arguments are not all here
        self._wanted: dict[Ref, list[int]] = {}  # these, by what they lack
        self._pinned: dict[int, list[Ref]] = {}  # by call: the large parts of its arguments
        self._large: set[Ref] = set()  # large parts that the master has announced and not told to forget
        self._adrift: set[int] = set()  # calls that a dead worker may have had unnamed
        self._doubtful: dict[int, int] = {}  # workers that may have one of these -> how much they had written
        self._returns: list[Return] = []
        self._now_begun: list[int] = []

    def __repr__(self) -> str:
        return f"<CallDesk: {len(self._given)} calls, {self._left} of them waiting>"

    @property
    def waiting(self) -> int:
        """The number of calls that no worker has taken, and that none that was just told is about to take."""
        if not self._given:
            return 0
        return max(0, self._left - sum(self._is_fresh(worker) for worker in self._running))

    @property
    def _left(self) -> int:
        """The number of calls that no worker has taken."""
        return len(self._unwritten) + len(self.queue) if self._given else 0

    def _is_fresh(self, worker: int) -> bool:
        words = self.rings[worker].words
        return bool(words[CALL] == 0 and (words[IDLE] or words[WROTE] == self._wrote[worker]))

    # What the master says

    def on_calls(self, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """More calls. ValueError if the message makes no sense."""
        ids, functions, new = header["ids"], header["of"], header["new"]
        if len(ids) != len(functions) or len(buffers) != len(new) + len(ids):
            raise ValueError(f"{len(ids)} calls of {len(functions)} functions do not match {len(buffers)} buffers")
        known = self._given.keys() | self._lacking.keys()
        if len(set(ids)) < len(ids) or not known.isdisjoint(ids) or 0 in ids:
            raise ValueError("a call comes twice")
        known = self._functions.keys() | self._homeless.keys()
        if len(set(new)) < len(new) or not known.isdisjoint(new):
            raise ValueError("a function is described twice")
        unknown = set(functions) - known.union(new)
        if unknown:
            raise ValueError(f"a call is of function {min(unknown)}, which the master has not described")
        for number, description in zip(new, buffers):
            self._homeless[number] = nbytes(description).to_bytes(8, "little") + bytes(description)
        try:
            for number in list(self._homeless):
                self._functions[number] = self._arenas.put(self._homeless[number])
                del self._homeless[number]
        except NoRoom as error:
            return self._refuse(ids, str(error))
        calls = list(zip(ids, functions, buffers[len(new) :]))
        large = dict(header.get("large", ()))
        commands = self._await(calls, large) if large else []
        return [*commands, *self._take_in([call for place, call in enumerate(calls) if place not in large])]

    def _take_in(self, calls: list[tuple[int, int, Any]]) -> list[Command]:
        """Queue calls, of which all is here."""
        try:
            arena, offset = self._arenas.put(b"".join([data for _, _, data in calls]), len(calls)) if calls else (0, 0)
        except NoRoom as error:
            return self._refuse([number for number, _, _ in calls], str(error))
        for number, function, data in calls:
            length = nbytes(data)
            record = Record(number, function, arena, offset, length, *self._functions[function])
            self._given[number] = record
            self._unwritten.append(record)
            offset += length
        self._refill()
        return []

    def _refuse(self, ids: list[int], why: str) -> list[Command]:
        refusal = _refusal(f"the host has no room for the arguments of calls: {why}")
        for number in ids:
            self._release(number)
        self._returns += [Return(number, RAISED, refusal) for number in ids]
        return self._flush()

    # Large parts of arguments

    def _await(self, calls: list[tuple[int, int, Any]], large: dict[int, list[str]]) -> list[Command]:
        for place, keys in large.items():
            if place >= len(calls):
                raise ValueError(f"there is no call at place {place}")
            number, function, data = calls[place]
            refs = [of_argument(key) for key in keys]
            self._pinned[number] = refs
            self._lacking[number] = Lacking(function, data, refs)
            for ref in refs:
                self._large.add(ref)
                self._store.pin(ref)
                if ref not in self._store:
                    self._wanted.setdefault(ref, []).append(number)
        come = [calls[place][0] for place in large]
        return self._begin([number for number in come if self._is_here(number)])

    def _is_here(self, number: int) -> bool:
        return all(ref in self._store for ref in self._lacking[number].refs)

    def _begin(self, numbers: list[int]) -> list[Command]:
        """Nothing of these is lacking any more: their arguments begin with where the large parts lie."""
        calls = []
        for number in numbers:
            function, data, refs = self._lacking.pop(number)
            table = msgpack.packb([(self._store.path(ref), self._store.size(ref)) for ref in refs])
            calls.append((number, function, arguments.with_places(bytes(data), table)))
        return self._take_in(calls)

    def expects(self, ref: Ref) -> bool:
        """Whether this part was announced."""
        return ref in self._large

    def on_arrived(self, ref: Ref) -> list[Command]:
        """A large part of arguments is here."""
        waiting = self._wanted.pop(ref, [])
        return self._begin([number for number in waiting if number in self._lacking and self._is_here(number)])

    def on_no_room(self, ref: Ref, why: str) -> list[Command]:
        """There is no room for a large part."""
        waiting = [number for number in self._wanted.pop(ref, []) if self._lacking.pop(number, None) is not None]
        return self._refuse(waiting, why)

    def on_forget(self, header: dict[str, Any]) -> list[Command]:
        """The master will not name these again. ValueError if one is unknown."""
        for number in header["functions"]:
            if number not in self._functions and number not in self._homeless:
                raise ValueError(f"function {number} is to be forgotten and is not known")
            if self._homeless.pop(number, None) is None:
                self._arenas.free(self._functions.pop(number)[0])
        refs = [of_argument(key) for key in header["arguments"]]
        if not self._large.issuperset(refs):
            raise ValueError("a part of arguments is to be forgotten and is not known")
        self._large.difference_update(refs)
        unneeded = [ref for ref in refs if not self._store.is_pinned(ref)]
        return [Drop(unneeded)] if unneeded else []

    def _release(self, number: int) -> None:
        for ref in self._pinned.pop(number, ()):
            self._store.unpin(ref)

    def on_recall(self, header: dict[str, Any], now: float) -> list[Command]:
        """Give back calls that nobody has begun, those that came last, and stop unwanted ones."""
        unwanted = self._given.keys() & header["cancelled"]
        for number in self._lacking.keys() & header["cancelled"]:
            del self._lacking[number]
            self._release(number)
            self._returns.append(Return(number, STOPPED, b""))
        self._take_out()
        for record in [record for record in self._unwritten if record.call in unwanted]:
            self._unwritten.remove(record)
            self._end(Return(record.call, STOPPED, b""))
            unwanted.discard(record.call)
        for _ in range(min(header["count"], len(self._unwritten))):
            self._end(Return(self._unwritten.pop().call, AGAIN, b""))
        self._refill()
        self._unwanted |= unwanted
        return [*self._look(now), *self._flush(recalled=header["count"] > 0)]

    # What the workers do

    def on_given(self, worker: int, now: float) -> None:
        """The worker was told to take calls."""
        self._running.add(worker)
        self._wrote[worker] = self.rings[worker].words[WROTE]
        self._seen.pop(worker, None)
        self._soon(now)

    def on_called(self, worker: int, now: float) -> list[Command]:
        """The worker takes no more calls."""
        commands = self.look(now)
        if worker not in self._spoilt:  # else its end is to come
            self._running.discard(worker)
        return commands

    def look(self, now: float) -> list[Command]:
        """Read what has returned, and tell the master."""
        return [*self._look(now), *self._flush()]

    def on_exit(self, worker: int, how: str, now: float) -> list[Command]:
        """The process of a worker that took calls has ended."""
        if worker not in self._running:
            return []
        commands = self._look(now)
        self._running.discard(worker)
        self._spoilt.discard(worker)
        begun = self.rings[worker].words[CALL]
        self.rings[worker].clear()
        if begun in self._given:
            said: bytes = msgpack.packb([worker, how])
            self._end(Return(begun, STOPPED, b"") if begun in self._unwanted else Return(begun, LOST, said))
        self._take_out()
        running = {other: self.rings[other].words for other in self._running}
        self._adrift = self._given.keys() - {record.call for record in self._unwritten}
        self._adrift -= {words[CALL] for words in running.values()}
        self._doubtful = {other: words[WROTE] for other, words in running.items() if not words[CALL]}
        self._end_adrift()
        self._refill()
        self._soon(now)
        return [*commands, *self._flush()]

    # Inside

    def _look(self, now: float) -> list[Command]:
        commands: list[Command] = []
        again = bool(self._unwanted)
        for worker in sorted(self._running):
            self._clear_up(worker)
            try:
                returns = self.rings[worker].take()
            except ValueError:  # user code has written there
                commands.append(Kill(worker))
                self._spoilt.add(worker)
                continue
            for one in returns:
                commands += self._on_return(one)
            commands += self._see(worker, self.rings[worker].words[CALL], now)
            runs, since = self._seen[worker]
            again = again or bool(returns) or not runs or now - since < LOOK
        self._end_adrift()
        self._refill()
        self.at = now + LOOK if again or self._adrift else None  # else the next that returns rings the bell
        return commands

    def _see(self, worker: int, runs: int, now: float) -> list[Command]:
        """The worker runs this call. One that it ran a while ago too is told to have begun."""
        before, since = self._seen.get(worker, (-1, now))
        if runs != before:
            self._seen[worker] = runs, now
        elif runs in self._given and runs not in self._begun and now - since >= LOOK:
            self._begun.add(runs)
            self._now_begun.append(runs)
        if runs not in self._unwanted or runs in self._stopping:
            return []
        self._stopping[runs] = worker
        return [StopCall(worker, runs)]

    def _clear_up(self, worker: int) -> None:
        """Look whether the worker has named or written what it had when another one died. Before its ring is read."""
        if worker in self._doubtful:
            words = self.rings[worker].words
            runs, wrote = words[CALL], words[WROTE]
            if runs or wrote != self._doubtful[worker]:
                del self._doubtful[worker]
                self._adrift.discard(runs)

    def _end_adrift(self) -> None:
        """Give up what dead workers had, once it is clear that no living one has it."""
        if self._adrift and self._doubtful.keys().isdisjoint(self._running):
            for call in self._adrift.intersection(self._given):
                self._end(Return(call, AGAIN, b""))
            self._adrift.clear()

    def _on_return(self, one: Return) -> list[Command]:
        if one.call not in self._given:
            return []
        self._adrift.discard(one.call)
        worker = self._stopping.pop(one.call, None)
        if one.how != AGAIN:
            self._end(one)
        elif one.call in self._unwanted:
            self._end(Return(one.call, STOPPED, b""))
        else:  # the process was not fit for it
            self._unwritten.appendleft(self._given[one.call])
        return [] if worker is None else [Spare(worker)]

    def _end(self, one: Return) -> None:
        self._arenas.free(self._given.pop(one.call).arena)
        if self._pinned:
            self._release(one.call)
        self._begun.discard(one.call)
        self._unwanted.discard(one.call)
        self._stopping.pop(one.call, None)
        self._returns.append(one)

    def _take_out(self) -> None:
        """Take all calls out that no worker has taken, in their order."""
        self._unwritten.extendleft(reversed(self.queue.drain()))

    def _refill(self) -> None:
        if self._unwritten:
            for _ in range(self.queue.put(list(self._unwritten))):
                self._unwritten.popleft()

    def _soon(self, now: float) -> None:
        self.at = now + LOOK if self.at is None else min(self.at, now + LOOK)

    def _flush(self, recalled: bool = False) -> list[Command]:
        returns, self._returns = self._returns, []
        begun, self._now_begun = self._now_begun, []
        if not (returns or begun or recalled):
            return []
        left = self._left
        commands: list[Command] = []
        while True:
            some, returns = returns[:MAX_RETURNS], returns[MAX_RETURNS:]
            frames: list[int] = []
            buffers: list[Any] = []
            hows = []
            for one in some:
                how, parts = self._told(one)
                buffers += parts
                frames.append(len(parts))
                hows.append(how)
            header = {"ids": [one.call for one in some], "how": hows, "frames": frames, "begun": begun, "left": left}
            if recalled and not returns:
                header["recalled"] = True
            commands.append(Tell(Kind.RETURNS, header, buffers))
            begun = []
            if not returns:
                return commands

    def _told(self, one: Return) -> tuple[int, list[Any]]:
        """How a call ended, and the buffers that go with it."""
        if one.how != IN_FILE:
            return one.how, [one.data]
        try:
            return VALUE, self._open_file(*msgpack.unpackb(one.data))
        except Exception as error:  # noqa: BLE001  user code may have removed it, or has written over the ring
            return RAISED, [_refusal(f"the node cannot use the result of a call: {type(error).__name__}: {error}")]


def _refusal(summary: str) -> bytes:
    """As if the call had raised this."""
    packed: bytes = msgpack.packb(["", summary, None], unicode_errors="surrogatepass")
    return packed
