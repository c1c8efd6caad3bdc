"""Options that the subcommands share, and the checks of their values."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from qjam_bench.ends import CHECKOUT

from . import figures as fig
from .hosts import ROUTES


def count(text: str) -> int:
    """Give a positive int, or the error that argparse shows."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def counts(text: str) -> list[int]:
    """Give the ints of `2,8,16`."""
    return [count(part) for part in text.split(",")]


def routes(text: str, known: Sequence[str] = ROUTES) -> list[str]:
    """Give the routes of `direct,tunnel`."""
    for part in text.split(","):
        if part not in known:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(known)}")
    return text.split(",")


def new_file(text: str) -> Path:
    """Give the path of a file that can be written after the measurement."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not a file name in an existing folder")
    return path


def picture(text: str) -> Path:
    """Give the path of a picture, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is not installed; ./scripts/bench makes an environment with it")
    return new_file(text)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare --json and --plot."""
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every figure and facts about the machine")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the figures (PNG)")


def add_markdown(parser: argparse.ArgumentParser) -> None:
    """Declare --markdown."""
    parser.add_argument("--markdown", action="store_true", help="also print the medians as a table in markdown")


def say(text: str = "") -> None:
    """Print a line and flush it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def checkout(what: str) -> None:
    """Raise BenchError if there is no checkout of qjam, because only a checkout has the examples."""
    if not (CHECKOUT / "examples" / "saecost.py").is_file():
        raise fig.BenchError(f"{what} needs examples/ of a checkout of qjam")
