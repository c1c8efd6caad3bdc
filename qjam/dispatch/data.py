"""The slices that jobs are mapped over: which node has which, which node has been told of which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qjam.data.file_slices import InFile
from qjam.data.leases import Lease


class Share(NamedTuple):
    """The slices of one node, in order and as a set; rounds share it and never change it."""

    indices: list[int]
    slices: frozenset[int]


def share(indices: Sequence[int]) -> Share:
    """A share of these slices, which must be in order."""
    return Share(list(indices), frozenset(indices))


@dataclass(eq=False)
class Data:
    """The slices with these hashes, whoever holds them and whatever is mapped over them.

    Without `refs` there are none: a job runs `nslices` times, once on each worker. Nodes are told nothing of that.
    """

    number: int
    nslices: int
    refs: tuple[str, ...] = ()
    nbytes: int = 0
    file: InFile | None = None  # where slices lie that a host may have without being sent them
    homes: dict[int, str] = field(default_factory=dict)  # slice -> the node that has it, or will have
    placed_for: int = -1  # the membership that `homes` was made for
    plan: dict[str, Share] = field(default_factory=dict)  # what each node gets of a new round
    planned_for: int = -1  # the version of the roster that `plan` was made for
    told: dict[str, frozenset[int]] = field(default_factory=dict)  # the slices that each node knows of
    leases: list[Lease] = field(default_factory=list)  # those that were held when this was last looked at
    rounds: int = 0  # in flight
    at_once: bool = False  # whether it goes without a grace

    def move_home(self, indices: Iterable[int], name: str) -> None:
        """Assign these slices to this node from the next round on."""
        self.homes.update(dict.fromkeys(indices, name))
        self.planned_for = -1
