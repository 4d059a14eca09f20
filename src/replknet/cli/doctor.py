"""replknet doctor"""

import json

from replknet.cli.main import parser
from replknet.ops import doctor


def main(argv: list[str]) -> int:
    p = parser("doctor", "replknet doctor --json")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    report = doctor()
    print(json.dumps(report.asdict(), indent=1) if args.json else report)
    return 0
