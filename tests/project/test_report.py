"""The table of how hosts started."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjam.report import PHASES, HostReport, failures, table

COLOUR = re.compile(r"\033\[\d*m")
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"

READY = HostReport("node1", {phase: number / 10 for number, phase in enumerate(PHASES)}, route="direct")
LOCAL = HostReport("local", {"ready": 12.345}, route="local")
REFUSED = HostReport("alice@node2:2222", {"resolve": 0.01}, failed="connect", why="port 2222: Connection refused")
BROKEN = HostReport(
    "node3", {"resolve": 0.0}, failed="python", why="python3 did not start", stderr=["no room", "on the disk"]
)

words = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=20)
hosts = st.builds(
    HostReport,
    host=words,
    phases=st.dictionaries(st.sampled_from(PHASES), st.floats(0, 1e5)),
    route=st.sampled_from(["", "local", "direct", "tunnel", "stdio"]),
    failed=st.sampled_from([None, "", *PHASES]),
    why=st.text(max_size=200),
    stderr=st.lists(st.text(max_size=50), max_size=3),
)


def test_each_host_has_a_line_with_the_seconds_of_its_phases_and_its_route():
    assert table([READY, LOCAL]) == (
        "host   resolve  connect  host key  auth  python  bundle  way back  ready   route\n"
        "node1     0.00     0.10      0.20  0.30    0.40    0.50      0.60   0.70  direct\n"
        "local        -        -         -     -       -       -         -  12.35   local"
    )


def test_the_phase_that_failed_is_marked_and_the_reason_stands_below():
    assert table([REFUSED]) == (
        "host              resolve  connect  host key  auth  python  bundle  way back  ready  route\n"
        "alice@node2:2222     0.01   failed         -     -       -       -         -      -      -\n"
        "\n"
        "alice@node2:2222: connect: port 2222: Connection refused"
    )


def test_the_last_lines_of_stderr_stand_below_the_reason():
    lines = table([BROKEN, READY]).split("\n")
    assert lines[3:] == ["", "node3: python: python3 did not start", "    | no room", "    | on the disk"]


def test_further_columns_stand_on_the_right():
    lines = table([READY, REFUSED], more=[["workers", "8", "-"], ["MB/s", "112", "-"]]).split("\n")
    assert [line.split()[-2:] for line in lines[:3]] == [["workers", "MB/s"], ["8", "112"], ["-", "-"]]


def test_no_host_is_a_table_of_headings():
    assert table([]) == "host  resolve  connect  host key  auth  python  bundle  way back  ready  route"


def test_colour_tells_who_failed_and_where():
    lines = table([READY, REFUSED], colour=True).split("\n")
    assert f"{GREEN}node1" in lines[1]
    assert RED not in lines[1]
    assert f"{RED}alice@node2:2222" in lines[2]
    assert f"{RED} failed{PLAIN}" in lines[2]
    assert lines[4].startswith(RED)


def test_commands_in_a_reason_are_not_coloured():
    unknown = HostReport("node1", failed="host key", why="it is not known; add it with:\n    echo key >> known_hosts")
    assert table([unknown], colour=True).split("\n")[-1] == "    echo key >> known_hosts"


def test_the_name_of_the_host_is_not_told_twice():
    report = HostReport("node1", failed="host key", why="node1: its host key is not known")
    assert str(report) == "node1: host key: its host key is not known"


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (READY, "node1: ready"),
        (HostReport("node1", {"resolve": 1.0}), "node1: starting"),
        (REFUSED, "alice@node2:2222: connect: port 2222: Connection refused"),
        (HostReport("node1", failed="", why="a defect"), "node1: a defect"),
    ],
)
def test_a_report_is_a_line(report, text):
    assert str(report) == text


def test_failures_are_those_that_failed():
    assert failures([READY, REFUSED, LOCAL, BROKEN]) == [REFUSED, BROKEN]


@given(st.lists(hosts))
def test_columns_stay_aligned(reports):
    rows = table(reports).split("\n")[: len(reports) + 1]
    assert len({len(row) for row in rows}) == 1
    ends = [found.end() for found in re.finditer(r"host key|way back|\S+", rows[0])][1:]  # but that of `host`
    for row in rows[1:]:
        assert all(row[end - 1] != " " and row[end : end + 2].strip() == "" for end in ends)


@given(st.lists(hosts))
def test_colour_changes_nothing_but_the_colour(reports):
    more = [["more", *(str(number) for number, _ in enumerate(reports))]]
    assert COLOUR.sub("", table(reports, colour=True, more=more)) == table(reports, more=more)


@given(st.lists(hosts))
def test_a_host_cannot_send_the_terminal_commands(reports):
    assert all(line.isprintable() for line in table(reports).split("\n"))
