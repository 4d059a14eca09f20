"""Time work trees against each other: `replknet bench ops` in processes of each tree, in turns.

Two versions of the package cannot live in one process. Each round runs every tree once, in another order, and the
medians of the rounds are compared. Name the same tree twice under two paths to see what is noise. Example:

    git worktree add /elsewhere/before HEAD~3
    python benchmarks/turns.py /elsewhere/before . --suite overhead --output benchmarks/results/turns.jsonl

A tree that was not installed needs its native kernel beside its sources: copy replknet_native.so of an installation of
it into src/replknet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

Times = dict[tuple[str, str, str], dict[str, list[float]]]  # case, what, way -> tree -> p50 of each round, us


def run(tree: Path, arguments: list[str]) -> tuple[list[dict], dict]:
    """The operator's records of one process, and where they are from."""
    # not the interpreter of an environment in which the package is installed: that one would be imported
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment = os.environ | {"PYTHONPATH": f"{tree / 'src'}{os.pathsep}{packages}"}
    python = Path(sys.base_prefix) / "bin" / "python3"
    command = [str(python), "-m", "replknet.cli.main", "bench", "ops", "--json", *arguments]
    result = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{tree}: {' '.join(command)} ended with {result.returncode}\n{result.stderr}")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return [record for record in records if record["way"].startswith("operator")], records[0]


def measured(trees: list[Path], rounds: int, arguments: list[str]) -> tuple[Times, dict]:
    times: Times = defaultdict(lambda: defaultdict(list))
    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
        for tree in trees[i % len(trees) :] + trees[: i % len(trees)]:
            records, any_record = run(tree, arguments)
            for record in records:
                key = record["case"], record["what"], record["way"]
                times[key][str(tree)].append(1e3 * record["timing"]["p50_ms"])
    return times, any_record


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "trees", type=Path, nargs="+", metavar="TREE", help="work trees; the others are compared with the first"
    )
    p.add_argument("--suite", default="layers", help="of `replknet bench ops`")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--output", type=Path, help="file to which a JSON line a case is appended")
    args, more = p.parse_known_args()
    trees = [tree.resolve() for tree in args.trees]
    times, about = measured(trees, args.rounds, ["--suite", args.suite, *more])
    lines = []
    for (case, what, way), of_tree in times.items():
        medians = [statistics.median(of_tree[str(tree)]) for tree in trees]
        others = "  ".join(f"{m / medians[0]:6.3f} ({m - medians[0]:+.2f} us)" for m in medians[1:])
        print(f"{case:20} {what:20} {way:15} {medians[0]:10.1f} us  {others}")
        # a path says nothing to others: the first, the second, ...
        rounds = {f"tree {i + 1}": of_tree[str(tree)] for i, tree in enumerate(trees)}
        facts = {key: about[key] for key in ("device", "threads", "versions", "date")}
        lines.append({"suite": args.suite, "case": case, "what": what, "way": way, "p50_us": rounds, **facts})
    for i, tree in enumerate(trees[1:], 1):
        ratios = [
            statistics.median(of_tree[str(tree)]) / statistics.median(of_tree[str(trees[0])])
            for of_tree in times.values()
        ]
        mean = statistics.geometric_mean(ratios)
        print(f"tree {i + 1} / tree 1: geometric mean {mean:.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    if args.output is not None:
        with args.output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
