"""Proves that the simulation can fail: `python -m tests.simulation.mutations`.

Each mutation changes one thing in the dispatcher or in a node's scheduler; seeds run until one fails. The first ones
are rules that anybody might break, the last ones (`found`) put defects back that the simulation has found.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DISPATCH, BOOKS, NODES = "qjam.dispatch.dispatcher", "qjam.dispatch.rounds", "qjam.dispatch.nodes"
ASSIGNMENT, STEALING, LIVENESS = "qjam.dispatch.assignment", "qjam.dispatch.stealing", "qjam.dispatch.liveness"
SCHEDULER, ROUNDS, FOLDS = "qjam_worker.node.scheduler", "qjam_worker.node.rounds", "qjam_worker.node.folds"
WANTS, LINE = "qjam_worker.node.wants", "qjam.dispatch.line"
HOLDINGS, JOBS, SERVING = "qjam.dispatch.holdings", "qjam.dispatch.jobs", "qjam.dispatch.serving"
REDUCTION, TRANSFERS = "qjam_worker.values.reduction", "qjam_worker.wire.transfers"
CALLS, DESK, SEATS = "qjam.dispatch.calls", "qjam_worker.node.calls", "qjam_worker.node.seats"
ARENAS = "qjam_worker.ipc.arenas"
# Seeds that are tried before a mutation is given up as not caught.
MOST = 6000


class Mutation(NamedTuple):
    """`old` stands once in the source of the module."""

    what: str
    module: str
    old: str
    new: str
    profile: str = "any"


UNCHANGED = Mutation("nothing is changed", DISPATCH, "class Dispatch:", "class Dispatch:")

MUTATIONS = [
    # The dispatcher
    Mutation("counts what comes twice twice", DISPATCH,
             "            round_.tree.add((lo, hi), Encoded(header_frame, others, plain=False))\n",
             "            round_.tree.values[lo, hi] = Encoded(header_frame, others, plain=False)\n"
             "            round_.tree.covered += hi - lo\n"),
    Mutation("takes a result for slices that were done by others", DISPATCH,
             "        if round_.tree.covered < round_.data.nslices:\n",
             "        if round_.tree.covered < round_.data.nslices - 1:\n"),
    Mutation("gives the roots in the order of arrival", DISPATCH,
             "for span in round_.tree.spans]", "for span in round_.tree.values]"),
    Mutation("reduces in the order of arrival", REDUCTION,
             "left, right = (span, other) if span < other else (other, span)", "left, right = span, other"),
    Mutation("forgets to take back what a lost node owed", DISPATCH,
             "                commands += self._take_back(round_, name, list(round_.debts[name]))\n", ""),
    Mutation("forgets to send again what a lost node owed", DISPATCH,
             "commands = [command for round_ in waiting for command in self._send_queued(round_)]\n",
             "commands: list[Command] = []\n"),
    Mutation("forgets to send again what a lost worker had", DISPATCH,
             "return [*self._take_back(round_, name, slices), *self._send_queued(round_)]",
             "return self._take_back(round_, name, slices)"),
    Mutation("forgets to take back what a lost worker had", DISPATCH,
             "return [*self._take_back(round_, name, slices), *self._send_queued(round_)]",
             "return self._send_queued(round_)"),
    Mutation("tells nodes nothing of the end of a round", DISPATCH,
             '                commands.append(Send(name, Kind.CANCEL, {"round": round_.number}))\n',
             "                pass\n"),
    Mutation("takes it that who sends the last root has ended the round", DISPATCH,
             "has_ended = name if len(held) == 1 else None", "has_ended = name"),
    Mutation("does not tell of further slices of known data", ASSIGNMENT,
             "    if not data.refs or known >= its.slices:\n", "    if not data.refs or known:\n"),
    Mutation("tells one node alone of a job", ASSIGNMENT,
             "    if job.number in node.jobs:\n", "    if job.told:\n"),
    Mutation("keeps what lost nodes were told of data", HOLDINGS,
             "            data.told.pop(name, None)\n", "            pass\n"),
    Mutation("sends the params once a round and not once a node", DISPATCH,
             "known = name in round_.debts\n", "known = bool(round_.debts)\n"),
    Mutation("forgets the deadlines", DISPATCH,
             "            self._deadlines.set(number, deadline)\n", "            pass\n"),
    Mutation("waits for nodes that cannot come", DISPATCH,
             'return [] if coming else self._fail(round_, Failure("unreachable", self._roster.reasons))', "return []"),
    Mutation("does not wait for nodes that come", DISPATCH,
             "coming = self._roster.somebody_comes", "coming = False"),
    Mutation("gives no slice up as poison", DISPATCH, "needed and round_.deaths[blamed] >= POISON", "False"),
    Mutation("takes a slice for poison too soon", DISPATCH, "round_.deaths[blamed] >= POISON:",
             "round_.deaths[blamed] >= POISON - 1:"),
    Mutation("blames a slice for what another has killed", DISPATCH, "round_.deaths[blamed] += needed",
             "round_.deaths.update({at: round_.deaths[at] + 1 for at in slices or [blamed]})"),
    Mutation("tries what has raised again", DISPATCH, '        what, text, host = header["what"],',
             "        if header['what'] == 'task':\n"
             "            return [*self._take_back(round_, name, [header['slice']]), *self._send_queued(round_)]\n"
             '        what, text, host = header["what"],'),
    Mutation("suspects nobody", LIVENESS, "if silence >= SUSPECT_AFTER and", "if silence >= 1e9 and"),
    Mutation("suspects nodes while it was away itself", LIVENESS, "away, self.at = now - self.at > AWAY,",
             "away, self.at = False,"),
    Mutation("asks no silent node for a sign of life", LIVENESS,
             '            found.commands.append(Send(node.name, Kind.PING, {"t": now}))\n', ""),
    Mutation("gives no silent node up", LIVENESS, "if silence >= LOST_AFTER:", "if silence >= 1e9:", "silence"),
    Mutation("does not believe in who is heard again", DISPATCH,
             '        self._roster.move(node, "heard")\n', ""),
    Mutation("looks at silence once", LIVENESS, "now + SWEEP if rounds else None", "None"),
    Mutation("forgets the successor of a lost node", DISPATCH,
             "        self.add_node(name, node.host, node.workers, node.asked)\n", ""),
    Mutation("keeps lost nodes beside their successors", DISPATCH,
             "        node = self.nodes.pop(lost)\n", "        node = self.nodes[lost]\n"),
    Mutation("keeps every job", JOBS,
             "while (len(self._jobs) > kept or self._code_bytes > code_kept) and self._unused:", "while False:"),
    Mutation("lets nodes keep every job", ASSIGNMENT, "            roster.nodes[name].forget.append(job.number)\n", ""),
    Mutation("forgets jobs that are in use", JOBS, "        job.users -= 1\n        if not job.users:\n",
             "        job.users = 0\n        if True:\n"),
    Mutation("goes on sending what only an ended round wanted", SERVING,
             "        if not transfers:\n", "        if True:\n"),
    Mutation("does not answer who asks in the name of an ended round", SERVING,
             "return [*refused, *", "return [*"),
    Mutation("loses credit", SERVING, "return [*self._roster.nodes[name].transfers.taken(granted)]",
             "return [*self._roster.nodes[name].transfers.taken(granted - 1)]"),
    Mutation("leaves a failed load as it is", SERVING,
             "return [command for round_ in alike for command in self._fail(round_, failure)]", "return []", "errors"),
    Mutation("lets go of data that a round uses", HOLDINGS,
             "        if data.rounds or data.leases:\n", "        if data.leases:\n"),
    Mutation("lets go of data that somebody holds", HOLDINGS,
             "        if data.rounds or data.leases:\n", "        if data.rounds:\n"),
    Mutation("keeps data that nobody holds", HOLDINGS,
             "        self.timers.set(data.number, now + GRACE)\n", "        pass\n"),
    Mutation("tells nodes nothing of data that goes", ASSIGNMENT,
             '        commands.append(Send(name, Kind.RELEASE, {"data": [data.number], "forget": _to_forget(node)}))\n',
             "        pass\n"),
    Mutation("node: removes what other data has as well", SCHEDULER,
             "gone = [ref for ref in dict.fromkeys(unnamed) if self._named[ref] <= 0]",
             "gone = list(dict.fromkeys(unnamed))"),
    Mutation("node: keeps the code of jobs that are forgotten", SCHEDULER,
             "                unnamed += [] if job.code is None else [job.code]\n", ""),
    Mutation("leaves nodes with a part of what has changed", SERVING,
             "commands: list[Command] = [Gone(node.name, block.ref), *", "commands = [*", "refs"),
    Mutation("takes it that what has changed was sent", SERVING,
             "block.ref), *node.transfers.taken(block.size)]", "block.ref)]", "refs"),
    Mutation("gives out the same slice twice at a time", DISPATCH,
             "        if not self.speculation:  # it has given them away\n",
             "        if not self.speculation:\n"
             "            return self._send_task(idle, round_, share(single)) if idle else []\n"
             "        if False:\n"),
    Mutation("tries the slices of silent nodes where nothing may be tried twice", STEALING,
             "                return self._speculation\n", "                return True\n"),
    Mutation("never looks for work for idle nodes", STEALING,
             "            if other is None:\n", "            if other is not None or True:\n"),
    Mutation("believes in shares that are not the node's to give", DISPATCH,
             "single = sorted(set(round_.single(name)).intersection(indices))", "single = sorted(indices)"),
    Mutation("leaves a slice out when it spreads them", ASSIGNMENT,
             "    for position, index in enumerate(indices):\n",
             "    for position, index in enumerate(indices[:-1] or indices):\n"),
    Mutation("runs what has no data on the first nodes alone", ASSIGNMENT,
             "seats[len(seats) * position // len(indices)]", "seats[len(seats) * position // len(indices) // 2]"),
    Mutation("queues nothing of what is taken back", BOOKS,
             '                self.move(index, "lost")\n', ""),
    Mutation("leaves others owing what is done", BOOKS,
             "            self.debts[owner].difference_update(indices)\n", "            pass\n"),
    Mutation("takes slices back that others try", BOOKS,
             "tuple(owner for owner in self.owners[index] if owner != name)", "()"),
    # A node
    Mutation("node: forgets the slices of a worker that was interrupted", SCHEDULER,
             "            round_.again(round_.abandon(worker))\n        return self._assign(now)\n\n    def on_failed",
             "            round_.abandon(worker)\n        return self._assign(now)\n\n    def on_failed"),
    Mutation("node: maps what a lost worker had, as the master has others do", SCHEDULER,
             "        round_.drop(slices)\n        report.update",
             "        round_.again(slices)\n        report.update"),
    Mutation("node: does not tell which slices a lost worker had", SCHEDULER,
             '"slice": at, "slices": slices})', '"slice": at, "slices": []})'),
    Mutation("node: goes on with a cancelled round", SCHEDULER,
             "            return [*self._end(round_), *self._assign(now)]\n        self._turns.stir(round_)\n",
             "            return []\n        self._turns.stir(round_)\n"),
    Mutation("node: leaves workers at a round that is over", SCHEDULER,
             "[Interrupt(worker) for worker in round_.works]", "[]", "late"),
    Mutation("node: keeps the results of a round that is over", SCHEDULER,
             "        for held in round_.held:\n            held.release()\n", ""),
    Mutation("node: keeps the data of a round that is over", SCHEDULER,
             "            self.refs.unpin(ref)\n", "            pass\n"),
    Mutation("node: does not keep the data of a round", SCHEDULER,
             "            self.refs.pin(ref)\n", "            pass\n"),
    Mutation("node: does not ask again for what an ended round has asked for", SCHEDULER,
             "        self.wants.leave(round_.number)\n", ""),
    Mutation("node: does not ask again for what is gone", SCHEDULER,
             "        return [command for number in first for command in self._get(number, [ref])]\n",
             "        return []\n", "refs"),
    Mutation("node: forgets who else waits for what one does not need any more", WANTS,
             "            if not self._who[ref]:\n                del self._who[ref]\n",
             "            del self._who[ref]\n"),
    Mutation("node: forgets a round that had no work when its turn came", SCHEDULER,
             "        if round_ is not None:\n            self._turns.stir(round_)\n        return round_\n",
             "        return round_\n"),
    Mutation("node: passes over what a round has for other workers", SCHEDULER,
             "            if round_.has_work:\n                self._turns.stir(round_)\n", "            pass\n"),
    Mutation("node: does not notice what has arrived", SCHEDULER,
             "                self._turns.stir(self.rounds[number])\n        return self._assign(now)",
             "                self._turns.stir(self.rounds[number])\n        return []"),
    Mutation("node: begins before the params are here", ROUNDS,
             "        if self.lacking:\n            return False\n", ""),
    Mutation("node: takes slices that come back for never tried", ROUNDS,
             "        if not self._begun.isdisjoint(indices):\n", "        if False:\n"),
    Mutation("takes slices that a node gives away for never tried", DISPATCH,
             '        note_attempts(round_, header["indices"], header.get("attempts", ()))\n', ""),
    Mutation("node: keeps the results of attempts that have lost", SCHEDULER,
             "            for _, held in roots:\n                held.release()\n            return self._assign(now)",
             "            return self._assign(now)"),
    Mutation("node: keeps its roots", SCHEDULER,
             "        if not round_.owed:\n            commands += self._finish(round_)\n"
             "        return self._assign(now, commands) if assign",
             "        return self._assign(now, commands) if assign"),
    Mutation("node: sends its roots and keeps them", SCHEDULER,
             "            round_.tree.take(span).release()\n", "            pass\n"),
    Mutation("node: tells of an error in a slice that is done", SCHEDULER,
             "elif at is not None and at not in round_.owed:", "elif False:", "late"),
    Mutation("node: tries things twice where that is not wanted", SCHEDULER,
             "if self._check is None and self.speculation and self.rounds:", "if self._check is None and self.rounds:"),
    Mutation("node: makes no second attempts", SCHEDULER,
             "            commands += self._second_attempts(now)\n", "            pass\n"),
    Mutation("node: keeps what it has given away", ROUNDS,
             "            self.drop(unbegun)\n            return unbegun\n", "            return unbegun\n"),
    Mutation("node: keeps the parts of what has come whole", ROUNDS,
             "                self.tree.take(part).release()\n", "                pass\n", "late"),
    Mutation("node: keeps at work who can bring nothing new", ROUNDS,
             "return self._supersede() if self._contested else []", "return []"),
    Mutation("node: keeps what was folded", FOLDS,
             "        for held in fold.values():\n            held.release()\n", ""),
    Mutation("node: gives a part of a sum for the whole", FOLDS, "        if fold.left:\n            return\n", ""),
    Mutation("node: forgets the part that a lost worker was at", FOLDS,
             "            fold.todo.append(part)\n", "            pass\n"),
    Mutation("node: forgets where the parts of a sum went", ROUNDS,
             "*folding, *(fold.out for fold in folds if fold.out is not None)]", "*folding]"),
    Mutation("node: loses what a lost worker was folding", FOLDS,
             "            for span, held in fold.items():\n                self._tree.add(span, held)\n",
             "            pass\n"),
    Mutation("node: waits for what others have done", ROUNDS,
             "        self.owed -= gone\n", ""),
    Mutation("node: folds what a job collects", ROUNDS,
             "folds=job.folds)", "folds=True)", "calm"),
    Mutation("node: adds what a job collects", ROUNDS,
             "self.adds = self.folds and not", "self.adds = not", "calm"),
    Mutation("node: sends what it could fold", ROUNDS,
             "return not (self.owed or self.works or self.folds.in_parts is not None or self.tree.pairs())",
             "return not (self.owed or self.works)"),
    Mutation("takes who does what a lost worker had for the first one at it", DISPATCH,
             "        round_.again.update(nobodys)\n", ""),
    Mutation("takes who helps a late node for the first one at a slice", BOOKS,
             "                self.again[index] += 1\n", ""),
    Mutation("node: does not hear that others were at a slice before", SCHEDULER,
             'round_.add(header["indices"], missing, header.get("attempts", ()))',
             'round_.add(header["indices"], missing)'),
    Mutation("node: takes a second attempt for the first one", ROUNDS,
             "            self._count(second.slices)\n", ""),
    Mutation("node: takes who does what was interrupted for the first one at it", ROUNDS,
             "        self._count(left)\n", ""),
    # Calls
    Mutation("calls: takes what has ended for ended again", CALLS,
             "            if call.over:\n                continue\n            call.deaths", "            call.deaths"),
    Mutation("calls: forgets those of a lost node", CALLS,
             "            self._put_back([self._leave(name, number) for number in list(at.calls)])\n",
             "            for number in list(at.calls):\n                self._leave(name, number)\n"),
    Mutation("calls: has nobody try those of a silent node", CALLS,
             "            self._put_back(self.at[name].calls.values())\n", "            pass\n", "silence"),
    Mutation("calls: gives none up as poison", CALLS,
             "how == LOST and call.deaths < POISON", "how == LOST"),
    Mutation("calls: takes one for poison too soon", CALLS,
             "how == LOST and call.deaths < POISON", "how == LOST and call.deaths < POISON - 1"),
    Mutation("calls: takes what comes back for a death", CALLS,
             "call.deaths += how == LOST", "call.deaths += how >= LOST"),
    Mutation("calls: loses what comes back", CALLS,
             "        self._put_back(back)\n", ""),
    Mutation("calls: puts what comes back behind all others", CALLS,
             "            queue.extendleft(sorted(its, key=lambda call: -call.id))", "            queue.extend(its)"),
    Mutation("calls: queues one twice", CALLS,
             "if not call.over and not call.queued and", "if not call.over and"),
    Mutation("calls: waits for silent nodes with what others have given back", CALLS,
             "self._roster.ready.keys().isdisjoint(call.nodes)", "not call.nodes", "silence"),
    Mutation("calls: gives one to a node that has it", CALLS,
             "            if name in call.nodes:\n", "            if False:\n", "silence"),
    Mutation("calls: stops none that are cancelled", CALLS,
             "        return commands + self.give_out()\n\n    def forget(",
             "        return self.give_out()\n\n    def forget("),
    Mutation("calls: one submitter goes first", CALLS,
             "                self._queues.move_to_end(submitter)\n", "                pass\n"),
    Mutation("calls: no window", CALLS,
             "else self.window - len(self.calls)", "else MAX_WINDOW * 4"),
    Mutation("calls: a window that closes", CALLS,
             "max(self.window - self.window // 8, self.least)", "0"),
    Mutation("calls: a window that never grows back", CALLS,
             "self.window = min(2 * self.window, self._most)", "self.window = max(1, self.window // 2)"),
    Mutation("calls: no bound for bytes in a message", CALLS,
             "len(batch) < count and nbytes <= MAX_BYTES:", "len(batch) < count:"),
    Mutation("calls: fetches nothing for who is idle", CALLS,
             "        self.at[other].recalled = True\n", "        return []\n"),
    Mutation("calls: asks the same node once only", CALLS,
             "            at.recalled = False\n", "            pass\n"),
    Mutation("calls: forgets functions while calls are out", CALLS,
             "return [] if function.calls else self._dismiss(function)", "return self._dismiss(function)"),
    Mutation("calls: keeps functions that nobody needs", CALLS,
             "            self._unneeded.append(function)\n", "            pass\n"),
    Mutation("calls: describes a function to one node alone", CALLS,
             "            if name not in call.function.at:\n", "            if not call.function.at:\n"),
    Mutation("calls: looks at silence for rounds alone", DISPATCH,
             "bool(self.rounds or self.calls.calls)", "bool(self.rounds)", "silence"),
    Mutation("calls: leaves them to silent nodes when others come", DISPATCH,
             "search_in(name, self._now)\n        self.calls.on_ready()\n", "search_in(name, self._now)\n", "silence"),
    Mutation("node, calls: blames all of a dead worker", DESK,
             '                self._end(Return(call, AGAIN, b""))\n            self._adrift',
             '                self._end(Return(call, LOST, b""))\n            self._adrift'),
    Mutation("node, calls: blames none of a dead worker", DESK,
             "else Return(begun, LOST, said))", 'else Return(begun, AGAIN, b""))'),
    Mutation("node, calls: forgets what a dead worker has written", DESK,
             "        commands = self._look(now)\n        self._running.discard(worker)\n",
             "        commands: list[Command] = []\n        self._running.discard(worker)\n"),
    Mutation("node, calls: never misses what a dead worker had taken", DESK,
             "        self._doubtful = {", "        self._adrift = set()\n        self._doubtful = {"),
    Mutation("node, calls: gives up what a living worker has taken", DESK,
             "if self._adrift and self._doubtful.keys().isdisjoint(self._running):", "if self._adrift:"),
    Mutation("node, calls: gives back what has begun", DESK,
             '        for _ in range(min(header["count"], len(self._unwritten))):\n'
             '            self._end(Return(self._unwritten.pop().call, AGAIN, b""))\n',
             '        for call in sorted(self._given, reverse=True)[: header["count"]]:\n'
             "            self._unwritten = deque(record for record in self._unwritten if record.call != call)\n"
             '            self._end(Return(call, AGAIN, b""))\n'),
    Mutation("node, calls: gives back what is still in the queue", DESK,
             '            self._returns.append(Return(number, STOPPED, b""))\n        self._take_out()\n',
             '            self._returns.append(Return(number, STOPPED, b""))\n'
             "        self._unwritten.extendleft(reversed(list(self.queue.records)))\n"),
    Mutation("node, calls: stops none", DESK,
             "        return [StopCall(worker, runs)]\n", "        return []\n"),
    Mutation("node, calls: stops one in its first worker alone", DESK,
             "worker = self._stopping.pop(one.call, None)\n", "worker = self._stopping.get(one.call)\n"),
    Mutation("node, calls: kills who has stopped", DESK,
             "return [] if worker is None else [Spare(worker)]", "return []"),
    Mutation("node, calls: frees an arena early", ARENAS,
             "        if arena.users:\n            return\n", "        if arena.users > 1:\n            return\n"),
    Mutation("node, calls: never frees an arena", DESK,
             "        self._arenas.free(self._given.pop(one.call).arena)\n", "        del self._given[one.call]\n"),
    Mutation("node, calls: looks no more at who has just begun one", DESK,
             "again = again or bool(returns) or not runs or now - since < LOOK", "again = again or bool(returns)"),
    Mutation("node, calls: leaves in the queue's way what it had no room for", DESK,
             "        self._refill()\n        self.at = now", "        self.at = now"),
    Mutation("node, calls: does not answer who asks for some back", DESK,
             "            if recalled and not returns:\n", "            if False:\n"),
    Mutation("node, calls: never has calls yield to rounds", SEATS,
             "        if seat.calls and not seat.yields and seat.ahead == 0.0:\n", "        if False:\n"),
    Mutation("node, calls: never has rounds yield to calls", SEATS,
             "            self.ahead += now - self.began\n", "            pass\n"),
    Mutation("found: node, calls: who got calls without a limit never yields", SEATS,
             "            seat.ahead = seat.ahead if owed else 0.0\n", ""),
    Mutation("found: node, calls: a ring that is spoilt stays so", DESK,
             "        self.rings[worker].clear()\n", "        self.rings[worker].words[CALL] = 0\n"),
    Mutation("found: node, calls: what an unfit process gave back is given up", DESK,
             "        self._adrift.discard(one.call)\n", ""),
    Mutation("found: node, calls: a call is lost with a ring that is spoilt", DESK,
             "        if worker not in self._spoilt:  # else its end is to come\n", "        if True:\n"),
    Mutation("found: node, calls: a function without room is unknown", DESK,
             "        except NoRoom as error:\n            return self._refuse(ids, str(error))\n        calls =",
             "        except NoRoom as error:\n            self._homeless.clear()\n"
             "            return self._refuse(ids, str(error))\n        calls ="),
    Mutation("found: calls: a silent node without slices breaks the loop", DISPATCH,
             "self._roster.owed.get(name, 0)", "self._roster.owed[name]", "silence"),
    # Defects that were found
    Mutation("found: tries a slice again that has raised, as often as it can before the round ends", SCHEDULER,
             "failed = slices if at is None else [at]", "failed: list[int] = []"),
    Mutation("found: folds again what has raised", FOLDS,
             "        if self.unfoldable:\n            return None\n", ""),
    Mutation("found: an error ends a round although the slice is done", DISPATCH,
             'if round_.states[header["slice"]] == DONE:', "if False:", "late"),
    Mutation("found: a module for which there was no room is waited for for ever", SCHEDULER,
             "for number in self.wants.gone(ref) if", "for number in self.wants._who.get(ref, ()) if", "refs"),
    Mutation("found: nodes without a part in a round never look for slices of it", DISPATCH,
             "            self._stealer.wake(self._roster.idle(data.nslices), self._now,",
             "            (self._roster.idle(data.nslices), self._now,"),
    Mutation("found: what waits behind another round is not shared", STEALING,
             "name in self._roster.overloaded or name", "len(round_.debts[name]) > node.workers or name"),
    Mutation("found: a node that has asked in vain asks nobody else", DISPATCH,
             "                commands = self._find_work(idle.name, search.since)\n", "                pass\n"),
    Mutation("found: idle nodes do not look again when a round ends", DISPATCH,
             "        if self.rounds:\n            self._stealer.wake(round_.debts, self._now)\n", ""),
    Mutation("found: what was shared with a node that is lost is not shared again", DISPATCH,
             "        return self._leave_alone(round_, shared)\n", "        return []\n"),
    Mutation("found: a slice that was shared and is given again is not shared again", ROUNDS,
             "            self._shared.difference_update(indices)\n", "", "late"),
    Mutation("found: a slice that is held already is mapped again when it is given again", ROUNDS,
             "if index not in self.owed and index not in held]", "if index not in self.owed]"),
    Mutation("found: a round that a node has ended begins there again, and nobody ends it", ASSIGNMENT,
             '"params": "have" if known else', '"params": "ref" if known else'),
    Mutation("found: when the last slices are given away nobody folds the rest", SCHEDULER,
             "[*commands, *self._finish(round_), *self._assign(now)]\n\n    def on_arrived",
             "[*commands, *self._finish(round_)]\n\n    def on_arrived"),
    Mutation("found: a transfer goes on behind what the node had no room for", TRANSFERS,
             "        self.offset = min(self.offset, part.offset)\n", "        pass\n", "refs"),
    Mutation("found: jobs are kept as long as no node is ready", LINE,
             "        forget(self._jobs.forget(JOBS_KEPT, CODE_KEPT), self._roster)\n",
             "        if self._roster.ready:\n"
             "            forget(self._jobs.forget(JOBS_KEPT, CODE_KEPT), self._roster)\n"),
    Mutation("begins no round but when one is submitted", DISPATCH,
             "self._line.end(round_.job, round_.data, self._now), *self._begin_next()]",
             "self._line.end(round_.job, round_.data, self._now)]"),
    Mutation("begins no round when a node has come", DISPATCH,
             "return [*commands, *self._begin_next(), *self.calls.give_out()]",
             "return [*commands, *self.calls.give_out()]"),
    Mutation("begins no round when a node has gone silent", DISPATCH,
             "*self._line.release(self._holdings.due(now)), *self._begin_next()]",
             "*self._line.release(self._holdings.due(now))]"),
    Mutation("has rounds overtake each other", LINE, "popitem(last=False)", "popitem()"),
    Mutation("does not hear of rounds that nodes have no more", DISPATCH,
             "            self.nodes[name].rounds -= 1\n", ""),
    Mutation("keeps the data of rounds that did not begin", DISPATCH,
             "ended = self._line.end(waiting.job, waiting.data, self._now)", "ended: list[Command] = []"),
    Mutation("found: a removed node that was closed before goes on looking for work", DISPATCH,
             "            return [*self._let_go(node), *self.reassign()]\n", "            return []\n", "churn"),
    Mutation("plans anew for nobody who goes silent", NODES, "        self.version += 1\n", ""),
    Mutation("found: nobody asks who is alone with what it had helped with", DISPATCH,
             "        for owner in others:\n            self._stealer.touch(round_, owner)\n", ""),
]  # fmt: skip


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module with one thing in it changed."""

    mutation: Mutation

    def get_code(self, fullname: str):
        source = self.get_data(self.path).decode()
        if source.count(self.mutation.old) != 1:
            raise SystemExit(f"{self.mutation.what!r}: its text stands {source.count(self.mutation.old)} times there")
        return self.source_to_code(source.replace(self.mutation.old, self.mutation.new), self.path)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self.mutation = mutation

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None):
        if fullname != self.mutation.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        loader = _Loader(fullname, spec.origin or "")
        loader.mutation = self.mutation
        return importlib.util.spec_from_file_location(fullname, spec.origin, loader=loader)


