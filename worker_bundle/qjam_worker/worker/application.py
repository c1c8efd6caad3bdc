"""How a job applies the user's functions: slice by slice or item by item, the results added, reduced or collected."""

from __future__ import annotations

import operator
from typing import Any, Callable, NamedTuple, Optional

from qjam_worker.values.reduction import default_reduce, summand

from .detach import detached

MapFunction = Callable[..., Any]
Reduce = Callable[[Any, Any], Any]


class Code(NamedTuple):
    """What a worker calls: `mapfunc(params, slice, index of the slice)`, and `reduce` of two of its results.

    `classes`: keys of the classes that have come with them.
    """

    mapfunc: Callable[[Any, Any, int], Any]
    reduce: Reduce
    classes: frozenset[str] = frozenset()


class ItemError(Exception):
    """A function that is called for each item has raised, for the item of this index. What it raised is the cause."""

    def __init__(self, item: int) -> None:
        super().__init__(item)
        self.item = item


def applied(mapfunc: MapFunction, reduce: Optional[Reduce], entry: dict[str, Any]) -> Code:
    """The functions as the job's entry says: results are added where `reduce` is None. `collect`: they are lists, which
    are joined. `each`: mapfunc takes the items of a slice, of which each slice but the last has so many; params say
    whether an item is a tuple of several arguments.
    """
    if entry.get("each"):
        return Code(_by_item(mapfunc, entry["each"]), operator.concat)
    if entry.get("collect"):
        return Code(lambda params, part, index: [mapfunc(params, part)], operator.concat)
    if reduce is None:
        return Code(lambda params, part, index: summand(mapfunc(params, part)), default_reduce)
    return Code(lambda params, part, index: mapfunc(params, part), reduce)


def _by_item(function: MapFunction, size: int) -> Callable[[Any, Any, int], Any]:
    def call(several: bool, items: Any, index: int) -> list[Any]:
        results: list[Any] = []
        for item in items:
            try:
                result = function(*item) if several else function(item)
            except Exception as error:
                raise ItemError(index * size + len(results)) from error
            results.append(result if len(items) == 1 else detached(result))
        return results

    return call
