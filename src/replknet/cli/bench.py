"""replknet bench"""

from pathlib import Path

from replknet.bench.depthwise import run
from replknet.cli.main import parser


def main(argv: list[str]) -> int:
    p = parser("bench", "replknet bench --case 31b.stage1 --output benchmarks/results/depthwise.jsonl")
    p.add_argument("--case", type=str, nargs="+", default=[], help="workloads by name; all by default")
    p.add_argument("--runs", type=int, default=20, help="rounds")
    p.add_argument("--output", type=Path | None, help="file to which the records are appended as JSON lines")
    args = p.parse_args(argv)
    return run(args.case, args.runs, args.output)
