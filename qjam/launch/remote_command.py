"""One command on a host: what it is sent, what it says, how it ended. Up to the lease it speaks in lines of JSON."""

from __future__ import annotations

import json
import threading
from collections import deque
from typing import Any

import paramiko

from qjam.ssh.connection import Refused

from . import relay

STDERR_LINES = 12  # that are kept, to tell what went wrong
LINE = 2048  # characters of a line of stderr
MESSAGE = 4 * 1024 * 1024  # bytes; none of ours is near that
NOISE = 64 * 1024  # bytes; of what a login prints before our first word, as many are kept
END_TIMEOUT = 2.0  # seconds for the exit status to come, after the end of the output


class RemoteCommand:
    """A channel with the command under way. The methods that read raise Refused for the phase that they are told."""

    def __init__(self, transport: paramiko.Transport, command: str, timeout: float) -> None:
        self.sending = threading.Lock()  # beats and relayed bytes go the same way
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._stderr_rest = ""
        self._rest = b""
        try:
            self.channel = transport.open_session(timeout=timeout)
            self.channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise Refused("python", f"the server starts no command: {str(error) or 'it hung up'}") from error
        self.channel.settimeout(timeout)

    def tell(self, **message: Any) -> None:
        """Send a line. Raises OSError when the command has ended."""
        self.send(json.dumps(message).encode() + b"\n")

    def send(self, data: bytes, *, patient: bool = False) -> None:
        """Send bytes. Raises OSError when the command has ended, or takes none for long and we are not `patient`."""
        try:
            with self.sending:
                relay.send(self.channel, data, patient=patient)
        except EOFError as error:
            raise OSError("the channel is closed") from error

    def skip_to(self, marker: bytes, phase: str) -> bytes | None:
        """Read up to the marker: what stands before it was printed by the login, a .bashrc, a setup line. Where the
        output ends without it, that much of it is given.
        """
        said = b""
        while data := self._recv(phase):
            said += data
            _, found, after = said.partition(marker)
            if found:
                self._rest = after
                return None
            if len(said) > 2 * NOISE:
                said = said[-NOISE:]
        return said

    def hear(self, phase: str) -> dict[str, Any]:
        """The next message. What the host has failed at is raised as Refused."""
        while True:
            while b"\n" not in self._rest:
                data = self._recv(phase)
                if not data:
                    raise Refused(phase, f"python has ended there ({self.ending()})")
                self._rest = (self._rest + data)[-MESSAGE:]
            line, _, self._rest = self._rest.partition(b"\n")
            try:
                message = json.loads(line)
            except ValueError:
                continue  # something that the login has left running prints into it
            if isinstance(message, dict):
                break
        if "failed" in message:
            raise Refused(phase, str(message["failed"]))
        return message

    def _recv(self, phase: str) -> bytes:
        try:
            return bytes(self.channel.recv(relay.READ))
        except TimeoutError:
            raise Refused(phase, f"nothing was heard of the host for {self.channel.gettimeout():.0f} s") from None
        except (OSError, EOFError) as error:
            raise Refused(phase, f"the ssh connection broke: {error}") from error

    def exit_status(self) -> int | None:
        """Of the command; None where it does not come, because the connection is gone."""
        status: int = self.channel.recv_exit_status() if self.channel.status_event.wait(END_TIMEOUT) else -1
        return None if status == -1 else status

    @property
    def ended_well(self) -> bool:
        """Whether the command has ended, with status 0."""
        return self.channel.exit_status == 0

    def ending(self) -> str:
        """How it ended, in words."""
        status = self.exit_status()
        if status is not None:
            return f"exit status {status}"
        # paramiko does not tell which signal.
        return "killed by a signal" if self.channel.get_transport().is_active() else "the ssh connection is gone"

    def stderr(self) -> list[str]:
        """The last lines of its stderr. To be called now and then: what is not read stops it."""
        while self.channel.recv_stderr_ready():
            text = self._stderr_rest + self.channel.recv_stderr(NOISE).decode(errors="replace")
            *lines, rest = text.split("\n")
            self._stderr_rest = rest[-LINE:]
            self._stderr.extend(line[:LINE] for line in lines if line.strip())
        return [*self._stderr, *([self._stderr_rest] if self._stderr_rest.strip() else [])]

    def end_input(self) -> None:
        """Close its stdin: a node takes that for the end of its master."""
        try:
            self.channel.shutdown_write()
        except (OSError, EOFError):
            pass


def run_beside(transport: paramiko.Transport, command: str, timeout: float) -> None:
    """Run another command on the connection and wait for its end. After `timeout` nobody waits for it any more: in a
    thread of its own, for paramiko knows no limit where the way is full.
    """

    def run() -> None:
        try:
            channel = transport.open_session(timeout=timeout)
            channel.exec_command(command)
            channel.status_event.wait(timeout)
        except (paramiko.SSHException, OSError, EOFError):
            pass  # nothing can be run there

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
