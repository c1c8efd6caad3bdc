"""A round between its caller and the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from qjam.dispatch.commands import Failure
from qjam.dispatch.rounds import RoundSpec
from qjam.errors import QjamError, TaskError
from qjam_worker.values import codec
from qjam_worker.values.reduction import Span, Tree, default_reduce
from qjam_worker.worker.exceptions import describe

Roots = list[tuple[Span, codec.Encoded]]


class SliceSource(Protocol):
    """A data set, as far as the loader needs it."""

    def slice_from_hash(self, hash: str) -> Any: ...


class Pending:
    """A round that runs. `wait` blocks until it is over; then `roots` or `failure` is set."""

    def __init__(
        self,
        spec: RoundSpec,
        code: bytes | None,
        params: codec.Encoded,
        dataset: SliceSource | None,
        deadline: float | None,
        on_end: Callable[[Pending], None] | None = None,
    ) -> None:
        self.spec = spec
        self.code = code
        self.params = params
        self.dataset = dataset
        self.deadline = deadline
        self.number = 0
        self.over = False
        self.roots: Roots | None = None
        self.failure: Failure | None = None
        self._on_end = on_end
        self._over = threading.Lock()  # a bare lock wakes its waiter faster than an Event does
        self._over.acquire()

    def wait(self) -> None:
        """Block until the round is over. A signal handler's exception (Ctrl-C) comes through."""
        self._over.acquire()
        self._over.release()

    def end(self, roots: Roots | None, failure: Failure | None) -> None:
        """The round is over. Only the first call counts."""
        if self.over:
            return
        self.over, self.roots, self.failure = True, roots, failure
        self._over.release()
        on_end, self._on_end = self._on_end, None  # which refers to a future whose callbacks refer to this
        if on_end is not None:
            on_end(self)

    def take_failure(self) -> Failure:
        """Why it has failed; to be asked once. An error in there must not be held by a frame of its own traceback."""
        failure, self.failure = self.failure, None
        assert failure is not None
        return failure

    def reduced(self, reduce: Callable[[Any, Any], Any] | None = None) -> Any:
        """The result of the round: its roots folded by `reduce`, by default default_reduce. Its arrays are the caller's
        own. QjamError when a root cannot be loaded here, TaskError when `reduce` raises.
        """
        assert self.roots is not None
        tree: Tree[Any] = Tree(self.spec.nslices)
        for span, encoded in self.roots:
            try:
                tree.add(span, codec.decode(encoded.header, encoded.buffers, copy=True))
            except codec.CodecError as error:
                raise QjamError(f"a result cannot be loaded here: {error.__cause__ or error}") from error
        if len(self.roots) > 1:
            try:
                tree.fold(reduce or default_reduce)
            except Exception as error:
                told = describe(error)
                raise TaskError("this machine", -1, None, told["text"], told["summary"]) from error
        return tree.values[0, self.spec.nslices]
