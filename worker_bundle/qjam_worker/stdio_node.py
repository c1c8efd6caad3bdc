"""The way to the master where no connection can be made: the uplink's bytes ride the stdin and stdout that ssh gave.

Two streams share them, in frames of a byte (which stream), a length of four bytes, and that many bytes. A child process
relays them between the master and the node, which is connected to a socket and does not know.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from io import BufferedReader
from typing import Any, Optional

from .node.fork_server_client import ForkServer
from .wire.stdio_frames import HEARTBEAT, UPLINK, Frames, frame

PIECE = 128 * 1024  # bytes that are read at once
CONNECT_TIMEOUT = 60.0  # seconds for the node to connect to its relay
ALIVE = 1.0  # seconds between two beats to the node while anything comes from the master


def become_node(
    answer: dict[str, Any],
    read: BufferedReader,
    write: int,
    paths: Sequence[str],
    fork_server: Optional[ForkServer] = None,
) -> None:
    """Be the node that `answer` describes; behind a relay if it says "stdio". `read` and `write` lead to the master."""
    from .__main__ import serve

    welcome = answer["welcome"]
    if not answer["stdio"]:
        serve(welcome, read.fileno(), write, paths, fork_server)
        return
    folder = tempfile.mkdtemp(prefix="qjam-relay-")
    try:
        place = os.path.join(folder, "up")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(place)
        listener.listen(1)
        (beats, beat), (echoes, echo) = os.pipe(), os.pipe()
        if os.fork() == 0:
            try:
                os.close(beats)
                os.close(echo)
                if fork_server is not None:
                    fork_server.forget()
                # `echoes` is readable when the node has ended.
                came, _, _ = select.select([listener.fileno(), echoes], [], [], CONNECT_TIMEOUT)
                if listener.fileno() in came:
                    uplink, _ = listener.accept()
                    shutil.rmtree(folder, ignore_errors=True)  # the node may not live to do so
                    _relay(read, write, uplink, beat, echoes)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)
        for fd in (beat, echoes, write, listener.detach()):
            os.close(fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), read.fileno())
        serve({**welcome, "endpoint": f"ipc://{place}"}, beats, echo, paths, fork_server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _relay(read: BufferedReader, write: int, uplink: socket.socket, beat: int, echoes: int) -> None:
    """Relay until the node has ended. When the master ends, no more beats come, and the node leaves."""
    writing = threading.Lock()

    def up(stream: int, fd: int) -> None:
        try:
            while data := os.read(fd, PIECE):
                rest = memoryview(frame(stream, data))
                with writing:
                    while rest:
                        rest = rest[os.write(write, rest) :]
        except OSError:
            pass  # one side has ended: the reads of the other end too

    def down() -> None:
        frames, beaten = Frames(), 0.0
        try:
            while data := read.read1(PIECE):
                if time.monotonic() - beaten > ALIVE:  # on a slow link the master's own beats queue behind megabytes
                    beaten = time.monotonic()
                    os.write(beat, b"\n")
                for stream, piece in frames.feed(data):
                    if stream == UPLINK:
                        uplink.sendall(piece)
        except OSError:
            pass
        os.close(beat)

    threading.Thread(target=down, daemon=True).start()
    threading.Thread(target=up, args=(UPLINK, uplink.fileno()), daemon=True).start()
    up(HEARTBEAT, echoes)
