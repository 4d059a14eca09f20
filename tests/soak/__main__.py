"""Run random campaigns for a number of cases or minutes; exit code 1 if a case failed."""

import argparse
import json
import sys
import time
from dataclasses import asdict

import torch

import fuzz
import soak
from soak.campaign import Campaign, Failure, failures

CAMPAIGNS: dict[str, Campaign] = {**soak.CAMPAIGNS, **fuzz.CAMPAIGNS}

# a campaign ends early when it has shown so much
_ENOUGH = 10


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m soak",
        description=__doc__,
        epilog="example: make soak MINUTES=30; python -m soak depthwise --first 4711 --cases 1",
    )
    p.add_argument("campaign", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}; all if none is named")
    p.add_argument("--cases", type=int, default=500, help="of each campaign (500)")
    p.add_argument("--minutes", type=float, help="stop after this time, shared by the campaigns, instead")
    p.add_argument("--first", type=int, help="seed of the first case: 0, with --minutes one that the clock gives")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = p.parse_args()
    unknown = [name for name in args.campaign if name not in CAMPAIGNS]
    if unknown:
        p.error(f"no campaign is called {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")
    # an output that nobody wrote is seen
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    first = args.first if args.first is not None else 0 if args.minutes is None else int(time.time())
    names = args.campaign or list(CAMPAIGNS)
    results = [_run(name, first, args, share=len(names)) for name in names]
    if args.json:
        print(json.dumps(results))
    return int(any(result["failures"] for result in results))


def _run(name: str, first: int, args: argparse.Namespace, share: int) -> dict[str, object]:
    limited = args.minutes is not None
    start = time.monotonic()
    until = start + 60 * args.minutes / share if limited else float("inf")
    found: list[Failure] = []
    done, said = 0, start
    try:
        for failure in failures(CAMPAIGNS[name], first, sys.maxsize // 2 if limited else args.cases, until):
            done += 1
            if failure is not None:
                found.append(failure)
                print(f"FAILED {failure}", file=sys.stderr, flush=True)
            if time.monotonic() > said + 30:
                said = time.monotonic()
                print(f"{name}: {done} cases, {len(found)} failed, {said - start:.0f} s", file=sys.stderr, flush=True)
            if len(found) == _ENOUGH:
                break
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    seconds = time.monotonic() - start
    if not args.json:
        print(f"{name}: {done} cases from seed {first}, {len(found)} failed, {seconds:.0f} s")
    return {
        "campaign": name,
        "first": first,
        "cases": done,
        "seconds": round(seconds, 1),
        "failures": [asdict(failure) for failure in found],
    }


if __name__ == "__main__":
    sys.exit(main())
