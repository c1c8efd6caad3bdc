"""Decides which node gets which calls: how many at a time, in whose turn, and what becomes of those of a lost one.

These rules hold for any events in any order: each call ends once; what a submitter submitted first is given out first;
a call that was begun is not begun again but after the loss of its worker or node, or while its node is suspect; one
that ends three workers ends itself.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

from qjam_worker.values.outcomes import AGAIN, LOST
from qjam_worker.wire.frames import Kind
from qjam_worker.wire.refs import Part, of_argument

from .call import Argument, Call, Function, Returned
from .commands import Command, Ended, Failure, Send
from .nodes import NodeRecord, Roster

# A call that has ended so many worker processes is at fault itself.
POISON = 3
# Calls and bytes of arguments that may be at one node.
MAX_WINDOW = 8192
MAX_BYTES = 16 * 1024 * 1024
# A node has no more calls than it has lately done in so many seconds; it is more than a message takes there and back.
HORIZON = 0.25
# Calls in one message, at most.
MAX_BATCH = 1024


class AtNode:
    """The calls at one node."""

    def __init__(self, window: int) -> None:
        self.calls: dict[int, Call] = {}
        self.nbytes = 0
        self.window = self.least = window  # how many there may be
        self.begun: set[int] = set()  # calls that its workers have begun and are still at, as far as it has told
        self.known: set[Function | Argument] = set()  # that it was sent
        self._count, self._since, self._most = 0, 0.0, MAX_WINDOW  # calls that have returned since then
        self.recalled = False  # whether it was asked to give some back and has not answered

    def restart(self, now: float) -> None:
        """It had no calls and gets some: what it has done lately says nothing."""
        self._count, self._since, self._most = 0, now, MAX_WINDOW

    def resize(self, returned: int, left: int, now: float) -> None:
        """Keep so many there that none of its workers waits for more, and not far more: what is there already is ahead
        of what other submitters will submit.
        """
        self._count += returned
        if now - self._since >= HORIZON:
            self._most = max(self.least, min(MAX_WINDOW, 1 + int(HORIZON * self._count / (now - self._since))))
            self._count, self._since = 0, now
            self.window = min(self.window, self._most)
        if left < returned:
            self.window = min(2 * self.window, self._most)
        elif left > 8 * returned + self.least:
            self.window = max(self.window - self.window // 8, self.least)

    @property
    def room(self) -> int:
        """How many more it may be given."""
        return 0 if self.nbytes > MAX_BYTES and self.calls else self.window - len(self.calls)


class Calls:
    """All calls of a master. Methods return the commands that follow."""

    def __init__(self, roster: Roster, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.calls: dict[int, Call] = {}  # that have not ended, by number
        self.at: dict[str, AtNode] = {}  # nodes that have calls
        self._roster = roster
        self._queues: OrderedDict[int, deque[Call]] = OrderedDict()  # by submitter, in the order of their turns
        self._queued = 0  # entries in these, also of calls that are over
        self._made = 0
        self._unneeded: list[Function] = []  # forgotten ones whose last call has just ended

    def __repr__(self) -> str:
        return f"<Calls: {len(self.calls)}, of which {self._queued} are queued>"

    # What the user does

    def submit(self, calls: Iterable[Call]) -> list[Command]:
        """New calls; they get their numbers here."""
        for call in calls:
            self._made += 1
            call.id = self._made
            self.calls[call.id] = call
            call.function.calls += 1
            for argument in call.large:
                argument.calls += 1
            self._queue_of(call.submitter).append(call)
            call.queued = True
            self._queued += 1
        return self.give_out()

    def cancel(self, calls: Iterable[Call]) -> list[Command]:
        """Nobody wants these any more; they have ended."""
        unwanted: dict[str, list[int]] = {}
        for call in calls:
            if self._over(call):
                for name in call.nodes:
                    unwanted.setdefault(name, []).append(call.id)
        commands: list[Command] = [
            Send(name, Kind.RECALL, {"count": 0, "cancelled": ids}) for name, ids in unwanted.items()
        ]
        return commands + self.give_out()

    def forget(self, function: Function) -> list[Command]:
        """The submitter is gone: no call of this function will come."""
        function.forgotten = True
        return [] if function.calls else self._dismiss(function)

    def _dismiss(self, function: Function) -> list[Command]:
        names, function.at = sorted(function.at), set()
        for name in names:
            self.at[name].known.discard(function)
        return [Send(name, Kind.FORGET, {"functions": [function.number], "arguments": []}) for name in names]

    def forget_arguments(self, arguments: Iterable[Argument]) -> list[Command]:
        """These are not kept for further calls; those that a call needs are not meant."""
        at: dict[str, list[str]] = {}
        for argument in [argument for argument in arguments if not argument.calls]:
            for name in sorted(argument.at):
                at.setdefault(name, []).append(argument.key)
                self.at[name].known.discard(argument)
            argument.at.clear()
        return [Send(name, Kind.FORGET, {"functions": [], "arguments": keys}) for name, keys in at.items()]

    # What nodes say

    def on_returns(self, name: str, header: dict[str, Any], buffers: list[Any]) -> list[Command]:
        """Calls have returned, or come back. ValueError if the message makes no sense."""
        self._check_returns(name, header, len(buffers))
        at = self._at(name)
        began = [call for number in header["begun"] if not (call := at.calls[number]).begun and not call.over]
        for call in began:
            call.begun = True
        self._roster.hold(name, len(at.begun.union(header["begun"])) - len(at.begun))
        at.begun.update(header["begun"])
        ended: list[Returned] = []
        back: list[Call] = []
        beaten: dict[str, list[int]] = {}
        position, host = 0, self._roster.nodes[name].host
        for number, how, count in zip(header["ids"], header["how"], header["frames"], strict=True):
            call, data = self._leave(name, number), buffers[position : position + count]
            position += count
            if call.over:
                continue
            call.deaths += how == LOST
            if how == AGAIN or (how == LOST and call.deaths < POISON):
                back.append(call)
            else:
                self._over(call)
                ended.append(Returned(call, how, data, host))
                for other in call.nodes:
                    beaten.setdefault(other, []).append(number)
        self._put_back(back)
        if "recalled" in header:
            at.recalled = False
        returned = sum(how < LOST for how in header["how"])
        if returned:
            at.resize(returned, header["left"], self._clock())
        commands: list[Command] = [Ended(ended, began, [])] if ended or began else []
        commands += [Send(other, Kind.RECALL, {"count": 0, "cancelled": numbers}) for other, numbers in beaten.items()]
        return commands + self.give_out() + self.fetch_for(name)

    def _check_returns(self, name: str, header: dict[str, Any], buffers: int) -> None:
        ids, hows, frames = header["ids"], header["how"], header["frames"]
        if not len(ids) == len(hows) == len(frames) or sum(frames) != buffers or 0 in frames:
            raise ValueError(f"{len(ids)} returned calls do not match {buffers} buffers")
        known = self.at[name].calls.keys() if name in self.at else set()
        if not known >= {*ids, *header["begun"]} or len(set(ids)) < len(ids):
            raise ValueError("it names a call that it does not have")
        if any(how > AGAIN for how in hows):
            raise ValueError(f"a call cannot end in the way {max(hows)}")

    def on_suspect(self, name: str) -> None:
        """A node is silent: others may do its calls as well."""
        if name in self.at:
            self._put_back(self.at[name].calls.values())

    def on_ready(self) -> None:
        """A node is there: it may do what was given to silent ones when there were no others."""
        for name in self._roster.suspect:
            self.on_suspect(name)

    def on_lost(self, name: str) -> None:
        """A node is gone: what it had is queued again."""
        at = self.at.get(name)
        if at is not None:
            self._put_back([self._leave(name, number) for number in list(at.calls)])
            for known in at.known:
                known.at.discard(name)
            del self.at[name]

    def fail_all(self, failure: Failure) -> list[Command]:
        """No call can be done any more."""
        calls = list(self.calls.values())
        for call in calls:
            self._over(call)
        self._queues.clear()
        self._queued = 0
        return [Ended([], [], [(call, failure) for call in calls])] if calls else []

    # Giving out

    def give_out(self) -> list[Command]:
        """Give queued calls to nodes that have room for more."""
        commands: list[Command] = []
        while self._unneeded:
            commands += self._dismiss(self._unneeded.pop())
        if self._queued and not self._roster.useful and not self._roster.somebody_comes:
            return commands + self.fail_all(Failure("unreachable", self._roster.reasons))
        for node, at in self._by_load() if self._queued else ():
            name = node.name
            share = -(-self._queued * node.workers // (2 * self._roster.capacity))
            count = min(at.room, max(share, node.up - len(at.calls)))
            while count > 0 and at.room > 0 and (batch := self._take(name, min(count, MAX_BATCH), at.nbytes)):
                count -= len(batch)
                commands += self._send(node, at, batch)
        return commands

    def _by_load(self) -> list[tuple[NodeRecord, AtNode]]:
        """The nodes that have room, those with the least to do first."""
        found = []
        for name, node in self._roster.useful.items():
            at = self._at(name)
            if at.room > 0:
                found.append((node, at))
        return (
            found
            if len(found) < 2
            else sorted(found, key=lambda pair: (len(pair[1].calls) + pair[0].down) / pair[0].workers)
        )

    def _send(self, node: NodeRecord, at: AtNode, batch: list[Call]) -> list[Command]:
        name = node.name
        if not at.calls:
            at.restart(self._clock())
            if name not in self._roster.owed:
                node.heard, node.pinged = self._clock(), False
        new: list[Function] = []
        lacking: list[Argument] = []
        for call in batch:
            call.nodes += (name,)
            at.calls[call.id] = call
            at.nbytes += len(call.data)
            if name not in call.function.at:
                call.function.at.add(name)
                at.known.add(call.function)
                new.append(call.function)
            for argument in call.large:
                if name not in argument.at:
                    argument.at.add(name)
                    at.known.add(argument)
                    lacking.append(argument)
        header: dict[str, Any] = {
            "ids": [call.id for call in batch],
            "of": [call.function.number for call in batch],
            "new": [function.number for function in new],
        }
        large = [[place, [argument.key for argument in call.large]] for place, call in enumerate(batch) if call.large]
        if large:
            header["large"] = large
        buffers = (*[function.description for function in new], *[call.data for call in batch])
        refs = [Part(of_argument(argument.key), 0, None) for argument in lacking]
        return [Send(name, Kind.CALLS, header, buffers), *(node.transfers.add(0, refs) if refs else ())]

    def _take(self, name: str, count: int, nbytes: int) -> list[Call]:
        """Calls for a node, which has `nbytes` already: one of each submitter in turns, its first ones first."""
        batch: list[Call] = []
        passed: list[Call] = []  # that this node has already
        while self._queued and len(batch) < count and nbytes <= MAX_BYTES:
            submitter, queue = next(iter(self._queues.items()))
            call = queue.popleft()
            call.queued = False
            self._queued -= 1
            if not queue:
                del self._queues[submitter]
            elif not call.over:
                self._queues.move_to_end(submitter)
            if call.over:
                continue
            if name in call.nodes:
                passed.append(call)
            else:
                batch.append(call)
                nbytes += len(call.data)
        self._put_back(passed)
        return batch

    def fetch_for(self, *names: str) -> list[Command]:
        """Have the node with the most waiting calls give half of them back, if one of these has too few."""
        ready = self._roster.ready
        idle = [name for name in names if name in ready and len(self._at(name).calls) < ready[name].up]
        if self._queued or not self.calls or not idle:
            return []
        busy = [(len(at.calls) - ready[other].up, other) for other, at in self.at.items() if other in ready]
        spare, other = max(busy)
        if spare <= 0 or other in idle or self.at[other].recalled:
            return []
        self.at[other].recalled = True
        return [Send(other, Kind.RECALL, {"count": -(-spare // 2), "cancelled": []})]

    # Inside

    def _at(self, name: str) -> AtNode:
        if name not in self.at:
            self.at[name] = AtNode(2 * self._roster.nodes[name].workers)
        return self.at[name]

    def _queue_of(self, submitter: int) -> deque[Call]:
        if submitter not in self._queues:
            self._queues[submitter] = deque()
        return self._queues[submitter]

    def _put_back(self, calls: Iterable[Call]) -> None:
        """Queue those that are needed and that no ready node has, before all that were submitted after them."""
        back: dict[int, list[Call]] = {}
        for call in calls:
            if not call.over and not call.queued and self._roster.ready.keys().isdisjoint(call.nodes):
                back.setdefault(call.submitter, []).append(call)
                call.queued = True
                self._queued += 1
        for submitter, its in back.items():
            queue, last = self._queue_of(submitter), max(call.id for call in its)
            while queue and queue[0].id < last:
                its.append(queue.popleft())
            queue.extendleft(sorted(its, key=lambda call: -call.id))

    def _leave(self, name: str, number: int) -> Call:
        """The node has this call no longer."""
        at = self.at[name]
        call = at.calls.pop(number)
        if number in at.begun:
            at.begun.discard(number)
            self._roster.hold(name, -1)
        at.nbytes -= len(call.data)
        call.nodes = () if len(call.nodes) == 1 else tuple(other for other in call.nodes if other != name)
        if call.over:
            self._let_go(call)
        return call

    def _let_go(self, call: Call) -> None:
        """A call that has ended: no node has it any more, perhaps."""
        if call.nodes:
            return
        for argument in call.large:
            argument.calls -= 1
        function = call.function
        function.calls -= 1
        if function.forgotten and not function.calls:
            self._unneeded.append(function)

    def _over(self, call: Call) -> bool:
        """The call has ended; False if it had already."""
        if call.over:
            return False
        call.over = True
        del self.calls[call.id]
        self._let_go(call)
        return True

    @property
    def busy(self) -> Iterable[str]:
        """The nodes that have calls."""
        return [name for name, at in self.at.items() if at.calls]
