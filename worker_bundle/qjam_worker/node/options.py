"""What a node is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Optional


class NodeOptions(NamedTuple):
    """How a node runs its workers and keeps its data.

    Attributes:
        workers: how many.
        memory_limit: bytes that each worker may allocate; None: no limit.
        keep_data: bytes of slices that may stay on disk for later programs; None: none.
        paths: folders in which workers find packages before they look where their python does.
        here: whether workers run on the master's machine, and so can import what the master can.
        environment: variables of the workers, beside those of the node; for a fork server that is started.
    """

    workers: int
    memory_limit: Optional[int] = None
    keep_data: Optional[int] = None
    paths: Sequence[str] = ()
    here: bool = False
    environment: Mapping[str, str] = MappingProxyType({})
