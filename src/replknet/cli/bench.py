"""replknet bench"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from replknet.bench import networks, ops, overhead, plans, tables
from replknet.bench.cases import SUITES, chosen
from replknet.bench.records import Record, append, peak_gflops
from replknet.cli import outputs
from replknet.cli.options import THREADS, Parser, check_at_most, parser
from replknet.shown import shown

_QUESTIONS = {
    **{name: suite.question for name, suite in SUITES.items()},
    "overhead": "what does a call cost beyond torch's own",
    "networks": "what does a whole network gain",
    "plans": "how far are the chosen plans from the best ones",
}
# suites that do not time layers: name -> cases, header, rows
_OTHERS = {
    "overhead": overhead.CASES,
    "networks": [network.name for network in networks.NETWORKS],
    "plans": list(plans.SHAPES),
}
_HEADERS = {"overhead": tables.HEADER_OVERHEAD, "networks": tables.HEADER_NETWORKS, "plans": tables.HEADER_PLANS}
_ROWS = {"overhead": tables.overhead_rows, "networks": tables.network_rows, "plans": tables.plan_rows}
_EXAMPLE = (
    "replknet bench ops --suite table1 --case 'table1.n1.*' --plot table1.png; another: "
    "replknet bench ops --suite layers --backward --output benchmarks/results/ops.jsonl"
)


def arguments() -> Parser:
    """The options of the command; `bench model` has its own."""
    p = parser("bench", _EXAMPLE, files=False)
    p.add_argument(
        "subject",
        nargs="?",
        choices=["ops", "model"],
        default="ops",
        help="what to time: the operator, or a whole network; `replknet bench model --help` shows its options",
    )
    p.add_argument("--suite", choices=list(_QUESTIONS), help="workloads that answer one question; layers by default")
    p.add_argument("--case", type=str, nargs="+", default=[], metavar="NAME", help="only these; * and ? are wildcards")
    p.add_argument(
        "--way",
        type=str,
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="only these ways, such as 'torch *' or openvino",
    )
    p.add_argument("--list", action="store_true", help="show the suites and their cases, time nothing")
    p.add_argument("--backward", action="store_true", help="time the two gradients as well")
    p.add_argument(
        "--threads", type=PositiveInt | None, help="threads of every implementation; torch's number by default"
    )
    p.add_argument("--runs", type=PositiveInt, default=20, help="number of rounds")
    p.add_argument("--limit", type=PositiveFloat, default=20.0, help="seconds after which a slow way stops at 3 rounds")
    p.add_argument("--peak", type=PositiveFloat | None, help="FMA peak, GFLOP/s; measured with torch.mm by default")
    p.add_argument("--output", type=Path | None, help="file that gets the records appended as JSON lines")
    p.add_argument("--plot", type=Path | None, help="picture of time against kernel size, for the suite table1")
    p.add_argument("--json", action="store_true", help="print the records as JSON lines instead of tables")
    return p


def main(argv: list[str]) -> int:
    if argv[:1] == ["model"]:
        from replknet.cli import bench_model  # ONNX and the runtimes are optional

        return bench_model.main(argv[1:])
    args = arguments().parse_args(argv)
    if args.subject == "model":
        raise ValueError("name it before the options: replknet bench model ...")
    if args.list:
        print("\n".join(_listed(args.json)))
        return 0
    if args.runs < 2:
        raise ValueError(f"--runs must be at least 2, so that there are quantiles, got {args.runs}")
    outputs.check_file(args.output, "--output")
    outputs.check_file(args.plot, "--plot")
    check_at_most("--threads", args.threads, THREADS)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return _run(args)


def _run(args: Namespace) -> int:
    todo = dict(_measurements(args))
    if args.plot is not None:
        if "table1" not in todo:
            raise ValueError(f"--plot draws time against kernel size: it needs --suite table1, got {', '.join(todo)}")
        from replknet.analysis import plots  # matplotlib is optional: fail before the timing, not after it

        plots.check_ending(args.plot)
    records: list[Record] = []
    wrong = False
    for suite, measurements in todo.items():
        _say(args, f"{suite}: {_QUESTIONS[suite]}?", _HEADERS.get(suite, tables.HEADER))
        for found in measurements:
            new = [record for record in found if isinstance(record, Record)]
            wrong = wrong or len(new) < len(found)
            records += new
            if args.output is not None:
                append(args.output, new)
            _say(args, *_ROWS.get(suite, tables.rows)(found))
            if args.json:
                print("\n".join(json.dumps(asdict(one)) for one in found), flush=True)
    closing = [*tables.large_against_small(records), *tables.worst_of_grid(records), *tables.disturbance(records)]
    peak = next((record for record in records if record.peak_gflops is not None), None)
    if peak is not None:
        closing += tables.explanation(peak)
    _say(args, "", *closing)
    if args.plot is not None:
        plots.save(plots.times_by_kernel(tables.curves(records)), args.plot)
        _say(args, shown(args.plot))
    return int(wrong)


def _say(args: Namespace, *lines: str) -> None:
    if not args.json and lines:
        print("\n".join(lines), flush=True)


def _measurements(args: Namespace) -> Iterator[tuple[str, Iterator[list[ops.Found]]]]:
    """The suites, each with a generator that measures one workload a step."""
    if args.suite in _OTHERS:
        names = _OTHERS[args.suite]
        wanted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in args.case or ["*"])]
        if not wanted:
            raise ValueError(f"no case of {args.suite} is called {', '.join(args.case)}; there are {', '.join(names)}")
        if args.backward:
            raise ValueError(f"--backward is for layers; the suite {args.suite} has its own directions")
        if args.way != ["*"]:
            raise ValueError(f"--way is for layers; the suite {args.suite} has its own ways")
        if args.suite == "overhead":
            yield "overhead", overhead.measure(wanted, args.runs)
        elif args.suite == "plans":
            yield "plans", plans.measure(wanted, args.runs)
        else:
            chosen_networks = [network for network in networks.NETWORKS if network.name in wanted]
            yield "networks", networks.measure(chosen_networks, args.runs, args.limit)
        return
    suites = list(chosen(args.suite, args.case))
    peak, source = (args.peak, "as stated") if args.peak is not None else (peak_gflops(), "torch.mm of 1024x1024")
    settings = ops.Settings(args.runs, args.limit, peak, source, tuple(args.way))
    for name, suite, cases in suites:
        whats = suite.whats + (("gradients",) if args.backward and "gradients" not in suite.whats else ())
        yield name, ops.measure(name, suite, cases, whats, settings)


def _listed(as_json: bool) -> Iterator[str]:
    for name, question in _QUESTIONS.items():
        cases = _OTHERS[name] if name in _OTHERS else [case.name for case in SUITES[name].cases]
        if as_json:
            yield json.dumps({"suite": name, "question": f"{question}?", "cases": list(cases)})
        else:
            yield f"{name}: {question}?"
            yield from (f"  {case}" for case in cases)
