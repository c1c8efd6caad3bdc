"""A party in a process of its own, apart from the threads and the memory of the others; its output goes to a file.

python -m qjam_bench.rivals.seat KIND NAME ARGUMENTS FD is that process. KIND and NAME tell the party's row in KINDS,
ARGUMENTS is a JSON list for its `party`. The process takes its orders from the socket FD. The temporary files of the
party are in a folder of their own, which goes with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, NoReturn

from qjam_bench import ends
from qjam_bench.ends import loops
from qjam_bench.harness.figures import BenchError, OverLimit, PartyLost
from qjam_bench.harness.party import Party
from qjam_bench.harness.processes import below, births, send, wake_when_parent_dies

from . import KINDS

STOP_S = 30.0  # seconds to end; Ray takes some
ABORT_S = 5.0  # seconds to end in the midst of something
START_S = 180.0  # seconds to start
SAID = 2000  # characters shown of the end of a failed party's output


class Seated(Party):
    """A party in another process, which starts its rounds and times them."""

    def __init__(
        self, name: str, connection: Any, process: subprocess.Popen[bytes], log: IO[bytes], rests: bool
    ) -> None:
        """Wait until the process is ready. `log`: its output; `rests`: see `seated`."""
        self._name = name
        self._connection = connection
        self._process = process
        self._log = log
        self._rests = rests
        self._asleep: set[int] = set()
        try:
            self._answer(START_S)
        except OverLimit:
            raise PartyLost(name, f"has not started within {START_S:g} s") from None

    def load(self, data: Any) -> float:
        return float(self._ask("load", data))

    def drive(self, loop: Callable[..., Any], *arguments: Any) -> Any:
        return self._ask("drive", loop, *arguments)

    def drive_within(self, limit: float, loop: Callable[..., Any], *arguments: Any) -> Any:
        """Do as `drive`. OverLimit if it takes more than `limit` seconds: the party is then of no use any more."""
        return self._ask("drive", loop, *arguments, limit=limit)

    def round(self, params: Any) -> Any:
        return self.drive(loops.once, params)

    def _rest(self) -> None:
        """Stop all processes of this party until its next turn: idle ones, too, take time on the cores."""
        self._asleep = {self._process.pid, *below(self._process.pid)}
        send(signal.SIGSTOP, self._asleep)

    def wake(self) -> None:
        """Let the processes of this party go on."""
        send(signal.SIGCONT, self._asleep)
        self._asleep = set()

    def _load(self, data: Any) -> None:
        self.load(data)

    def _ask(self, method: str, *arguments: Any, limit: float | None = None) -> Any:
        self.wake()
        try:
            self._connection.send((method, arguments))
        except BrokenPipeError:
            self._lost()
        return self._answer(limit)

    def _answer(self, limit: float | None) -> Any:
        if not self._connection.poll(limit):
            abort(self._process)
            raise OverLimit(self._name, f"over the limit of {limit:g} s")
        try:
            error, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._lost()
        if self._rests:
            self._rest()
        if error:
            raise BenchError(f"{self._name}: {error}")
        return answer

    def _lost(self) -> NoReturn:
        try:
            self._process.wait(ABORT_S)
        except subprocess.TimeoutExpired:
            abort(self._process)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-SAID:]
        raise PartyLost(self._name, f"has ended: {said.strip() or 'it printed nothing'}") from None


@contextmanager
def seated(name: str, function: str, workers: int, route: str = "local", *, rests: bool = False) -> Iterator[Seated]:
    """Run a party of rounds in a process of its own.

    `rests`: whether all its processes are stopped (SIGSTOP) while other parties have their turns. Not for qjam over
    ssh: its host would take the silence for the end of the master.
    """
    with seat("rounds", name, [function, workers, route], rests=rests) as party:
        yield party


@contextmanager
def seat(kind: str, name: str, arguments: list[Any], *, rests: bool) -> Iterator[Seated]:
    """Run the party of a row of KINDS in a process of its own."""
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qb-", ignore_cleanup_errors=True))
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "qjam_bench.rivals.seat", kind, name, json.dumps(arguments)]
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": folder},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        stack.callback(_end, process)
        stack.enter_context(ours)  # closed first: that tells the process to end
        party = Seated(name, ours, process, log, rests)
        stack.callback(party.wake)
        yield party


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        abort(process)


def abort(process: subprocess.Popen[bytes]) -> None:
    """End the process of a party, and all that it has started."""
    started = births(below(process.pid))
    process.terminate()  # SystemExit there, so that its `with` blocks clean up
    try:
        process.wait(ABORT_S)
    except subprocess.TimeoutExpired:
        started |= births(below(process.pid))
    finally:
        process.kill()  # does nothing once wait() has returned
        process.wait()
        send(signal.SIGKILL, [pid for pid, born in births(started).items() if born == started[pid]])


def main(kind: str, name: str, arguments: str, descriptor: str) -> None:
    """Start the party and call the methods that come over the socket, until it closes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    wake_when_parent_dies()
    os.set_inheritable(int(descriptor), False)  # a child that outlives this process must not keep it open
    ends.prepare()
    connection = Connection(int(descriptor))
    with connection, KINDS[kind][name].open(*json.loads(arguments)) as party:
        connection.send((None, None))
        while True:
            try:
                method, orders = connection.recv()
            except EOFError:
                send(signal.SIGCONT, below(os.getpid()))
                break
            try:
                answer: Any = None, getattr(party, method)(*orders)
            except ArithmeticError as error:
                answer = str(error), None
            connection.send(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
