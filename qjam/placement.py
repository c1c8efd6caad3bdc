"""Where the slices of a job live: neighbours together, in proportion to the workers, moved as little as can be."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise


def place(nslices: int, homes: Mapping[int, str], workers: Mapping[str, int]) -> dict[int, str]:
    """A node for each slice, given where they have been and how many workers the nodes have now.

    A slice stays where it is unless its node is gone or has more than its share: then the last ones go to those that
    have less.
    """
    bounds = [0, *accumulate(workers.values())]
    cuts = [-(-bound * nslices // bounds[-1]) for bound in bounds]
    room = {name: high - low for name, (low, high) in zip(workers, pairwise(cuts), strict=True)}
    placed: dict[int, str] = {}
    for index in range(nslices):
        home = homes.get(index)
        if home is not None and room.get(home, 0) > 0:
            placed[index] = home
            room[home] -= 1
    free = iter([name for name, left in room.items() for _ in range(left)])
    for index in range(nslices):
        if index not in placed:
            placed[index] = next(free)
    return placed


def spread(indices: list[int], workers: Mapping[str, int]) -> dict[str, list[int]]:
    """Slices that have no home now, over the nodes: neighbours together, in proportion to the workers."""
    seats = [name for name, count in workers.items() for _ in range(count)]
    shares: dict[str, list[int]] = {}
    for position, index in enumerate(indices):
        shares.setdefault(seats[len(seats) * position // len(indices)], []).append(index)
    return shares
