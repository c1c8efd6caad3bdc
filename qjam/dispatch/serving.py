"""Serves the refs that nodes ask for: from the question to the word that all is sent, or that nothing will come."""

from __future__ import annotations

from collections.abc import Callable

from qjam_worker.wire.refs import MODULE, Part, Ref

from .commands import Block, Command, Failure, Gone
from .nodes import Roster
from .rounds import Round
from .states import NodeState
from .validation import check_named


class RefServer:
    """`round_of`: gives the round that a node names, if it is not over. `fail` ends a round, `lose` gives a node up."""

    def __init__(
        self,
        roster: Roster,
        rounds: dict[int, Round],
        round_of: Callable[[str, int], Round | None],
        fail: Callable[[Round, Failure], list[Command]],
        lose: Callable[[str, str], list[Command]],
    ) -> None:
        self._roster, self._rounds = roster, rounds
        self._round_of, self._fail, self._lose = round_of, fail, lose

    def on_get(self, name: str, number: int | None, parts: list[Part]) -> list[Command]:
        """A node lacks these. It may ask for modules without a round."""
        node = self._roster.nodes[name]
        if node.state is NodeState.CLOSED:
            return []
        transfers = node.transfers
        transfers.check(parts)
        round_ = None if number is None else self._round_of(name, number)
        if round_ is not None:
            check_named(round_, name, [part.ref for part in parts])
            return [*transfers.add(round_.number, parts)]
        # The round is over. If another one needs the same slices, the node asks again for that one.
        refused = [Gone(name, part.ref) for part in parts if part.ref.kind != MODULE]
        return [*refused, *transfers.add(number or 0, [part for part in parts if part.ref.kind == MODULE])]

    def on_loaded(self, name: str, ref: Ref, size: int) -> list[Command]:
        """The content of a ref is loaded."""
        try:
            return [*self._roster.nodes[name].transfers.loaded(ref, size)]
        except ValueError as error:
            return self._lose(name, str(error))

    def on_load_failed(self, name: str, ref: Ref, failure: Failure) -> list[Command]:
        """The content of a ref cannot be loaded. User code that makes slices has raised: all rounds of that job over
        that data fail. A module that cannot be read counts as absent.
        """
        transfers = self._roster.nodes[name].transfers
        transfer = transfers.find(ref)
        if transfer is None:
            return []
        wanted_by = self._rounds.get(transfer.round)
        if wanted_by is None or ref.kind == MODULE:
            return [*transfers.drop(transfer)]
        return self._fail_alike(wanted_by, failure)

    def on_changed(self, block: Block, failure: Failure) -> list[Command]:
        """This block, the last one of a ref, was not sent: the content has changed since it was hashed. The node drops
        what it has; if rounds of other jobs need the ref, it asks for it again.
        """
        node, wanted_by = self._roster.nodes.get(block.node), self._rounds.get(block.round)
        if node is None:
            return []
        commands: list[Command] = [Gone(node.name, block.ref), *node.transfers.taken(block.size)]
        return commands if wanted_by is None else [*commands, *self._fail_alike(wanted_by, failure)]

    def _fail_alike(self, wanted_by: Round, failure: Failure) -> list[Command]:
        alike = [round_ for round_ in self._rounds.values() if round_.is_like(wanted_by)]
        return [command for round_ in alike for command in self._fail(round_, failure)]

    def on_credit(self, name: str, granted: int) -> list[Command]:
        """A node has taken this many bytes of refs and may be sent as many again."""
        return [*self._roster.nodes[name].transfers.taken(granted)]

    def end(self, ended: Round, name: str) -> list[Command]:
        """A round is over: what only that one needed is not sent any further to a node of it."""
        transfers = self._roster.nodes[name].transfers
        if not transfers:
            return []
        alike = (r.number for r in self._rounds.values() if r.is_like(ended) and name in r.debts)
        return [*transfers.end_round(ended.number, next(alike, None))]
