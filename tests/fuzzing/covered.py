"""Coverage leads the way, by libFuzzer: bytes for all that reads them, at first what real messages and values are.

atheris is not among what the tests need, for it weighs 35 MB and runs for hours: `pip install atheris`. Arguments after
`--atheris` go to libFuzzer, as in `--atheris -max_total_time=600 corpus/`.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path
from random import Random

from .mutation import opened, packed, sealed

KIND, CODEC, FLAT = range(3)  # the last two bits of the first byte; 3 is the relay


def run(arguments: list[str]) -> int:
    """Until libFuzzer has enough; it ends the process itself."""
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["qjam_worker"]):
        for name in [name for name in sys.modules if name.startswith("qjam_worker")]:
            del sys.modules[name]  # to be imported anew, with marks of what is covered
        from qjam_worker.values import codec, flat
        from qjam_worker.wire import frames, stdio_frames

    def read_message(flags: int, data: bytes) -> None:
        with contextlib.suppress(frames.WireError):
            frames.unpack(sealed(data[0] % 17, data[1:], [b"x"] * (flags >> 6)))

    def read_value(flags: int, data: bytes) -> None:
        header = struct.pack("<I", zlib.crc32(data)) + data
        with contextlib.suppress(codec.CodecError):
            codec.decode(header, [bytes(100)] * (flags >> 6), allow_pickle=False)

    def read_flat(flags: int, data: bytes) -> None:
        with contextlib.suppress(codec.CodecError):
            codec.decode(*flat.read(data), allow_pickle=False)

    def read_relay(flags: int, data: bytes) -> None:
        relayed, half = stdio_frames.Frames(), len(data) // 2
        assert sum(len(piece) for part in (data[:half], data[half:]) for _, piece in relayed.feed(part)) <= len(data)

    readers = (read_message, read_value, read_flat, read_relay)

    def one(data: bytes) -> None:
        """The first byte tells who reads it; checksums are made right, for none is ever guessed."""
        if len(data) > 1:
            readers[data[0] % 4](data[0], data[1:])

    folder = next((Path(argument) for argument in arguments if not argument.startswith("-")), None)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        for number, data in enumerate(seeds()):
            (folder / f"seed-{number}").write_bytes(data)
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()
    return 0


def seeds() -> list[bytes]:
    """What is right, to begin with."""
    from qjam_worker.values import flat

    from .bench import small
    from .masters import Episode
    from .parsers import encodings

    made = []
    for encoded in encodings():
        made.append(bytes([CODEC | min(3, len(encoded.buffers)) << 6]) + encoded.header[4:])
        made.append(bytes([FLAT]) + b"".join(flat.pieces(encoded)))
    with small() as clock:
        episode = Episode(clock, Random(1), Counter())
        episode.run(100)
        made += [bytes([KIND, kind]) + header for kind, header, _ in map(opened, episode.said)]
    made += [bytes([KIND, kind]) + packed({"round": 1}) for kind in range(1, 16)]
    return made
