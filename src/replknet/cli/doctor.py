"""replknet doctor"""

import json
import math

from replknet.cli.options import Parser, check_at_most, parser
from replknet.ops import doctor
from replknet.ops.call import DTYPES
from replknet.ops.doctor import Diagnosis, Explanation, explain

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# numbers of a tensor: as many bytes as no machine has
_NUMBERS = 2**48


def _numbers(text: str, option: str, form: str, counts: tuple[int, ...]) -> list[int]:
    words = text.split(",")
    if len(words) not in counts or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{option} must be {form}, got {text}")
    return [int(word) for word in words]


def arguments() -> Parser:
    """The options of the command."""
    p = parser("doctor", "replknet doctor --shape 1,128,56,56 --kernel 31 --channels-last", files=False)
    p.add_argument(
        "--shape", type=str, metavar="N,C,H,W", help="explain the choice for one call: the sizes of its images"
    )
    p.add_argument("--kernel", type=str, metavar="KH[,KW]", help="with --shape: sides of the kernel in pixels, odd")
    p.add_argument("--dtype", choices=list(_DTYPES), default="float32", help="with --shape: dtype of the call")
    p.add_argument("--channels-last", action="store_true", help="with --shape: the images are in channels_last")
    p.add_argument("--device", default="cpu", metavar="NAME", help="with --shape: device, such as cpu, cuda or cuda:1")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if (args.shape is None) != (args.kernel is None):
        raise ValueError("--shape N,C,H,W and --kernel KH[,KW] describe a call together; only one of them was given")
    if args.shape is None:
        report: Diagnosis | Explanation = doctor()
    else:
        n, c, h, w = _numbers(args.shape, "--shape", "N,C,H,W, such as 1,128,56,56", (4,))
        sides = _numbers(args.kernel, "--kernel", "KH or KH,KW, such as 31 or 51,5", (1, 2))
        for option, numbers in (("--shape", [n, c, h, w]), ("--kernel", [c, sides[0], sides[-1]])):
            check_at_most(f"{option}, its numbers together,", math.prod(numbers), _NUMBERS)
        report = explain((n, c, h, w), (sides[0], sides[-1]), _DTYPES[args.dtype], args.channels_last, args.device)
    print(json.dumps(report.asdict(), indent=1) if args.json else report)
    return 0
