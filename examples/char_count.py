"""Count each letter from a to z, upper and lower case together, in a text file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase


def mapfunc(params: None, lines: Sequence[str]) -> list[int]:
    """Return the counts of a to z in `lines`, one slice of the text: 26 ints, which add up element by element."""
    text = "".join(lines).lower()
    return [text.count(letter) for letter in ascii_lowercase]


def main() -> None:
    """Print one line per letter."""
    from qjam import DataSet, Master, QjamError

    parser = argparse.ArgumentParser(description="Count the letters of a text file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("hosts", nargs="*", help='"local*2", "node1*8" (default: one worker per usable core here)')
    args = parser.parse_args()
    try:
        lines = args.file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        parser.error(f"{args.file}: {error.strerror}")

    try:
        master = Master(args.hosts or None)
    except (ValueError, QjamError) as error:
        parser.error(str(error))
    with master:
        counts = master.run(mapfunc, None, DataSet(lines or [""]))
    for letter, count in zip(ascii_lowercase, counts, strict=True):
        print(f"{letter}\t{count}")


if __name__ == "__main__":
    main()
