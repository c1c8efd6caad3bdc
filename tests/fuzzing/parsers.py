"""Nonsense for all that reads bytes on its own: wire, codec, flat, the relay's frames, lines of JSON, ZAP."""

from __future__ import annotations

import datetime
import json
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import zmq.utils.z85

from qjam.engine.router import Router
from qjam.launch.json_lines import JsonLines
from qjam_worker.values import codec, flat
from qjam_worker.values.codec import CodecError
from qjam_worker.wire.frames import Kind, WireError, unpack
from qjam_worker.wire.stdio_frames import FRAME, Frames

from .bench import Broken
from .mutation import Lore, Mutator, packed, sealed

VALUES: list[Any] = [
    None, True, 5, -(1 << 70), 0.5, "text", "\udcff", b"x" * 3000, bytearray(b"y"), 1j, (1, (2, [3])), {1, 2},
    {(1, "a"), 2.0}, frozenset([b"x"]), {1: 2, "a": [None]}, {(1, 2): {3}}, np.float32(1.5), np.str_("s"),
    np.datetime64("2020-01-01"),
    np.zeros((3, 4)), np.zeros((0, 5)), np.arange(500.0), np.asfortranarray(np.ones((20, 30))), np.array("text"),
    np.zeros(3, dtype=[("a", "i4"), ("b", "f8", (2,))]), np.array(["a", "bcd"]), [np.arange(400), np.arange(300.0)],
    datetime.date(2020, 1, 1), [np.array([object()])], np.array([1, 2], ">i2"), [[[[]]]] * 3,
]  # fmt: skip


def encodings() -> list[codec.Encoded]:
    return [codec.encode(value) for value in VALUES]


