"""bin/qjam-bench: the arithmetic of its figures, its arguments, and a small run of every subcommand."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench_program import bench
from needs import need
from processes import all_end, finish, output, start
from qjam_bench import cli, rivals
from qjam_bench.ends import loops
from qjam_bench.experiments import autoencoder, stragglers, table
from qjam_bench.harness import figures, options, processes
from qjam_bench.harness.figures import Figure, Spread
from qjam_bench.harness.party import ManyWays, Party, fastest, parts
from qjam_bench.rivals import turns
from qjam_bench.rivals.seat import seated
from sshd import sshd_works

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _programs_find_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "bench"))


HEADERS = 10_000  # bytes at most, of a few slices
SECONDS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)


# Figures


@given(SECONDS)
def test_a_spread_lies_within_the_figures_in_order(seconds):
    spread = Spread.of(seconds)
    assert min(seconds) <= spread.q1 <= spread.median <= spread.q3 <= max(seconds)


def test_a_spread_is_the_median_and_the_quartiles():
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(median=3, q1=2, q3=4)


def two_of_each() -> list[Figure]:
    return [
        Figure("2 workers", "pool", [0.004, 0.004]),
        Figure("2 workers", "qjam", [0.002, 0.002]),
        Figure("8 workers", "pool", [0.003]),
        Figure("8 workers", "qjam", [0.006]),
    ]


def test_a_ratio_is_to_qjam_at_the_same_thing():
    found = two_of_each()
    assert [figures.ratio(one, found) for one in found] == [2.0, 1.0, 0.5, 1.0]


def test_there_is_no_ratio_to_what_was_not_measured():
    alone = Figure("2 workers", "pool", [0.004])
    assert figures.ratio(alone, [alone]) is None


def test_a_row_has_every_single_figure_the_spread_and_the_rate():
    one = Figure("512 MiB", "qjam", [0.1, 0.2, 0.3], 2_000_000, more={"hashing": [1.0]})
    found = figures.row(one, [one])
    assert found["seconds"] == [0.1, 0.2, 0.3]
    assert found["ms"] == pytest.approx({"median": 200, "q1": 150, "q3": 250})
    assert found["mb_s"] == pytest.approx(10)
    assert (found["times"], found["to"], found["hashing"]) == (1.0, "qjam", [1.0])


def test_a_table_has_a_line_for_each_figure():
    lines = figures.table(two_of_each()).splitlines()
    assert len(lines) == 5
    assert lines[1].split() == ["2", "workers", "pool", "4.00", "4.00", "4.00", "2", "2.00", "of", "qjam"]
    assert lines[2].split() == ["2", "workers", "qjam", "2.00", "2.00", "2.00", "2"]


def test_markdown_has_a_column_for_each_party_and_the_ratio_in_brackets():
    lines = figures.markdown([("round", two_of_each()), ("start", [Figure("8 workers", "qjam", [1.0])])]).splitlines()
    assert lines == [
        "| | qjam | pool |",
        "|---|---|---|",
        "| round, 2 workers | 2.00 | 4.00 (2.0x) |",
        "| round, 8 workers | 6.00 | 3.00 (0.5x) |",
        "| start, 8 workers | 1,000 |  |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.012"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (4321, "4,321")],
)
def test_a_number_has_three_digits_that_count(value, text):
    assert figures.number(value) == text


# Turns


@given(st.integers(1, 6), st.integers(0, 6))
def test_each_party_is_measured_once_a_turn(parties, number):
    names = [f"party {index}" for index in range(parties)]
    order = list(turns.order(names, number))
    assert [turn for turn, _ in order] == [turn for turn in range(number) for _ in names]
    for turn in range(number):
        assert sorted(name for its, name in order if its == turn) == sorted(names)


def test_every_second_turn_goes_backwards():
    assert [name for _, name in turns.order("abc", 3)] == list("abccbaabc")


@given(st.integers(1, 5000))
def test_batches_have_at_least_the_rounds_that_were_asked_for_and_not_a_batch_more(rounds):
    batches = turns.Batches.of(rounds)
    assert batches.number * batches.most >= rounds > (batches.number - 1) * batches.most


class Adding(Party):
    """A party of two workers that are functions of this process."""

    def __init__(self, error: float = 0) -> None:
        self.error = error
        self.calls = 0

    def round(self, params):
        self.calls += 1
        return params + params + self.error

    def _load(self, data):
        raise AssertionError


def test_only_settled_rounds_count():
    params, party = np.ones(3), Adding()
    batches = turns.Batches(number=3, most=4, settle=2, budget=60)
    taken = turns.interleave({"adding": party}, batches, params, 2 * params)
    assert (len(taken["adding"]), party.calls) == (12, 18)


def test_a_slow_party_plays_fewer_rounds_but_some():
    party = Adding()
    assert len(party.drive(loops.timed_rounds, np.ones(3), 2 * np.ones(3), 2, 25, 0.0)) == loops.FEWEST


def test_a_wrong_sum_ends_the_benchmark():
    with pytest.raises(figures.BenchError, match="adding: a wrong sum"):
        turns.interleave({"adding": Adding(error=1)}, turns.Batches(1), np.ones(3), 2 * np.ones(3))


def test_turns_that_warm_up_do_not_count():
    given = turns.take_turns({"a": iter("xyz").__next__, "b": iter("123").__next__}, 2)
    assert given == {"a": ["y", "z"], "b": ["2", "3"]}


# Ways


class Clocked(ManyWays):
    """Two ways, and how often each was taken; `slow` is one that takes many steps of a clock that only it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []

    @property
    def ways(self):
        return [self.slow, self.quick]

    def slow(self, params):
        self.taken.append("slow")
        return np.sort(np.tile(params, 20_000)[::-1])[:1]

    def quick(self, params):
        self.taken.append("quick")
        return params

    def _load(self, data):
        raise AssertionError


