"""Messages over pipes come whole, in order, whatever their size, and the reader sees the end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from qjam_worker.ipc.pipes import READ, Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a channel."""
    there, back = os.pipe(), os.pipe()
    pair = Channel(back[0], there[1]), Channel(there[0], back[1])
    yield pair
    for end in pair:
        for fd in (end.read_fd, end.write_fd):
            try:
                os.close(fd)
            except OSError:
                pass  # the test has closed it


def test_a_message_arrives_as_it_was_sent(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    message = {"op": "run", "slices": [[0, "path", 2**40], [1, None, 0]], "code": b"\x00\xff", "text": "ä", "x": 0.5}
    ours.send(message)
    assert theirs.wait() == message


def test_both_ends_send(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send("ask")
    assert theirs.wait() == "ask"
    theirs.send("answer")
    assert ours.wait() == "answer"


def test_keys_may_be_numbers(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send({1: "one"})
    assert theirs.wait() == {1: "one"}


def test_messages_that_arrive_together_are_received_together(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    for number in range(5):
        ours.send(number)
    assert theirs.receive() == [0, 1, 2, 3, 4]


def test_wait_gives_one_message_and_keeps_the_others(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send("first")
    ours.send("second")
    assert theirs.wait() == "first"
    assert theirs.wait() == "second"


def test_a_message_that_is_not_whole_is_not_received_yet(ends: tuple[Channel, Channel]) -> None:
    _, theirs = ends
    there = ends[0].write_fd
    os.write(there, b"\xa5hel")
    assert theirs.receive() == []
    os.write(there, b"lo\xc3\xa5")
    assert theirs.receive() == ["hello", True]


def test_a_message_may_come_byte_by_byte(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    received = []
    for byte in b"\x82\xa2op\xa4done\xa3seq\x07":
        os.write(ours.write_fd, bytes([byte]))
        received += theirs.receive()
    assert received == [{"op": "done", "seq": 7}]


def test_a_message_may_be_larger_than_a_pipe(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    source = os.urandom(3 * 1024 * 1024 + 1)
    sender = threading.Thread(target=ours.send, args=[{"source": source}])
    sender.start()
    try:
        assert theirs.wait() == {"source": source}
    finally:
        sender.join()


@pytest.mark.parametrize("size", [READ - 1, READ, READ + 1])
def test_a_message_of_about_the_size_of_one_read_arrives(ends: tuple[Channel, Channel], size: int) -> None:
    ours, theirs = ends
    ours.send(b"x" * size)
    ours.send("next")
    assert theirs.wait() == b"x" * size
    assert theirs.wait() == "next"


def test_the_end_of_the_other_process_shows(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send("last")
    ours.close()
    assert theirs.wait() == "last"
    with pytest.raises(EOFError):
        theirs.wait()


def test_the_end_in_the_middle_of_a_message_shows(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    os.write(ours.write_fd, b"\xa5hel")
    ours.close()
    assert theirs.receive() == []
    with pytest.raises(EOFError):
        theirs.receive()


def test_to_send_to_a_peer_that_is_gone_is_no_error(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    theirs.close()
    ours.send("nobody hears")
    with pytest.raises(EOFError):
        ours.receive()
