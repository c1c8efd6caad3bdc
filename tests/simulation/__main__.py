"""Runs seeds: `python -m tests.simulation --seeds 10000`. Shows what a failing one does, made as small as can be."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

from .plans import PROFILES
from .runner import Outcome, kind, run, run_all, show


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--profile", choices=["any", *PROFILES], default="any", help="what goes wrong")
    parser.add_argument("--trace", action="store_true", help="with --seed: tell what happens, also when all is well")
    parser.add_argument("--whole", action="store_true", help="with --seed: do not make it smaller")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--all", action="store_true", help="go on after a failure; show the first of each kind")
    args = parser.parse_args()
    if args.seed is not None:
        outcome = run(args.seed, args.profile)
        if args.trace or outcome.broken:
            print(show(args.seed, args.profile, smaller=not args.whole, lines=sys.maxsize if args.whole else 400))
        else:
            print(f"seed {args.seed}: all is well")
        return 1 if outcome.broken else 0
    return run_many(args)


def run_many(args: argparse.Namespace) -> int:
    began = time.monotonic()
    counts: Counter[str] = Counter()
    profiles: Counter[str] = Counter()
    failed: dict[str, list[Outcome]] = {}
    done = steps = 0
    outcomes = run_all(range(args.first, args.first + args.seeds), args.profile, args.processes)
    for outcome in outcomes:
        done += 1
        steps += outcome.steps
        counts += outcome.counts
        profiles[outcome.profile] += 1
        if outcome.broken:
            failed.setdefault(kind(outcome.broken), []).append(outcome)
            if not args.all:
                break
    seconds = time.monotonic() - began
    print(f"{done} seeds in {seconds:.1f} s: {done / seconds:.0f} seeds/s, {steps / done:.0f} events a seed")
    print("  profiles: " + ", ".join(f"{name} {count}" for name, count in profiles.most_common()))
    for what in ("fault", "outcome"):
        told = [f"{name.removeprefix(what + ': ')} {count}" for name, count in counts.most_common() if what in name]
        print(f"  {what}s: " + ", ".join(told))
    print("  " + ", ".join(f"{name} {count}" for name, count in counts.most_common() if ": " not in name))
    for outcomes_of_kind in failed.values():
        first = outcomes_of_kind[0]
        print(f"\n{len(outcomes_of_kind)} FAILED like seed {first.seed} ({first.profile}): {first.broken}")
        if not args.all:
            print(show(first.seed, args.profile))
        print(f"to see it again: python -m tests.simulation --seed {first.seed} --profile {args.profile}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
