"""Which node gets which calls, by example."""

from __future__ import annotations

from typing import Any

import pytest

from qjam.dispatch import calls as module
from qjam.dispatch.call import Call, Function
from qjam.dispatch.calls import MAX_BYTES, POISON
from qjam.dispatch.commands import Command, Ended, Send
from qjam.dispatch.dispatcher import Dispatch
from qjam.dispatch.liveness import SUSPECT_AFTER
from qjam_worker.values.outcomes import AGAIN, IN_FILE, LOST, VALUE
from qjam_worker.wire.frames import Kind


class Cluster:
    """Nodes with two workers each."""

    def __init__(self, *names: str) -> None:
        self.dispatch = Dispatch()
        self.now = 0.0
        self.function = Function(1, b"f")
        for name in names:
            self.join(name)

    def join(self, name: str, workers: int = 2) -> list[Command]:
        self.dispatch.add_node(name, name, workers)
        self.dispatch.on_hello(name, {"workers": workers, "credit": 1})
        return self.dispatch.on_ready(name, list(range(workers)))

    def submit(self, count: int, submitter: int = 0, data: bytes = b"x") -> list[Command]:
        calls = [Call(submitter, self.function, data) for _ in range(count)]
        return self.dispatch.on_calls(calls, self.now)

    def returns(self, name: str, *pairs: tuple[int, int], **more: Any) -> list[Command]:
        ids, how = [number for number, _ in pairs], [how for _, how in pairs]
        header = {"ids": ids, "how": how, "frames": [1] * len(ids), "begun": [], "left": 0, **more}
        return self.dispatch.calls.on_returns(name, header, [b"v"] * len(ids))

    def fall_silent(self, *names: str) -> list[Command]:
        commands = []
        while self.now < SUSPECT_AFTER + 2.0:
            self.now += 1.0
            for name in self.dispatch.nodes.keys() - set(names):
                self.dispatch.on_heard(name, self.now)
            commands += self.dispatch.on_timer(self.now)
        return commands


