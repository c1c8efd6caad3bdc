"""One command on a host: send to it, read from it, see how it ended. Until the node runs, messages are JSON lines."""

from __future__ import annotations

import json
import threading
from collections import deque
from typing import Any

import paramiko

from qjam.ssh.connection import Refused

from . import relay

STDERR_LINES = 12  # the last lines of stderr that are kept, for error messages
MAX_LINE = 2048  # characters that are kept of a line of stderr
MAX_MESSAGE = 4 * 1024 * 1024  # bytes; our messages are far smaller
MAX_NOISE = 64 * 1024  # bytes that are kept of what a login prints before python starts
END_TIMEOUT = 2.0  # seconds for the exit status to arrive after the end of the output


class RemoteCommand:
    """A command that runs on a host, and its channel. Methods that read raise Refused with the phase that they get."""

    def __init__(self, transport: paramiko.Transport, command: str, timeout: float) -> None:
        self.sending = threading.Lock()  # heartbeats and relayed bytes come from two threads
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._stderr_rest = ""
        self._rest = b""
        try:
            self.channel = transport.open_session(timeout=timeout)
            self.channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise Refused("python", f"the server starts no command: {str(error) or 'the connection ended'}") from error
        self.channel.settimeout(timeout)

    def send_message(self, **message: Any) -> None:
        """Send a line of JSON. Raises OSError if the command has ended."""
        self.send(json.dumps(message).encode() + b"\n")

    def send(self, data: bytes, *, patient: bool = False) -> None:
        """Send bytes. Raises OSError if the command has ended; unless `patient`, also if it reads nothing for long."""
        try:
            with self.sending:
                relay.send(self.channel, data, patient=patient)
        except EOFError as error:
            raise OSError("the channel is closed") from error

    def skip_to(self, marker: bytes, phase: str) -> bytes | None:
        """Skip what the login, a .bashrc or the setup line prints, with the marker at its end, and return None. If the
        output ends without the marker, return the last part of it.
        """
        printed = b""
        while data := self._recv(phase):
            printed += data
            _, found, after = printed.partition(marker)
            if found:
                self._rest = after
                return None
            if len(printed) > 2 * MAX_NOISE:
                printed = printed[-MAX_NOISE:]
        return printed

    def receive_message(self, phase: str) -> dict[str, Any]:
        """Wait for the next message and return it. If it reports a failure, raise that as Refused."""
        while True:
            while b"\n" not in self._rest:
                data = self._recv(phase)
                if not data:
                    raise Refused(phase, f"python ended there ({self.ending()})")
                self._rest = (self._rest + data)[-MAX_MESSAGE:]
            line, _, self._rest = self._rest.partition(b"\n")
            try:
                message = json.loads(line)
            except ValueError:
                continue  # printed by a program that the login started
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
        """The exit status of the command; None if it was killed by a signal, or if the connection is gone."""
        status: int = self.channel.recv_exit_status() if self.channel.status_event.wait(END_TIMEOUT) else -1
        return None if status == -1 else status

    @property
    def ended_well(self) -> bool:
        """Whether the command has ended, with status 0."""
        return self.channel.exit_status == 0

    def ending(self) -> str:
        """How the command ended, in words."""
        status = self.exit_status()
        if status is not None:
            return f"exit status {status}"
        # paramiko does not say which signal it was.
        return "killed by a signal" if self.channel.get_transport().is_active() else "the ssh connection is gone"

    def stderr(self) -> list[str]:
        """The last lines of its stderr. Call this regularly: the command blocks when nobody reads its stderr."""
        while self.channel.recv_stderr_ready():
            text = self._stderr_rest + self.channel.recv_stderr(MAX_NOISE).decode(errors="replace")
            *lines, rest = text.split("\n")
            self._stderr_rest = rest[-MAX_LINE:]
            self._stderr.extend(line[:MAX_LINE] for line in lines if line.strip())
        return [*self._stderr, *([self._stderr_rest] if self._stderr_rest.strip() else [])]

    def end_input(self) -> None:
        """Close its stdin: a node then considers its master gone, and ends."""
        try:
            self.channel.shutdown_write()
        except (OSError, EOFError):
            pass


def run_beside(transport: paramiko.Transport, command: str, timeout: float) -> None:
    """Run another command on the connection, and wait for its end, but for `timeout` seconds at most.

    This takes a thread, because paramiko waits without a limit if the connection is full.
    """

    def run() -> None:
        try:
            channel = transport.open_session(timeout=timeout)
            channel.exec_command(command)
            channel.status_event.wait(timeout)
        except (paramiko.SSHException, OSError, EOFError):
            pass  # no command can run there

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
