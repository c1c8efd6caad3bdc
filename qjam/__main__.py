"""The program `qjam`, also run as `python -m qjam`: a table of subcommands, each a module in cli/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import qjam

from .cli import doctor, run

SUBCOMMANDS = {"run": run, "doctor": doctor}


def main(words: Sequence[str]) -> int:
    """Run the subcommand named by the first word with the words after it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="qjam", description="Run functions over data on hosts, and check hosts.")
    parser.add_argument("--version", action="version", version=qjam.__version__)
    choices = parser.add_subparsers(dest="subcommand", required=True)
    for name, module in SUBCOMMANDS.items():
        choices.add_parser(name, help=module.SUMMARY, add_help=False)
    chosen = parser.parse_args(words[:1]).subcommand  # the subcommand parses the other words
    status: int = SUBCOMMANDS[chosen].main(words[1:], f"qjam {chosen}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