class Parsers:
    """One message is one attempt at one of them."""

    def __init__(self, tally: Counter[str]) -> None:
        self.tally = tally
        self.encoded = encodings()
        self.router = Router()
        self.keys = [self.router.admit(name) for name in ("a", "b")]
        self.last: tuple[str, Any] = ("", None)
        self.targets: list[Callable[[Random, Mutator], str]] = [
            self.decode, self.decode, self.decode, self.flat, self.unpack, self.relay, self.lines, self.zap,
        ]  # fmt: skip

    def close(self) -> None:
        self.router.close()

    def run(self, rng: Random) -> None:
        target = rng.choice(self.targets)
        verdict = target(rng, Mutator(rng))
        self.tally[verdict] += 1
        self.tally[f"{target.__name__} {verdict}"] += 1

    def decode(self, rng: Random, mutator: Mutator) -> str:
        encoded = rng.choice(self.encoded)
        header = encoded.header
        buffers = [bytes(buffer) for buffer in encoded.buffers]
        if rng.random() < 0.9:
            header = mutator.bytes(header)
            if rng.random() < 0.9:  # with a right checksum
                header = struct.pack("<I", zlib.crc32(header[4:])) + header[4:]
        if buffers and rng.random() < 0.4:
            at = rng.randrange(len(buffers))
            buffers[at : at + 1] = rng.choice(([], [b""], [mutator.bytes(buffers[at])], [buffers[at]] * 2))
        self.last = "decode", (header, buffers)
        try:
            codec.decode(header, buffers, copy=rng.random() < 0.5, allow_pickle=False)
        except CodecError as error:
            return "frames" if "checksum" in str(error) else "schema"
        return "harmless"

    def flat(self, rng: Random, mutator: Mutator) -> str:
        data = mutator.bytes(b"".join(flat.pieces(rng.choice(self.encoded))))
        self.last = "flat", data
        try:
            header, buffers = flat.read(data)
        except CodecError:
            return "schema"
        if len(header) + sum(map(len, buffers)) > len(data):
            raise Broken("more than there was")
        try:
            codec.decode(header, buffers, allow_pickle=False)
        except CodecError:
            return "schema"
        return "harmless"

    def unpack(self, rng: Random, mutator: Mutator) -> str:
        kind = rng.choice([*Kind, 0, 77])
        if rng.random() < 0.5:
            frames = sealed(kind, rng.randbytes(rng.choice((0, 1, 5, 40))), [b"x"] * rng.randrange(3))
        elif rng.random() < 0.5:
            frames = [rng.randbytes(rng.randrange(30)) for _ in range(rng.randrange(5))]
        else:
            frames = sealed(kind, packed(mutator.value(Lore())), [b""] * rng.randrange(2))
        self.last = "unpack", frames
        try:
            unpack(frames)
        except WireError as error:
            return "frames" if "checksum" in str(error) or "not a qjam" in str(error) else "schema"
        return "harmless"

    def relay(self, rng: Random, mutator: Mutator) -> str:
        """Whatever comes, in whatever pieces: the bytes of each stream in order, and none kept back."""
        data = rng.randbytes(rng.choice((0, 3, 50)))
        for _ in range(rng.randrange(4)):
            size = rng.choice((0, 1, 20, 300))
            data += FRAME.pack(rng.choice((0, 1, 1, 255)), rng.choice((size, size, size + 5, 1 << 31))) + bytes(size)
        if rng.random() < 0.3:
            data = mutator.bytes(data)
        self.last = "relay", data
        expected: list[tuple[int, int]] = []
        at = 0
        while len(data) - at >= FRAME.size:
            stream, size = FRAME.unpack_from(data, at)
            at += FRAME.size
            piece = data[at : at + size]
            expected += [(stream, byte) for byte in piece]
            at += len(piece)
        frames, found, at = Frames(), [], 0
        while at < len(data):
            step = rng.choice((1, 2, 7, 1000))
            found += [(stream, byte) for stream, piece in frames.feed(data[at : at + step]) for byte in piece]
            at += step
        if found != expected:
            raise Broken(f"{len(found)} bytes of {len(expected)} come out")
        return "harmless"

    def lines(self, rng: Random, mutator: Mutator) -> str:
        """Messages, or the end."""
        good = json.dumps({"phase": "python", "seconds": 1.0}).encode() + b"\n"
        data = good * rng.randrange(3) + rng.choice((b"", b"{", b"5\n", b"[]\n", b"\xff\n", b"[" * 5000 + b"\n", b"\n"))
        if rng.random() < 0.5:
            data = mutator.bytes(data)
        self.last = "lines", data
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            reader = JsonLines(ours)
            try:
                while True:
                    if not all(type(message) is dict for message in reader.receive()):
                        raise Broken("a message is no dict")
            except EOFError:
                pass
        return "harmless"

    def zap(self, rng: Random, mutator: Mutator) -> str:
        """Nobody comes in without a key, or under the name of another one."""
        which = rng.randrange(2)
        key = zmq.utils.z85.decode(self.keys[which].public.encode())
        request = [b"1.0", b"7", b"qjam", b"127.0.0.1", b"anything", b"CURVE", key]
        altered = list(request)
        for _ in range(rng.choice((0, 1, 1, 2))):
            if not altered:
                break
            at = rng.randrange(len(altered))
            new = rng.choice((b"", b"x", mutator.bytes(altered[at]), rng.randbytes(32), rng.randbytes(31), b"\xff\xfe"))
            altered[at : at + 1] = rng.choice(([new], [], [new, new]))
        self.last = "zap", altered
        answer = self.router.admission.verdict(altered)
        if len(answer) != 6 or answer[0] != b"1.0":
            raise Broken(f"{answer} is no answer")
        keys = [zmq.utils.z85.decode(keys.public.encode()) for keys in self.keys]
        right = len(altered) == 7 and altered[0] == b"1.0" and altered[2] == b"qjam" and altered[5] == b"CURVE"
        name = b"ab"[keys.index(altered[6]) :][:1] if right and altered[6] in keys else None
        if (answer[2] == b"200") != (name is not None) or (name is not None and answer[4] != name):
            raise Broken(f"{altered} was answered by {answer}")
        return "schema" if name is None else "harmless"