def test_the_fastest_way_is_taken_and_tried_once_for_each_size():
    party = Clocked()
    party.round(np.ones(100))
    assert party.taken[-1] == "quick"
    after = len(party.taken)
    party.round(np.ones(100))
    assert party.taken[after:] == ["quick"]
    party.round(np.ones(200))
    assert "slow" in party.taken[after:]


def test_the_first_answer_is_given_without_a_trial():
    party = Clocked()
    party.first(np.ones(100))
    assert party.taken == ["slow"]


def test_a_hopeless_way_is_tried_once():
    party = Clocked()
    assert fastest([party.quick, party.slow], np.ones(100)) == party.quick
    assert party.taken.count("slow") == 1


@given(st.integers(1, 40), st.integers(1, 9))
def test_parts_are_one_a_worker_and_all_of_the_data(rows, workers):
    data = np.arange(rows * 2.0).reshape(rows, 2)
    found = parts(data, workers)
    assert len(found) == workers
    assert np.array_equal(np.concatenate(found), data)


# Arguments


@pytest.mark.parametrize(
    ("text", "names"),
    [("none", []), ("pool", ["pool"]), ("pool,raw-zmq,pool", ["pool", "raw-zmq"])],
)
def test_rivals_are_chosen_by_name(text, names):
    assert rivals.against(text) == names


def test_by_default_all_that_are_installed_are_measured_and_qjam_last():
    assert rivals.chosen(None) == [*rivals.installed(), "qjam"]
    assert {"raw-zmq", "pool"} <= set(rivals.installed())


def test_a_rival_that_nobody_knows_is_told_with_those_that_there_are():
    with pytest.raises(argparse.ArgumentTypeError, match="'spark' is none of raw-zmq, mpi4py"):
        rivals.against("pool,spark")


