"""bin/qjam-bench calls and joblib: their loops, what becomes of a party that fails, and small runs."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench_program import bench
from namespaces import namespaces_work
from needs import need
from qjam_bench import rivals
from qjam_bench.ends import calls as loops
from qjam_bench.ends.searches import Searched
from qjam_bench.experiments import calls, joblib
from qjam_bench.harness import figures, processes
from qjam_bench.harness.caller import Caller
from qjam_bench.harness.figures import Figure
from qjam_bench.rivals import field, turns
from sshd import sshd_works

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _programs_find_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "bench"))


# Loops


class Here(Caller):
    """Makes its calls in this process when they are gathered, and counts what is under way."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.made = self.under_way = self.most = 0

    def work(self, name):
        return {"echo": lambda number: number, "nap": lambda seconds, number: number}[name]

    def submit(self, function, *arguments):
        self.made += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return function, arguments

    def gather(self, handles):
        self.under_way -= len(handles)
        return [function(*arguments) + self.error for function, arguments in handles]


def test_a_stream_makes_as_many_calls_as_are_outstanding_however_short_the_budget():
    party = Here()
    assert party.drive(loops.stream, "echo", (), 100, 0.0).calls == 100
    assert party.made == 100 + loops.SETTLING


def test_a_stream_has_no_more_calls_under_way_than_it_is_told():
    party = Here()
    assert party.drive(loops.stream, "echo", (), 100, 0.01).calls > 100
    assert (party.most, party.under_way) == (100, 0)


def test_of_calls_one_by_one_each_has_its_seconds():
    party = Here()
    assert len(party.drive(loops.one_by_one, "echo", (), 7, 60.0)) == 7
    assert len(party.drive(loops.one_by_one, "echo", (), 7, 0.0)) == 1
    assert party.most == loops.SETTLING


@pytest.mark.parametrize(
    ("loop", "arguments"),
    [
        (loops.stream, ("echo", (), 10, 0.0)),
        (loops.one_by_one, ("echo", (), 1, 0.0)),
        (loops.mixed, ([0.0, 0.0],)),
    ],
)
def test_a_wrong_result_of_a_call_is_an_error(loop, arguments):
    with pytest.raises(ArithmeticError, match="wrong result"):
        Here(error=1).drive(loop, *arguments)


# Figures


def some() -> list[Figure]:
    return [
        Figure("empty", "Pool", [0.002], calls=1, ideal=0.001),
        Figure("empty", "dask", [], told="over the limit of 4 s"),
        Figure("empty", "qjam", [0.001], calls=1, ideal=0.001),
    ]


def test_a_table_tells_in_the_place_of_figures_why_there_are_none():
    lines = figures.table(some()).splitlines()
    assert lines[0].split() == ["median", "ms", "q1", "q3", "n", "calls/s", "of", "ideal", "times"]
    assert lines[1].split() == ["empty", "Pool", "2.00", "2.00", "2.00", "1", "500", "2.000", "2.00", "of", "qjam"]
    assert lines[2].split() == ["empty", "dask", "over", "the", "limit", "of", "4", "s"]
    assert lines[3].split() == ["empty", "qjam", "1.00", "1.00", "1.00", "1", "1,000", "1.000"]


def test_a_row_tells_it_too_and_has_the_calls_a_second():
    pool, dask, _ = (figures.row(one, some()) for one in some())
    assert (pool["calls_s"], pool["of_ideal"], pool["times"]) == (500, 2, 2)
    assert dask == {"what": "empty", "party": "dask", "told": "over the limit of 4 s", "seconds": []}


def test_markdown_has_no_column_for_a_party_that_has_no_figure():
    assert figures.markdown([("calls", some())]).splitlines()[0] == "| | qjam | Pool |"


# Parties that fail


def test_a_party_that_does_not_start_is_told_and_the_others_go_on():
    lost: turns.Lost = {"ray": "not installed (ray)"}
    entries = {"none": field.Entry("calls", "Pool", [0]), **field.local("calls", ["Pool", "ray"], 2)}
    with field.entered(entries, lost) as parties:
        for _ in range(2):
            results, why = parties.play(1, 60.0, loops.mixed, [0.0, 0.0])
            assert (list(results), why) == (["Pool"], {})
    assert lost["ray"] == "not installed (ray)"
    assert "at least 1" in lost["none"]


def test_qjam_that_does_not_start_ends_the_run():
    entries = {"qjam": field.Entry("calls", "qjam", ["no number"])}
    with pytest.raises(figures.PartyLost, match="qjam has ended"), field.entered(entries, {}) as parties:
        parties.play(1, 60.0, loops.mixed, [0.0])


def test_a_party_over_the_limit_is_ended_and_starts_anew_for_the_next_case():
    with field.entered(field.local("calls", ["Pool"], 1), {}) as parties:
        parties.start()
        before = processes.births(processes.below(os.getpid()))
        results, why = parties.play(1, 0.5, loops.mixed, [60.0])
        assert (results, set(why.values())) == ({}, {"over the limit of 0.5 s"})
        after = processes.births(before)
        assert not {pid for pid in after if after[pid] == before[pid]}
        results, why = parties.play(1, 60.0, loops.mixed, [0.0])
        assert (list(results), why) == (["Pool"], {})


