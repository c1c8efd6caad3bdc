"""Many nodes around the real dispatcher: every result is right, and no event costs more for the nodes that it does not
concern.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import pytest

from bytecodes import counted
from qjam.dispatch.dispatcher import Dispatch
from qjam_bench.experiments import scale
from qjam_bench.experiments.swarm import Swarm, spans
from qjam_worker.values.reduction import Tree, is_span


def join(a: str, b: str) -> str:
    """Neither commutative nor associative: what it gives tells how it was made."""
    return f"({a}{b})"


def serial(number: int, lo: int, hi: int, nslices: int) -> str:
    """The result over slices [lo, hi) of a round, folded in one place."""
    tree = Tree(nslices)
    for index in range(lo, hi):
        tree.add((index, index + 1), f"{number}.{index} ")
    tree.fold(join)
    return tree.values[lo, hi]


def swarm_of(nodes: int) -> Swarm:
    nslices = nodes * scale.WORKERS
    swarm = Swarm(scale.WORKERS, frames=lambda number, lo, hi: [serial(number, lo, hi, nslices)], moment=0.1 / nslices)
    swarm.join(nodes)
    return swarm


@pytest.mark.parametrize("what", scale.PLAYS)
def test_every_result_is_that_of_the_serial_tree(what: str) -> None:
    nodes = 10
    swarm, spec = swarm_of(nodes), scale.job(10)
    scale.PLAYS[what](swarm, spec)
    assert swarm.done
    assert not swarm.failed
    for number, roots in swarm.done.items():
        tree = Tree(spec.nslices)
        for span, encoded in roots:
            assert tree.add(span, encoded.header)
        tree.fold(join)
        assert tree.values == {(0, spec.nslices): serial(number, 0, spec.nslices, spec.nslices)}


def bytecodes(nodes: int, what: str) -> float:
    """For a task event, or for a node that joins."""
    swarm, spec = Swarm(scale.WORKERS, moment=0.1 / (nodes * scale.WORKERS)), scale.job(nodes)
    if what == "joins":
        with counted() as count:
            swarm.join(nodes)
        return count[0] / nodes
    swarm.join(nodes)
    scale._a_round(swarm, spec)
    before = swarm.given + swarm.taken
    with counted() as count:
        scale.PLAYS[what](swarm, spec)
    return count[0] / (swarm.given + swarm.taken - before)


FEW, MANY, MORE = 32, 256, 1.1  # nodes; how many times the bytecodes of few an event among many may take


@pytest.mark.parametrize("what", ["joins", *scale.PLAYS])
def test_an_event_costs_no_more_among_many_nodes(what: str) -> None:
    few, many = bytecodes(FEW, what), bytecodes(MANY, what)
    assert many < MORE * few, f"{few:.0f} bytecodes among {FEW} nodes, {many:.0f} among {MANY}"


def test_a_walk_through_all_nodes_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scope: dict[str, Any] = {"__name__": "qjam.walking", "heard": Dispatch.on_heard}
    exec(
        "def walk(self, name, now):\n"
        "    [node for node in self.nodes.values() if node.pinged]\n"
        "    return heard(self, name, now)\n",
        scope,
    )
    monkeypatch.setattr(Dispatch, "on_heard", scope["walk"])
    what = "round, a RESULT a node"
    assert bytecodes(MANY, what) > MORE * bytecodes(FEW, what)


@pytest.mark.parametrize("nslices", [1, 2, 5, 16, 33])
def test_slices_make_up_the_largest_spans_of_the_tree(nslices: int) -> None:
    for seed in range(20):
        indices = random.Random(seed).sample(range(nslices), random.Random(seed).randint(1, nslices))
        found = spans(indices, nslices)
        assert sorted(index for lo, hi in found for index in range(lo, hi)) == sorted(indices)
        assert all(is_span(lo, hi, nslices) for lo, hi in found)
        tree = Tree(nslices)
        for span in found:
            tree.add(span, "x")
        assert tree.pairs() == []


def test_the_command_tells_and_keeps_its_figures(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    scale.main(parser.parse_args(["--nodes", "2,4", "--repeats", "1", "--json", str(tmp_path / "figures.json")]))
    assert "bytes a node, idle" in capsys.readouterr().out
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert {row["nodes"] for row in kept["figures"]} == {2, 4}
    assert set(kept["growth"]) == {"2", "4"}
