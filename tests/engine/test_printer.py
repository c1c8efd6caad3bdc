"""What user code printed is shown line by line, each with host and worker, and disturbs nothing."""

from __future__ import annotations

import io
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qjam.engine.printer import MAX_LINE, Printer

OUT, ERR = 1, 2


class Shown:
    """What the printer says it has shown, as the node that gets credit for it sees it."""

    def __init__(self) -> None:
        self.sizes: list[tuple[str, int]] = []

    def __call__(self, node: str, size: int) -> None:
        self.sizes.append((node, size))


@pytest.fixture
def shown() -> Shown:
    return Shown()


@pytest.fixture
def printer(shown: Shown) -> Iterator[Printer]:
    printer = Printer(True, shown)
    yield printer
    printer.close()


def text(printer: Printer, capsys: pytest.CaptureFixture[str], *pieces: bytes, worker: int = 0) -> str:
    for piece in pieces:
        printer.put("node", "host", worker, OUT, piece)
    printer.flush()
    return capsys.readouterr().out


def test_a_line_says_where_it_comes_from(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(printer, capsys, b"hello\n", worker=3) == "[host 3] hello\n"


def test_what_no_worker_printed_names_the_host_alone(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(printer, capsys, b"hello\n", worker=-1) == "[host] hello\n"


def test_each_line_has_its_prefix(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(printer, capsys, b"a\n\nb\n") == "[host 0] a\n[host 0] \n[host 0] b\n"


def test_a_line_that_comes_in_pieces_is_shown_once_it_is_whole(
    printer: Printer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text(printer, capsys, b"he", b"ll", b"o\nnext", b"\n") == "[host 0] hello\n[host 0] next\n"


def test_a_begun_line_is_shown_at_the_end_of_its_round(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(printer, capsys, b"one") == "[host 0] one\n"
    assert text(printer, capsys, b"two\n") == "[host 0] two\n"


def test_a_carriage_return_ends_a_line(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(printer, capsys, b"10 %\r20 %\rdone\r\n") == "[host 0] 10 %\n[host 0] 20 %\n[host 0] done\n"


def test_a_character_that_comes_in_pieces_is_whole(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    encoded = "ä€\n".encode()
    assert text(printer, capsys, *(encoded[i : i + 1] for i in range(len(encoded)))) == "[host 0] ä€\n"


def test_bytes_that_are_no_text_are_replaced(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(printer, capsys, b"\xff!\n") == "[host 0] �!\n"


def test_lines_of_different_workers_do_not_mix(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    printer.put("node", "host", 0, OUT, b"one ")
    printer.put("node", "host", 1, OUT, b"other\n")
    printer.put("node", "host", 0, OUT, b"line\n")
    printer.flush()
    assert capsys.readouterr().out == "[host 1] other\n[host 0] one line\n"


def test_lines_of_different_nodes_do_not_mix(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    printer.put("node1", "host", 0, OUT, b"one ")
    printer.put("node2", "host", 0, OUT, b"other\n")
    printer.put("node1", "host", 0, OUT, b"line\n")
    printer.flush()
    assert capsys.readouterr().out == "[host 0] other\n[host 0] one line\n"


def test_stderr_goes_to_stderr(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    printer.put("node", "host", 0, OUT, b"out ")
    printer.put("node", "host", 0, ERR, b"err\n")
    printer.put("node", "host", 0, OUT, b"put\n")
    printer.flush()
    captured = capsys.readouterr()
    assert captured.out == "[host 0] out put\n"
    assert captured.err == "[host 0] err\n"


def test_a_line_without_end_is_shown_at_the_close(capsys: pytest.CaptureFixture[str], shown: Shown) -> None:
    printer = Printer(True, shown)
    printer.put("node", "host", 0, OUT, b"no end")
    printer.put("node", "host", 1, ERR, b"neither")
    printer.close()
    captured = capsys.readouterr()
    assert captured.out == "[host 0] no end\n"
    assert captured.err == "[host 1] neither\n"


def test_a_line_without_end_that_is_too_long_is_shown_in_pieces(
    printer: Printer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = b"x" * (MAX_LINE - 1)
    assert text(printer, capsys, long, b"y", b"z\n") == f"[host 0] {long.decode()}y\n[host 0] z\n"


def test_a_megabyte_without_line_end_is_all_shown(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [b"x" * 10_000] * 100
    out = text(printer, capsys, *pieces, b"\n")
    assert out.count("x") == 1_000_000
    assert max(map(len, out.split("\n"))) < MAX_LINE + 10_000 + len("[host 0] ")


def test_a_large_text_is_shown_line_by_line(printer: Printer, capsys: pytest.CaptureFixture[str]) -> None:
    whole = b"".join(b"line %d\n" % number for number in range(20_000))
    out = text(printer, capsys, *(whole[i : i + 4099] for i in range(0, len(whole), 4099)))
    assert out.splitlines() == [f"[host 0] line {number}" for number in range(20_000)]


def test_credit_is_given_for_every_byte_once_it_is_shown(printer: Printer, shown: Shown) -> None:
    for data in (b"abc\n", b"no end", b"\n\n"):
        printer.put("node", "host", 0, OUT, data)
    printer.flush()
    assert shown.sizes == [("node", 4), ("node", 6), ("node", 2)]


def test_without_echo_nothing_is_shown_but_credit_is_given(capsys: pytest.CaptureFixture[str], shown: Shown) -> None:
    printer = Printer(False, shown)
    printer.put("node", "host", 0, OUT, b"hello\n")
    printer.close()
    assert capsys.readouterr().out == ""
    assert shown.sizes == [("node", 6)]


class Broken(io.StringIO):
    """A stream whose reader is gone."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


class Gate(io.StringIO):
    """A terminal that shows nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.standing = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.standing.set()
        self.free.wait(10)
        return super().write(text)


class Between:
    """A queue that has another thread's flush come through just before something is put."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def put(self, item: Any) -> None:
        if isinstance(item, tuple):
            reached = threading.Event()
            self.inner.put(reached)
            assert reached.wait(10)
        self.inner.put(item)

    def get(self) -> Any:
        return self.inner.get()

    def empty(self) -> bool:
        empty: bool = self.inner.empty()
        return empty


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), ValueError("I/O operation on closed file"), UnicodeEncodeError("ascii", "ä", 0, 1, "")]
)
def test_a_stdout_that_nobody_reads_does_not_stop_the_work(
    printer: Printer, shown: Shown, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(error))
    printer.put("node", "host", 0, OUT, b"lost\n")
    printer.flush()
    assert shown.sizes == [("node", 5)]


def test_a_closed_stdout_does_not_stop_the_work(
    printer: Printer, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    printer.put("node", "host", 0, OUT, b"lost\n")
    printer.flush()
    assert shown.sizes == [("node", 5)]


def test_a_missing_stdout_does_not_stop_the_work(
    printer: Printer, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    printer.put("node", "host", 0, OUT, b"lost\n")
    printer.flush()
    assert shown.sizes == [("node", 5)]


def test_stdout_is_looked_up_when_there_is_something_to_show(printer: Printer, monkeypatch: pytest.MonkeyPatch) -> None:
    redirected = io.StringIO()
    printer.put("node", "host", 0, OUT, b"before\n")
    printer.flush()
    monkeypatch.setattr(sys, "stdout", redirected)  # as contextlib.redirect_stdout does
    printer.put("node", "host", 0, OUT, b"after\n")
    printer.flush()
    assert redirected.getvalue() == "[host 0] after\n"


def test_a_stdout_that_stands_still_holds_up_nobody_who_puts(
    printer: Printer, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = Gate()
    monkeypatch.setattr(sys, "stdout", stdout)
    printer.put("node", "host", 0, OUT, b"first\n")
    assert stdout.standing.wait(10)
    for _ in range(1000):
        printer.put("node", "host", 0, OUT, b"more\n")
    assert shown.sizes == []
    stdout.free.set()
    printer.flush()
    assert len(shown.sizes) == 1001


def test_nothing_is_started_before_there_is_something_to_show(printer: Printer) -> None:
    before = threading.active_count()
    printer.flush()
    assert threading.active_count() == before


def test_close_may_be_called_again(printer: Printer) -> None:
    printer.put("node", "host", 0, OUT, b"line\n")
    printer.close()
    printer.close()


def test_flush_shows_what_was_put_while_another_flush_ended(printer: Printer, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, at_return = Gate(), []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    printer.put("node", "host", 0, OUT, b"first\n")
    printer.flush()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(printer, "_queue", Between(printer._queue))
    printer.put("node", "host", 0, OUT, b"second\n")

    def flush() -> None:
        printer.flush()
        at_return.append(stdout.getvalue())

    flushing = threading.Thread(target=flush)
    flushing.start()
    flushing.join(0.2)  # it must wait for the gate: time for it to be wrong
    stdout.free.set()
    flushing.join(10)
    assert at_return == ["[host 0] second\n"]


def test_flush_after_close_comes_back(printer: Printer) -> None:
    # A thread in `run` flushes while another closes the master.
    printer.put("node", "host", 0, OUT, b"line\n")
    printer.close()
    waiter = threading.Thread(target=printer.flush, daemon=True)
    waiter.start()
    waiter.join(2)
    hangs = waiter.is_alive()
    while hangs and waiter.is_alive():  # let it go, or it would be left behind
        try:
            left = printer._queue.get(timeout=0.1)
        except queue.Empty:
            continue
        if isinstance(left, threading.Event):
            left.set()
    assert not hangs