class Caught(NamedTuple):
    """What became of a mutation; `seed` is None where no seed has failed."""

    seed: int | None
    broken: str
    seconds: float


def _run_mutated(mutation: Mutation, most: int) -> Caught:
    """In a process of its own, that has imported nothing of qjam yet."""
    sys.meta_path.insert(0, _Finder(mutation))
    from .runner import run

    began = time.monotonic()
    for seed in range(most):
        outcome = run(seed, mutation.profile)
        if outcome.broken:
            return Caught(seed, outcome.broken, time.monotonic() - began)
    return Caught(None, "", time.monotonic() - began)


def try_out(mutation: Mutation, most: int = MOST) -> Caught:
    """Run seeds with a mutation until one fails."""
    command = [sys.executable, "-m", "tests.simulation.mutations", "--child", mutation.what, "--most", str(most)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{mutation.what}: {ran.stderr or ran.stdout}")
    return Caught(*json.loads(ran.stdout))


def try_all(mutations: Iterable[Mutation], most: int = MOST) -> int:
    """Print what becomes of each; gives how many were not caught."""
    missed = 0
    mutations = list(mutations)
    wrong = try_out(UNCHANGED, 300)
    if wrong.broken:
        raise SystemExit(f"seed {wrong.seed} fails without any mutation: {wrong.broken}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for mutation, caught in zip(mutations, pool.map(lambda m: try_out(m, most), mutations)):
            where = f"seed {caught.seed} ({mutation.profile}): {caught.broken}" if caught.broken else "NOT CAUGHT"
            print(f"{mutation.what:<90} {caught.seconds:5.1f} s  {where[:110]}", flush=True)
            missed += caught.seed is None
    print(f"{len(mutations) - missed} of {len(mutations)} mutations are caught")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--most", type=int, default=MOST, help="seeds for one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        (mutation,) = [mutation for mutation in [UNCHANGED, *MUTATIONS] if mutation.what == args.child]
        print(json.dumps(_run_mutated(mutation, args.most)))
        return 0
    return 1 if try_all((m for m in MUTATIONS if args.only in m.what), args.most) else 0


if __name__ == "__main__":
    sys.exit(main())
