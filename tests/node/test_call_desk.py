"""The calls of a node, by example: the queue, the rings and the workers are played."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgpack
import pytest

from qjam_worker.ipc.call_pipe import Record
from qjam_worker.ipc.files import NoRoom
from qjam_worker.ipc.returns import CALL, WROTE, Return
from qjam_worker.node.calls import LOOK, CallDesk
from qjam_worker.node.commands import Command, GiveCalls, Kill, Spare, StopCall, Tell, YieldCalls
from qjam_worker.node.seats import WorkerState, give_calls, yield_calls
from qjam_worker.values.outcomes import AGAIN, IN_FILE, LOST, RAISED, STOPPED, VALUE

ROOM = 4  # calls that the queue holds


class Queue:
    def __init__(self) -> None:
        self.records: deque[Record] = deque()

    def __len__(self) -> int:
        return len(self.records)

    def put(self, records: list[Record]) -> int:
        some = records[: ROOM - len(self.records)]
        self.records += some
        return len(some)

    def drain(self) -> list[Record]:
        records = [*self.records]
        self.records.clear()
        return records


class Arenas:
    def __init__(self) -> None:
        self.users = 0
        self.room = True

    def put(self, data: bytes, users: int = 1) -> tuple[int, int]:
        if not self.room:
            raise NoRoom("full")
        self.users += users
        return 1, 0

    def free(self, number: int) -> None:
        self.users -= 1


class Ring:
    def __init__(self) -> None:
        self.words = [0] * 8
        self.records: list[Return] = []
        self.spoilt = False

    def take(self) -> list[Return]:
        if self.spoilt:
            raise ValueError("spoilt")
        records, self.records = self.records, []
        return records

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


class Host:
    """A desk and two workers."""

    def __init__(self) -> None:
        self.queue, self.arenas, self.rings = Queue(), Arenas(), [Ring(), Ring()]
        self.files: dict[str, bytes] = {}
        self.desk = CallDesk(self.queue, self.arenas, self.rings, self.open, None)  # type: ignore[arg-type]
        self.now = 1.0

    def open(self, path: str, sizes: list[int]) -> list[Any]:
        return [self.files.pop(path)]

    def calls(self, *ids: int) -> list[Command]:
        new = [] if self.desk._functions or self.desk._homeless else [7]
        header = {"ids": list(ids), "of": [7] * len(ids), "new": new}
        return self.desk.on_calls(header, [b"f"] * len(new) + [b"args"] * len(ids))

    def recall(self, count: int = 0, *cancelled: int) -> list[Command]:
        return self.desk.on_recall({"count": count, "cancelled": list(cancelled)}, self.now)

    def give(self, *workers: int) -> None:
        for worker in workers:
            self.desk.on_given(worker, self.now)

    def take(self, worker: int, *, name: bool = True) -> int:
        call = self.queue.records.popleft().call
        if name:
            self.rings[worker].words[CALL] = call
        return call

    def write(self, worker: int, call: int, how: int = VALUE, data: bytes = b"value") -> None:
        ring = self.rings[worker]
        ring.words[CALL] = 0
        ring.words[WROTE] += 8
        ring.records.append(Return(call, how, data))

    def look(self, later: float = LOOK) -> list[Command]:
        self.now += later
        return self.desk.look(self.now)

    def exit(self, worker: int) -> list[Command]:
        return self.desk.on_exit(worker, "was killed", self.now)


@pytest.fixture
def host() -> Host:
    return Host()


def told(commands: list[Command]) -> list[tuple[int, int]]:
    """The calls that have ended, and how."""
    headers = [command.header for command in commands if isinstance(command, Tell)]
    return [pair for header in headers for pair in zip(header["ids"], header["how"])]


def begun(commands: list[Command]) -> list[int]:
    return [call for command in commands if isinstance(command, Tell) for call in command.header["begun"]]


# ---- what goes well -------------------------------------------------------------------------------------------


def test_calls_wait_in_the_queue_and_return_from_a_ring(host: Host) -> None:
    assert host.calls(1, 2) == []
    assert host.desk.waiting == 2
    host.give(0)
    assert host.take(0) == 1
    host.write(0, 1)
    assert told(host.look()) == [(1, VALUE)]
    assert host.desk.waiting == 1


def test_what_the_queue_has_no_room_for_follows_in_its_order(host: Host) -> None:
    host.calls(*range(1, 8))
    host.give(0)
    taken = []
    while host.queue.records:
        taken.append(host.take(0))
        host.write(0, taken[-1])
        host.look()
    assert taken == list(range(1, 8))


def test_a_call_is_told_to_have_begun_when_it_was_seen_for_a_while(host: Host) -> None:
    host.calls(1)
    host.give(0)
    host.take(0)
    assert [begun(host.look(later)) for later in (LOOK, LOOK / 4, LOOK, LOOK)] == [[], [], [1], []]
    assert host.desk.at is None


def test_a_worker_that_has_just_begun_a_call_is_looked_at_again(host: Host) -> None:
    host.calls(1, 2)
    host.give(0)
    host.take(0)
    host.look()
    host.look(LOOK / 4)
    assert host.desk.at is not None


def test_arguments_and_functions_are_freed(host: Host) -> None:
    host.calls(1, 2)
    assert host.arenas.users == 3
    host.give(0)
    for call in (1, 2):
        host.take(0)
        host.write(0, call)
    host.look()
    assert host.arenas.users == 1
    host.desk.on_forget({"functions": [7], "arguments": []})
    assert host.arenas.users == 0


def test_a_result_in_a_file_is_a_value(host: Host) -> None:
    host.calls(1)
    host.give(0)
    host.take(0)
    host.files["path"] = b"large"
    host.write(0, 1, IN_FILE, msgpack.packb(["path", [5]]))
    (told_,) = host.look()
    assert isinstance(told_, Tell)
    assert (told_.header["how"], told_.buffers) == ([VALUE], [b"large"])


@pytest.mark.parametrize("data", [msgpack.packb(["gone", [5]]), b"garbage", msgpack.packb(5)])
def test_a_result_that_cannot_be_opened_is_an_error_of_its_call(host: Host, data: bytes) -> None:
    host.calls(1)
    host.give(0)
    host.take(0)
    host.write(0, 1, IN_FILE, data)
    assert told(host.look()) == [(1, RAISED)]


# ---- recalled and cancelled -----------------------------------------------------------------------------------


def test_the_last_ones_that_nobody_has_taken_are_given_back(host: Host) -> None:
    host.calls(1, 2, 3, 4, 5, 6)
    host.give(0)
    host.take(0)
    (answer,) = host.recall(3)
    assert isinstance(answer, Tell)
    assert told([answer]) == [(6, AGAIN), (5, AGAIN), (4, AGAIN)]
    assert answer.header["recalled"] is True
    assert [record.call for record in host.queue.records] == [2, 3]


def test_who_asks_for_some_back_is_answered_though_there_are_none(host: Host) -> None:
    (answer,) = host.recall(3)
    assert isinstance(answer, Tell)
    assert answer.header["recalled"] is True


def test_a_cancelled_call_that_waits_ends_at_once_and_one_that_runs_is_stopped(host: Host) -> None:
    host.calls(1, 2)
    host.give(0)
    host.take(0)
    commands = host.recall(0, 1, 2)
    assert told(commands) == [(2, STOPPED)]
    assert StopCall(0, 1) in commands
    host.write(0, 1, STOPPED, b"")
    commands = host.look()
    assert told(commands) == [(1, STOPPED)]
    assert Spare(0) in commands


def test_a_cancelled_call_is_stopped_when_it_is_named(host: Host) -> None:
    host.calls(1)
    host.give(0)
    host.take(0, name=False)
    assert host.recall(0, 1) == []
    host.rings[0].words[CALL] = 1
    assert host.look() == [StopCall(0, 1)]


def test_a_cancelled_call_that_an_unfit_process_gives_back_is_not_begun_again(host: Host) -> None:
    host.calls(1)
    host.give(0)
    host.take(0)
    host.recall(0, 1)
    host.write(0, 1, AGAIN, b"")
    assert told(host.look()) == [(1, STOPPED)]
    assert host.desk.waiting == 0


# ---- workers that die -----------------------------------------------------------------------------------------


def test_only_the_call_that_a_dead_worker_ran_is_blamed(host: Host) -> None:
    host.calls(1, 2, 3)
    host.give(0, 1)
    for call in (1, 2):
        host.take(0)
        if call == 1:
            host.write(0, 1)
    assert told(host.exit(0)) == [(1, VALUE), (2, LOST)]
    assert [record.call for record in host.queue.records] == [3]


def test_what_a_dead_worker_had_taken_comes_back_unblamed(host: Host) -> None:
    host.calls(1, 2)
    host.give(0)
    host.take(0, name=False)
    assert told(host.exit(0)) == [(1, AGAIN)]


def test_what_a_living_worker_may_have_taken_is_not_given_up(host: Host) -> None:
    host.calls(1, 2)
    host.give(0, 1)
    host.take(0, name=False)
    host.take(1, name=False)
    assert told(host.exit(0)) == []
    assert told(host.look(100.0)) == []
    host.rings[1].words[CALL] = 2
    assert told(host.look()) == [(1, AGAIN)]
    host.write(1, 2)
    assert told(host.look()) == [(2, VALUE)]


def test_what_a_living_worker_has_written_meanwhile_clears_it_too(host: Host) -> None:
    host.calls(1, 2)
    host.give(0, 1)
    host.take(0, name=False)
    host.take(1, name=False)
    host.exit(0)
    host.write(1, 2)
    assert told(host.look()) == [(2, VALUE), (1, AGAIN)]


def test_what_an_unfit_process_gives_back_meanwhile_is_not_given_up(host: Host) -> None:
    host.calls(1, 2, 3)
    host.rings.append(Ring())
    host.give(0, 1, 2)
    for worker in (0, 1, 2):
        host.take(worker, name=False)
    host.exit(0)
    host.write(1, 2, AGAIN, b"")
    assert told(host.look()) == []
    host.rings[2].words[CALL] = 3
    assert told(host.look()) == [(1, AGAIN)]
    assert [record.call for record in host.queue.records] == [2]


def test_a_ring_that_is_spoilt_ends_its_worker_and_no_later_one(host: Host) -> None:
    host.calls(1, 2)
    host.give(0)
    host.write(0, host.take(0))
    host.rings[0].spoilt = True
    assert host.desk.on_called(0, host.now) == [Kill(0)]
    assert told(host.exit(0)) == [(1, AGAIN)]
    host.give(0)
    host.write(0, host.take(0))
    assert told(host.look()) == [(2, VALUE)]


def test_a_cancelled_call_that_had_to_be_killed_is_stopped_and_not_lost(host: Host) -> None:
    host.calls(1)
    host.give(0)
    host.take(0)
    host.recall(0, 1)
    assert told(host.exit(0)) == [(1, STOPPED)]


# ---- no room, no sense ----------------------------------------------------------------------------------------


def test_without_room_calls_fail_and_their_function_is_known_later(host: Host) -> None:
    host.arenas.room = False
    assert told(host.calls(1)) == [(1, RAISED)]
    host.arenas.room = True
    assert host.calls(2) == []
    assert host.desk.waiting == 1


@pytest.mark.parametrize(
    ("header", "buffers"),
    [
        ({"ids": [1], "of": [], "new": []}, 1),
        ({"ids": [1, 1], "of": [7, 7], "new": []}, 2),
        ({"ids": [9], "of": [7], "new": []}, 1),
        ({"ids": [0], "of": [7], "new": []}, 1),
        ({"ids": [1], "of": [8], "new": []}, 1),
        ({"ids": [1], "of": [7], "new": [7]}, 2),
        ({"ids": [1], "of": [8], "new": [8, 8]}, 3),
        ({"ids": [1], "of": [7], "new": []}, 3),
    ],
)
def test_calls_that_make_no_sense_are_refused(host: Host, header: dict[str, Any], buffers: int) -> None:
    host.calls(9)
    with pytest.raises(ValueError, match=r"call|function"):
        host.desk.on_calls(header, [b"x"] * buffers)


def test_a_function_that_is_not_known_cannot_be_forgotten(host: Host) -> None:
    with pytest.raises(ValueError, match="not known"):
        host.desk.on_forget({"functions": [7], "arguments": []})


# ---- rounds and calls take turns ------------------------------------------------------------------------------


def seats(count: int) -> list[WorkerState]:
    made = [WorkerState(index) for index in range(count)]
    for seat in made:
        seat.ready = True
    return made


def test_as_many_workers_take_calls_as_there_are() -> None:
    its = seats(3)
    assert give_calls(its, 2, 1.0) == [GiveCalls(0, None), GiveCalls(1, None)]
    assert [seat.busy for seat in its] == [True, True, False]


def test_what_a_round_has_had_a_worker_for_calls_have_it_for_too() -> None:
    (seat,) = seats(1)
    seat.busy, seat.round, seat.began = True, 5, 1.0
    assert seat.rest(3.0, calls_wait=True) == 5
    assert give_calls([seat], 1, 3.0, owed=True) == [GiveCalls(0, 2.0)]
    assert yield_calls([seat]) == []
    assert seat.rest(5.0, calls_wait=True) is None
    assert give_calls([seat], 1, 5.0, owed=True) == []


def test_who_takes_calls_without_a_limit_yields_to_a_round_once() -> None:
    (seat,) = seats(1)
    seat.ahead = 2.0
    assert give_calls([seat], 1, 1.0) == [GiveCalls(0, None)]
    assert yield_calls([seat]) == [YieldCalls(0)]
    assert yield_calls([seat]) == []
