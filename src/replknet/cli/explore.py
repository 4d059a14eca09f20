"""replknet explore"""

import json
import sys
from pathlib import Path

from jsonargparse.typing import PositiveInt

from replknet.cli import outputs
from replknet.cli.options import Parser, parser
from replknet.shown import shown
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
        help="only these: EXPERIMENT or EXPERIMENT/ARM; * and ? are wildcards; all by default",
    )
    p.add_argument(
        "--scale", choices=["small", "full"], default="small", help="for this machine (small), or the paper's (full)"
    )
    p.add_argument("--seeds", type=PositiveInt | None, help="largest number of runs of each arm")
    p.add_argument(
        "--output", type=Path, default=Path("runs/explore"), help="folder of records, networks and the report"
    )
    p.add_argument("--data", type=Path | None, help="folder that keeps CIFAR-10; at full scale the folder of ImageNet")
    p.add_argument("--masks", type=Path | None, help="folder or zip of CamVid; at full scale of ADE20K")
    p.add_argument("--cue-conflict", type=Path | None, help="folder of cue-conflict images, only at full scale")
    p.add_argument("--devices", type=PositiveInt | None, help="number of processes of a training, one a GPU")
    p.add_argument("--device-batch", type=PositiveInt | None, help="number of images that a device computes at once")
    p.add_argument("--list", action="store_true", help="show experiments, arms and which runs are done; run nothing")
    p.add_argument("--estimate", action="store_true", help="estimate the time of the runs to do; run nothing")
    p.add_argument("--report", action="store_true", help="write the report from the records in OUTPUT; run nothing")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    outputs.check_folder(args.output, "--output")
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
        print(json.dumps({"report": str(page)}) if args.json else shown(page))
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
    # `run` recorded only experiments with a run in this process
    for experiment in {one.experiment.name: one.experiment for one in todo}.values():
        program.record(experiment, site)
    page = report.write(experiments, site.output)
    print(json.dumps({**told, "report": str(page)}) if args.json else shown(page))
    return 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
