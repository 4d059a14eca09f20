"""replknet explore"""

import json
import sys
from pathlib import Path

from jsonargparse.typing import PositiveInt

from replknet.cli.options import Parser, parser
from replknet.train.hardware import Hardware


def arguments() -> Parser:
    """The options of the command."""
    p = parser("explore", "replknet explore --only shortcut 'reparam/13x13*' --seeds 2")
    p.add_argument(
        "--only",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME",
        help="experiments, or EXPERIMENT/ARM; * and ? are wildcards; else all",
    )
    p.add_argument("--scale", choices=["small", "full"], default="small", help="for this machine, or the paper's")
    p.add_argument("--seeds", type=PositiveInt | None, help="runs of each arm at most")
    p.add_argument(
        "--output", type=Path, default=Path("runs/explore"), help="folder of records, networks and the report"
    )
    p.add_argument("--data", type=Path | None, help="where CIFAR-10 is kept; at full scale the folder of ImageNet")
    p.add_argument("--masks", type=Path | None, help="CamVid's folder or zip; at full scale ADE20K's")
    p.add_argument("--cue-conflict", type=Path | None, help="cue-conflict images, at full scale")
    p.add_argument("--devices", type=PositiveInt | None, help="processes of a training, one a GPU")
    p.add_argument("--device-batch", type=PositiveInt | None, help="images that a device takes at once")
    p.add_argument("--list", action="store_true", help="show experiments and arms and what is done, run nothing")
    p.add_argument("--estimate", action="store_true", help="estimate the time of what is left, run nothing")
    p.add_argument("--report", action="store_true", help="write the report from the records in OUTPUT, run nothing")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    from replknet.explore import program, report  # Lightning takes seconds to import
    from replknet.explore.experiment import Site

    site = Site(
        output=args.output,
        images=args.data,
        masks=args.masks,
        conflicts=args.cue_conflict,
        hardware=Hardware(devices=args.devices, device_batch=args.device_batch),
    )
    experiments = [build(args.scale) for build in program.EXPERIMENTS.values()]
    if args.report:
        page = report.write(experiments, site.output)
        print(json.dumps({"report": str(page)}) if args.json else page)
        return 0
    todo = program.chosen(args.scale, args.only, args.seeds)
    left = program.pending(todo, site)
    if args.list:
        missing = {(one.arm.key, one.seed) for one in left}
        for one in todo:
            done = (one.arm.key, one.seed) not in missing
            row = {"experiment": one.experiment.name, "arm": one.arm.name, "seed": one.seed, "done": done}
            name = f"{one.experiment.name}/{one.arm.name}"
            print(json.dumps(row) if args.json else f"{'done' if done else '    '}  {name}, seed {one.seed}")
        return 0
    program.check_data(left, site)
    seconds = program.estimates(left, site)
    told = {"runs": len(todo), "left": len(left), "seconds": round(sum(seconds))}
    if args.estimate and args.json:
        print(json.dumps(told))
        return 0
    text = f"{len(todo)} runs, {len(left)} to do, about {_duration(sum(seconds))} on this machine"
    if args.estimate:
        print(text)
        return 0
    program.to_stderr(text)
    try:
        program.run(todo, site, program.to_stderr)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    from pytorch_lightning.utilities import rank_zero_only

    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]  # Lightning sets it
        return 0
    # those whose runs were there already, or another process's
    for experiment in {one.experiment.name: one.experiment for one in todo}.values():
        program.record(experiment, site)
    page = report.write(experiments, site.output)
    print(json.dumps({**told, "report": str(page)}) if args.json else page)
    return 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