def test_a_party_that_ends_in_a_case_is_told_for_that_case():
    with field.entered(field.local("calls", ["Pool"], 1), {}) as parties:
        results, why = parties.play(1, 60.0, sys.exit)
        assert (results, list(why)) == ({}, ["Pool"])
        assert list(parties.play(1, 60.0, loops.mixed, [0.0])[0]) == ["Pool"]


def test_a_slow_party_plays_fewer_turns_but_one():
    with field.entered(field.local("calls", ["Pool"], 2), {}) as parties:
        results, _ = parties.play(50, 0.2, loops.mixed, [0.05] * 2)
        assert 1 <= len(results["Pool"]) < 10


def test_a_rival_of_the_rounds_that_does_not_start_is_left_out_from_then_on():
    lost: turns.Lost = {}
    with ExitStack() as stack:
        assert turns.started(stack, ["pool"], "scale", 0, lost=lost) == {}
        assert turns.started(stack, ["pool"], "scale", 1, lost=lost) == {}
    assert "at least 1" in lost["pool"]
    assert turns.figures("1 workers", {}, lost)[0].told == lost["pool"]


def test_a_rival_that_ends_while_it_is_measured_is_left_out():
    def ends():
        raise figures.PartyLost("pool", "has ended: it printed nothing")

    lost: turns.Lost = {}
    assert turns.take_turns({"pool": ends, "other": lambda: 1}, 2, lost=lost) == {"other": [1, 1]}
    assert list(lost) == ["pool"]
    with pytest.raises(figures.PartyLost):
        turns.take_turns({"qjam": ends}, 2, lost=lost)


# Small runs


def test_calls_are_measured_beside_all_rivals_that_are_here_and_the_others_are_told(tmp_path):
    words = "calls --outstanding 4,10 --ms 10 --turns 1 --cases latency,outstanding"
    lacking = list(rivals.absent(None, rivals.CALLERS))
    few = [] if lacking else ["--against", "Pool,loky"]
    printed, _, report = bench(*words.split(), *few, folder=tmp_path)
    measured = few[1].split(",") if few else rivals.installed(rivals.CALLERS)
    whats = ["one at a time, empty", "one at a time, 1 ms", "empty, 4 outstanding", "empty, 10 outstanding"]
    found = {(one["what"], one["party"]) for one in report["figures"] if one["seconds"]}
    assert found == {(what, party) for what in whats for party in [*measured, "qjam"]}
    told = {(one["what"], one["party"]) for one in report["figures"] if one.get("told", "").startswith("not installed")}
    assert told == {(what, party) for what in whats for party in lacking}
    assert all(one["calls_s"] > 0 for one in report["figures"] if "outstanding" in one["what"] and one["seconds"])
    assert "calls/s" in printed


def test_every_case_is_made_of_a_loop_and_its_figure_of_the_results():
    parser = calls.argparse.ArgumentParser()
    calls.add_arguments(parser)
    found = calls.cases(parser.parse_args([]))
    for case in found:
        results = {
            loops.mixed: [1.5, 1.5],
            loops.one_by_one: [[0.1, 0.2], [0.3]],
        }.get(case.loop, [loops.Streamed(2.0, 1000), loops.Streamed(4.0, 2000)])
        figure = case.figure("qjam", results)
        if case.loop in (loops.stream, loops.stream_array):
            assert (figure.seconds, figure.calls) == ([0.002, 0.002], 1)
        else:
            assert len(figure.seconds) == (3 if case.loop is loops.one_by_one else 2)
    assert [case.ideal for case in found if case.loop is loops.mixed] == [0.75, 0.5, 0.3]


def test_calls_on_two_hosts_are_held_against_a_round_trip(tmp_path):
    need(sshd_works() or namespaces_work())
    words = "calls --outstanding 10 --ms 10 --turns 1 --cases hosts --against none"
    _, _, report = bench(*words.split(), folder=tmp_path)
    assert [(one["what"].partition(": ")[2], one["party"]) for one in report["figures"]] == [
        ("one at a time, empty", "round trip of TCP"),
        ("one at a time, empty", "qjam"),
        ("empty, 10 outstanding", "qjam"),
    ]


def test_a_grid_search_is_measured(tmp_path):
    words = "joblib --searches tiny --places here --turns 1 --markdown --against none"
    printed, _, report = bench(*words.split(), folder=tmp_path)
    assert [(one["what"], one["party"]) for one in report["figures"]] == [("tiny", "qjam")]
    assert "| grid search (ms), tiny | " in printed


def test_searches_with_other_scores_end_the_benchmark():
    fine, wrong = Searched(1.0, [0.5, 0.6]), Searched(1.0, [0.5, 0.7])
    joblib._same({"serial": [fine], "qjam": [fine]})
    with pytest.raises(figures.BenchError, match="qjam came to other scores than serial"):
        joblib._same({"serial": [fine], "qjam": [fine, wrong]})
