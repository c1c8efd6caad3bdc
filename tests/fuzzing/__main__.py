"""A long run: python -m tests.fuzzing --messages 1000000."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import time

from .campaign import GROWTH, SHARES, Campaign

EVERY = 10.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--messages", type=float, default=1e5, help="how many (100,000)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="how long at the most")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of a run that is to be run again")
    parser.add_argument("--only", metavar="TARGET[:CASE]", help=f"one of {', '.join(SHARES)}; one case of it")
    parser.add_argument("--atheris", action="store_true", help="coverage leads the way; needs `pip install atheris`")
    arguments, rest = parser.parse_known_args()
    if arguments.atheris:
        from .covered import run

        return run(rest)
    if rest:
        parser.error(f"what is {' '.join(rest)}?")
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set of texts is the same in every run
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})
    logging.disable()
    target, _, case = (arguments.only or "").partition(":")
    with Campaign(arguments.seed, (target,) if target else tuple(SHARES)) as campaign:
        if case:
            campaign.case(target, int(case))
        else:
            print(f"seed {arguments.seed}", flush=True)
            long(campaign, arguments.messages, arguments.minutes * 60)
        for line in campaign.report():
            print(line)
        grown = campaign.memory.growth
        if grown > GROWTH:
            print(f"FAILED: {grown:.1f} MiB more than after the warm-up")
        return 1 if campaign.failures or grown > GROWTH else 0


def long(campaign: Campaign, messages: float, seconds: float) -> None:
    """With a line now and then."""
    began = time.monotonic()

    def tell(done: int) -> None:
        rate = done / (time.monotonic() - began)
        print(f"{done:,} messages, {rate:,.0f}/s, {len(campaign.failures)} failures", flush=True)

    campaign.run(messages, seconds, every=EVERY, tell=tell)
    tell(sum(campaign.told.values()))


if __name__ == "__main__":
    sys.exit(main())