def test_a_rival_that_is_not_installed_is_told_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(rivals.RIVALS, "ray", rivals.Rival("ray", imports=("no_such_module",)))
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"ray is not installed here \(no_such_module\); ./scripts/bench"
    ):
        rivals.against("ray")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: SUBCOMMAND"),
        (["rounds", "--workers", "2,x"], "'x' is not a number from 1 on"),
        (["rounds", "--workers", "0"], "'0' is not a number from 1 on"),
        (["rounds", "--route", "pigeon"], "invalid choice: 'pigeon'"),
        (["rounds", "--json", "/no/such/folder/x.json"], "not a file name in an existing folder"),
        (["bulk", "--route", "direct,pigeon"], "'pigeon' is none of local, direct, tunnel, stdio"),
        (["memory", "--route", "tcp"], "'tcp' is none of local, direct, tunnel, stdio"),
        (["rounds", "--against", "spark"], "'spark' is none of"),
    ],
)
def test_wrong_arguments_are_told(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_what_cannot_be_measured_is_one_line(capsys):
    assert cli.main(["start", "--ssh-config", "x", "--against", "none"]) == 1
    assert capsys.readouterr().err.startswith("qjam-bench: --ssh-config is for a --host")


def test_every_subcommand_is_a_module_with_its_arguments():
    for name in cli.SUBCOMMANDS:
        assert (ROOT / "bench" / "qjam_bench" / "experiments" / f"{name}.py").exists()
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0


def test_nothing_is_shown_of_the_progress_where_there_is_no_terminal(capsys):
    turns.progress("batch 1")
    assert capsys.readouterr().err == ""


# The paper's table


def line(**changes: Any) -> figures.Line:
    known = {"patches": 1000, "workers": 16, "iteration": 0.004, "total": 0.08, "step": 0.0005, "round": 0.0035}
    return figures.Line(**{**known, "pure": 0.003, "apart": 0.0016, "cores": 2, "efficiency": 0.4, **changes})


def test_ideal_is_pure_compute_spread_over_the_cores_that_can_be_busy():
    row = line().row()
    assert row["ideal"] == pytest.approx(0.0015)
    assert row["overhead"] == pytest.approx(0.002)
    assert row["paper"] == 0.9969


def test_rounds_are_held_against_the_pure_compute_of_their_own_turn(monkeypatch):
    monkeypatch.setattr(autoencoder, "_cores", lambda: 2)
    rounds = {"qjam": [0.5, 1.0, 5.0], "serial": [0.7, 1.6, 9.0]}  # each turn found the machine slower than the last
    runs = {name: [loops.Learnt(2.0, 2, 3.0, [0.9 * x, 1.1 * x]) for x in taken] for name, taken in rounds.items()}
    found = autoencoder._line(1000, 4, runs, [0.3, 0.7, 0.4])
    assert (found.round, found.pure, found.apart) == pytest.approx((1.0, 1.6, 0.4))
    assert found.efficiency == pytest.approx(0.8)  # the middle one of 0.7, 0.8 and 0.9


def test_the_table_has_nothing_of_the_paper_where_the_paper_has_nothing():
    assert line(workers=3).row()["paper"] is None
    assert autoencoder.text([line(workers=3)]).splitlines()[1].split()[:3] == ["1,000", "3", "0.0040"]


def test_the_paper_s_table_is_whole():
    assert list(figures.PAPER) == [1_000, 10_000, 100_000]
    assert all(list(row) == [1, 2, 4, 8, 16] for row in figures.PAPER.values())


def test_a_party_that_comes_to_another_cost_ends_the_benchmark():
    fine, wrong = (loops.Learnt(cost, 1, 1.0, [1.0]) for cost in (2.0, 2.1))
    autoencoder._same({"serial": [fine], "qjam": [fine]})
    with pytest.raises(figures.BenchError, match=r"qjam ended with a cost of 2\.1, not 2\.0"):
        autoencoder._same({"serial": [fine], "qjam": [fine, wrong]})


# A party in a process of its own


def test_a_seated_party_plays_loops_there_and_its_wrong_sums_are_told_here():
    with seated("pool", "scale", 2) as party:
        params = np.ones(5)
        assert np.array_equal(party.round(params), 2 * params)
        assert len(party.drive(loops.timed_rounds, params, 2 * params, 1, 4, 60.0)) == 4
        with pytest.raises(figures.BenchError, match="pool: a wrong sum"):
            party.drive(loops.timed_rounds, params, params, 1, 4, 60.0)
        assert party.drive(loops.timed_once, params) > 0


def states_below() -> list[str]:
    """The states of all processes that the test has started: T is stopped."""
    stats = [processes.proc_text(pid, "stat") for pid in processes.below(os.getpid())]
    return [stat.rpartition(")")[2].split()[0] for stat in stats if stat]


def test_a_party_rests_in_all_its_processes_while_nobody_asks_it():
    with seated("pool", "scale", 2, rests=True) as party:
        for _ in range(2):
            while set(states := states_below()) != {"T"}:  # a process that runs stops when it next enters the kernel
                pass
            assert len(states) >= 3
            assert np.array_equal(party.round(np.ones(5)), 2 * np.ones(5))


KILLED = """
import os, signal, sys
from qjam_bench import ends
from qjam_bench.harness import processes
from qjam_bench.rivals.seat import seated

ends.prepare()
with seated("pool", "scale", 2, rests=True):
    print(*processes.below(os.getpid()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_party_that_rests_ends_when_the_benchmark_is_killed(tmp_path):
    pids = [int(word) for word in finish(start(tmp_path, KILLED), -signal.SIGKILL).split()]
    assert len(pids) >= 3
    assert all_end(pids)


def test_a_party_that_does_not_start_tells_why():
    with (
        pytest.raises(figures.BenchError, match=r"pool has ended: (.|\n)*at least 1"),
        seated("pool", "scale", 0),
    ):
        pass


# Small runs


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    words = [
        "rounds",
        "--workers",
        "1,2",
        "--rounds",
        "6",
        "--against",
        "raw-zmq,pool",
        "--plot",
        str(folder / "x.png"),
    ]
    return folder, bench(*words, folder=folder)


def test_rounds_are_measured_beside_rivals(rounds):
    _, (printed, complained, report) = rounds
    assert complained == ""
    assert "3934 float64" in printed
    found = [(one["what"], one["party"], len(one["seconds"])) for one in report["figures"]]
    parties = ("raw-zmq", "pool", "qjam")
    assert found == [(what, party, 6) for what in ("1 workers", "2 workers") for party in (*parties, "qjam by value")]


def test_the_json_tells_what_machine_it_was(rounds):
    _, (_, _, report) = rounds
    machine = report["machine"]
    assert machine["cores"] == os.cpu_count()
    assert {"qjam", "numpy", "pyzmq", "libzmq"} <= set(machine["versions"])
    assert {"cpu", "kernel", "python", "revision", "load_average"} <= set(machine)
    assert machine["blas_threads"]
    assert report["arguments"][0] == "rounds"


def test_the_plot_is_a_png(rounds):
    folder, _ = rounds
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ["broadcast", "--megabytes", "1", "--workers", "2", "--rounds", "3", "--against", "raw-zmq,pool"],
            {
                (what, party)
                for what in ("broadcast", "broadcast, map, reduce")
                for party in ("raw-zmq", "pool", "qjam")
            },
        ),
        (
            [
                "bulk",
                "--megabytes",
                "8",
                "--workers",
                "2",
                "--turns",
                "1",
                "--route",
                "local",
                "--against",
                "raw-zmq,pool",
            ],
            {("8 MiB", party) for party in ("raw-tcp", "raw-zmq", "raw-curve", "pool", "qjam")},
        ),
        (
            ["start", "--workers", "2", "--turns", "1", "--against", "pool"],
            {("2 workers", party) for party in ("pool", "qjam")},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_subcommand_measures_all_parties(tmp_path, words, found):
    _, _, report = bench(*words, folder=tmp_path)
    assert {(one["what"], one["party"]) for one in report["figures"]} == found
    assert all(second > 0 for one in report["figures"] for second in one["seconds"])


def test_the_table_is_made_of_subcommands_with_options_that_they_have():
    for name, part in table.PARTS.items():
        found = table._arguments(name, part, argparse.Namespace(short=True, against=[]))
        assert found.against == []


@pytest.mark.timeout(180)  # seconds; it takes 18 where nothing else runs
def test_the_autoencoder_is_learnt_by_all_parties_and_without_workers(tmp_path):
    words = "autoencoder --patches 100,300 --workers 1,2 --iterations 3 --runs 2 --against pool --plot x.png"
    printed, complained, report = bench(*words.split(), folder=tmp_path)
    assert complained == ""
    assert {(one["what"], one["party"]) for one in report["figures"]} == {
        (f"{patches} patches, {workers} workers", party)
        for patches in (100, 300)
        for workers in (1, 2)
        for party in ("pool", "qjam", "serial")
    }
    assert [(one["patches"], one["workers"]) for one in report["lines"]] == [(100, 1), (100, 2), (300, 1), (300, 2)]
    for one in report["figures"]:
        assert len(one["seconds"]) == 2
        assert [len(rounds) for rounds in one["rounds"]] == one["evaluations"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "of ideal" in printed


def test_memory_is_measured_in_bytes(tmp_path):
    words = "memory --megabytes 32 --workers 2 --route local --plot x.png"
    _, complained, report = bench(*words.split(), folder=tmp_path)
    assert complained == ""
    (row,) = report["figures"]
    assert row["bytes"] == 32 << 20
    assert 0 <= row["sent"] <= row["bytes"] + HEADERS
    assert 0 <= row["master"] < row["bytes"]
    assert row["everything"] >= row["bytes"]  # one copy is there, whatever else
    (file,) = report["files"]
    assert file["bytes"] == 32 << 20
    assert 0 <= file["sent"] <= file["bytes"] + HEADERS
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_one_slow_worker_is_measured_on_one_host_and_on_two(tmp_path):
    need(sshd_works())
    words = "stragglers --workers 2 --slices 2 --ms 1 --rounds 2"
    _, _, report = bench(*words.split(), folder=tmp_path)
    assert {one["what"] for one in report["figures"]} == {
        f"{work}, {where}" for work in ("sleeping", "computing") for where in ("one host", "two hosts")
    }
    assert {one["party"] for one in report["figures"]} == set(stragglers.PARTIES)
    assert {one["to"] for one in report["figures"]} == {"all even"}


def test_a_host_is_measured_through_ssh(tmp_path):
    need(sshd_works())
    words = "rounds --workers 1 --rounds 3 --route direct --against none"
    printed, _, report = bench(*words.split(), folder=tmp_path)
    assert "route direct" in printed
    assert [one["party"] for one in report["figures"]] == ["qjam", "qjam by value"]


LOADING = """
import sys
import numpy as np
from qjam_bench import ends, rivals
from qjam_bench.ends import loops

if __name__ == "__main__":
    ends.prepare()
    data = np.arange(40.0).reshape(10, 4)
    with rivals.PARTIES[sys.argv[1]].party("look", 3) as party:
        for _ in range(2):
            assert party.load(data) >= 0
            assert party.round(np.ones(1))[0] == data.sum()
            assert len(party.drive(loops.timed_rounds, np.ones(1), data.sum(keepdims=True)[0], 1, 3, 60.0)) == 3
            data += 1
"""


@pytest.mark.parametrize("name", rivals.chosen(None))
def test_a_party_adds_up_what_its_workers_make_of_their_slices(tmp_path, name):
    assert output(tmp_path, LOADING, name) == ""


def test_options_of_counts():
    assert options.counts("2,8,16") == [2, 8, 16]
    assert options.routes("direct,local") == ["direct", "local"]
