"""Checks of what a node says about a round, made before anything changes: ValueError for what no node can mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qjam_worker.values.reduction import is_span
from qjam_worker.wire.refs import CODE, MODULE, PARAMS, SLICE, Ref, of_params

from .nodes import NodeRecord
from .rounds import Round


def check_roots(round_: Round, name: str, roots: list[Any], buffers: int) -> None:
    """The roots are nodes of the tree over slices that the node was given, and match the buffers."""
    nslices, given, frames = round_.data.nslices, round_.given[name], 0
    for lo, hi, count in roots:
        if not is_span(lo, hi, nslices):
            raise ValueError(f"[{lo}, {hi}) is not a node of the reduction tree over {nslices} slices")
        if not given.issuperset(range(lo, hi)):
            raise ValueError(f"it was not given all of the slices [{lo}, {hi})")
        frames += count
    if frames != buffers:
        raise ValueError(f"{len(roots)} roots do not match {buffers} buffers")


def check_given(round_: Round, name: str, indices: Iterable[int]) -> None:
    """The node was given these slices."""
    if not round_.given[name].issuperset(indices):
        raise ValueError(f"it names slices of round {round_.number} that it was not given")


def check_slices(round_: Round, indices: Iterable[Any]) -> None:
    """These are slices of the round."""
    if any(type(index) is not int or not 0 <= index < round_.data.nslices for index in indices):
        raise ValueError(f"{indices} are not slices of the round")


def check_worker(node: NodeRecord, worker: int | None) -> None:
    """The node has this worker."""
    if worker is not None and worker >= node.workers:
        raise ValueError(f"it names worker {worker} and has {node.workers}")


def check_named(round_: Round, name: str, refs: list[Ref]) -> None:
    """The round told the node of these refs; a node may ask for modules at any time."""
    data = round_.data
    known = {CODE: {round_.job.entry["code"]}, PARAMS: {of_params(round_.number).key}, SLICE: set()}
    if data.refs:
        known[SLICE] = {data.refs[index] for index in round_.given[name]}
    for kind, key in refs:
        if kind != MODULE and key not in known[kind]:
            raise ValueError(f"it asks for {kind}:{key}, of which round {round_.number} has not told it")
