"""A party in a process of its own, apart from the threads and the memory of the others; its output goes to a file.

python -m qjam_bench.rivals.seat NAME FUNCTION WORKERS ROUTE FD is that process. It takes its orders from the socket FD.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from qjam_bench import ends
from qjam_bench.ends import loops
from qjam_bench.harness.figures import BenchError
from qjam_bench.harness.party import Party
from qjam_bench.harness.processes import below, send, wake_when_parent_dies

from . import PARTIES

STOP_S = 30.0  # seconds to end; Ray takes some
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
        self._answer()

    def load(self, data: Any) -> float:
        return float(self._ask("load", data))

    def drive(self, loop: Callable[..., Any], *arguments: Any) -> Any:
        return self._ask("drive", loop.__name__, *arguments)

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

    def _ask(self, method: str, *arguments: Any) -> Any:
        self.wake()
        self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, answer = self._connection.recv()
        except EOFError:
            self._process.wait(STOP_S)  # then its output is complete
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")[-SAID:]
            raise BenchError(f"{self._name} has ended: {said.strip() or 'it printed nothing'}") from None
        if self._rests:
            self._rest()
        if error:
            raise BenchError(f"{self._name}: {error}")
        return answer


@contextmanager
def seated(name: str, function: str, workers: int, route: str = "local", *, rests: bool = False) -> Iterator[Party]:
    """Run a party in a process of its own.

    `rests`: whether all its processes are stopped (SIGSTOP) while other parties have their turns. Not for qjam over
    ssh: its host would take the silence for the end of the master.
    """
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "qjam_bench.rivals.seat", name, function, str(workers), route]
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
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
    finally:
        process.kill()  # does nothing once wait() has returned
        process.wait()


def main(name: str, function: str, workers: str, route: str, descriptor: str) -> None:
    """Start the party and call the methods that come over the socket, until it closes."""
    wake_when_parent_dies()
    os.set_inheritable(int(descriptor), False)  # a child that outlives this process must not keep it open
    ends.prepare()
    connection = Connection(int(descriptor))
    with connection, PARTIES[name].party(function, int(workers), route) as party:
        connection.send((None, None))
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                send(signal.SIGCONT, below(os.getpid()))
                break
            try:
                answer: Any = None, _do(party, method, arguments)
            except ArithmeticError as error:
                answer = str(error), None
            connection.send(answer)


def _do(party: Party, method: str, arguments: Any) -> Any:
    if method == "load":
        return party.load(*arguments)
    loop, *rest = arguments
    return party.drive(getattr(loops, loop), *rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