def sent(commands: list[Command]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for command in commands:
        if isinstance(command, Send) and command.kind is Kind.CALLS:
            found.setdefault(command.node, []).extend(command.header["ids"])
    return found


def ended(commands: list[Command]) -> list[int]:
    its = [command for command in commands if isinstance(command, Ended)]
    return [one.call.id for command in its for one in command.returned] + [
        call.id for command in its for call, _ in command.failed
    ]


def recalls(commands: list[Command]) -> list[tuple[str, int, list[int]]]:
    its = [command for command in commands if isinstance(command, Send) and command.kind is Kind.RECALL]
    return [(command.node, command.header["count"], command.header["cancelled"]) for command in its]


def test_idle_nodes_share_calls_out() -> None:
    assert sent(Cluster("a", "b").submit(4)) == {"a": [1, 2], "b": [3, 4]}


def test_a_call_ends_once() -> None:
    its = Cluster("a")
    its.submit(1)
    assert ended(its.returns("a", (1, VALUE))) == [1]
    with pytest.raises(ValueError, match="does not have"):
        its.returns("a", (1, VALUE))


@pytest.mark.parametrize(
    "header",
    [
        {"ids": [2], "how": [0], "frames": [1]},
        {"ids": [1, 1], "how": [0, 0], "frames": [1, 0]},
        {"ids": [1], "how": [], "frames": [1]},
        {"ids": [1], "how": [0], "frames": [2]},
        {"ids": [1], "how": [0], "frames": [0]},
        {"ids": [1], "how": [IN_FILE], "frames": [1]},
        {"ids": [1], "how": [0], "frames": [1], "begun": [7]},
    ],
)
def test_returns_that_make_no_sense_are_refused_and_change_nothing(header: dict[str, Any]) -> None:
    its = Cluster("a")
    its.submit(1)
    with pytest.raises(ValueError, match="call"):
        its.dispatch.calls.on_returns("a", {"begun": [], "left": 0, **header}, [b"v"])
    assert ended(its.returns("a", (1, VALUE))) == [1]


def test_submitters_take_turns_also_where_one_has_cancelled_many() -> None:
    its = Cluster()
    its.dispatch.add_node("a", "a", 2)
    its.submit(6, submitter=0)
    its.submit(3, submitter=1)
    its.dispatch.calls.cancel([its.dispatch.calls.calls[number] for number in (1, 2, 3)])
    its.dispatch.on_hello("a", {"workers": 2, "credit": 1})
    assert sent(its.dispatch.on_ready("a", [0, 1]))["a"] == [4, 7, 5, 8]


def test_what_comes_back_stands_where_it_stood() -> None:
    its = Cluster("a")
    assert sent(its.submit(10)) == {"a": [1, 2, 3, 4]}
    assert sent(its.returns("a", (4, AGAIN), (2, AGAIN), (3, AGAIN), recalled=True))["a"] == [2, 3, 4]


def test_the_calls_of_a_lost_node_go_to_another_one_first() -> None:
    its = Cluster("a", "b")
    its.submit(20)
    its.dispatch.on_node_lost("a", "gone")
    its.dispatch.on_remove("a", "gone")
    at = its.dispatch.calls.at["b"]
    freed = list(at.calls)
    assert sent(its.returns("b", *((number, VALUE) for number in freed)))["b"][:2] == [1, 2]


def test_a_call_that_ends_its_workers_ends_itself() -> None:
    its = Cluster("a")
    its.submit(1)
    for _ in range(POISON - 1):
        assert sent(its.returns("a", (1, LOST))) == {"a": [1]}
    assert ended(its.returns("a", (1, LOST))) == [1]


def test_coming_back_unbegun_is_not_held_against_a_call() -> None:
    its = Cluster("a")
    its.submit(1)
    for _ in range(2 * POISON):
        assert sent(its.returns("a", (1, AGAIN))) == {"a": [1]}


def test_others_do_the_calls_of_a_node_that_falls_silent() -> None:
    its = Cluster("a", "b")
    its.submit(2)
    assert its.dispatch.calls.at["a"].calls.keys() == {1, 2}
    assert sent(its.fall_silent("a")) == {"b": [1, 2]}
    assert recalls(its.returns("b", (1, VALUE)))[0] == ("a", 0, [1])


def test_a_silent_node_is_not_waited_for_when_another_one_gives_its_calls_back() -> None:
    its = Cluster("a", "b")
    its.submit(1)
    its.fall_silent("a")
    assert sent(its.returns("b", (1, AGAIN))) == {"b": [1]}


def test_a_node_that_comes_does_what_only_silent_ones_have() -> None:
    its = Cluster("a")
    its.submit(1)
    its.fall_silent("a")
    assert sent(its.join("b")) == {"b": [1]}


def test_a_call_is_queued_once_however_often_its_node_falls_silent() -> None:
    its = Cluster("a")
    its.submit(1)
    for _ in range(3):
        its.fall_silent("a")
        its.dispatch.on_heard("a", its.now)
        its.now = its.dispatch.nodes["a"].heard = 0.0
        its.dispatch._liveness.at = 1.0
    assert its.dispatch.calls._queued <= 1


def test_an_idle_node_has_a_busy_one_give_half_of_what_waits_back() -> None:
    its = Cluster("a")
    its.submit(4)
    while its.dispatch.calls._queued:
        its.submit(0)
    assert recalls(its.join("b")) == [("a", 1, [])]
    assert recalls(its.returns("a", (1, VALUE))) == []


def test_a_message_is_bounded_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    its = Cluster("a")
    its.dispatch.calls._at("a").window = module.MAX_WINDOW
    size = MAX_BYTES // 4
    assert len(sent(its.submit(40, data=bytes(size)))["a"]) == 5


def test_a_cancelled_call_is_over_and_its_node_is_told() -> None:
    its = Cluster("a")
    its.submit(1)
    calls = its.dispatch.calls
    assert recalls(calls.cancel([calls.calls[1]])) == [("a", 0, [1])]
    assert not calls.calls
    assert ended(its.returns("a", (1, VALUE))) == []


def test_a_function_is_forgotten_when_its_last_call_is_gone() -> None:
    its = Cluster("a")
    its.submit(1)
    assert its.dispatch.calls.forget(its.function) == []
    forgets = [c for c in its.returns("a", (1, VALUE)) if isinstance(c, Send) and c.kind is Kind.FORGET]
    assert [command.header["functions"] for command in forgets] == [[1]]


def test_calls_fail_when_no_node_is_left() -> None:
    its = Cluster("a")
    its.submit(1)
    its.dispatch.on_node_lost("a", "gone")
    assert ended(its.dispatch.reassign()) == [1]
    assert not its.dispatch.calls._queued
