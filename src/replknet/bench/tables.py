"""Text for people: the rows of a measurement, and what a suite says as a whole."""

from collections.abc import Iterable, Mapping

from replknet.bench import runtimes
from replknet.bench.cases import SUITES, Case, Stack, Target
from replknet.bench.ops import Found, Wrong
from replknet.bench.overhead import GPU_TARGETS_US, TARGET_US
from replknet.bench.plans import TARGET as TARGET_PLANS
from replknet.bench.records import Record
from replknet.extras import installing
from replknet.timing import Timing

HEADER = (
    f"{'':<17} {'backend':<11} {'p50 ms':>9} {'p20..p80':>17} {'x nhwc':>7} {'x nchw':>7} {'x torch':>7} "
    f"{'GFLOP/s':>8} {'of peak':>7}  target"
)
HEADER_NETWORKS = (
    f"{'network':<22} {'what':<14} {'way':<12} {'p50 ms':>10} {'p20..p80':>19} {'x before, same layout':>22}"
)
HEADER_OVERHEAD = f"{'case':<12} {'what':<17} {'way':<14} {'backend':<11} {'p50 us':>8} {'beyond torch':>13}  target"
HEADER_PLANS = f"{'case':<20} {'us':>9} {'x best':>7}  plan"
# on the grid, more than this multiple of torch's better layout is too slow
_TOO_SLOW = 1.05
# largest time of 31x31 as a multiple of torch's 3x3, at R=16 and, with 64 images, at every R
_TARGET_LARGE = 1.5


def explanation(record: Record) -> list[str]:
    """What the columns mean; `record` is any record of the table."""
    lines = [
        "x nhwc, x nchw, x torch: times faster than torch's channels_last, its contiguous, and the faster of the two",
        "GFLOP/s: operations of a direct sum without padding, divided by the time; Fourier transforms need fewer, so",
        "their effective rate may exceed the peak",
        f"of peak: {record.peak_gflops:g} GFLOP/s, {record.peak_from}, threads: {record.threads}",
    ]
    missing = runtimes.missing()
    if SUITES[record.suite].runtimes and missing:
        lines.append(f"not installed: {', '.join(missing)}; {installing('export')} adds them")
    return lines


def rows(found: Iterable[Found]) -> list[str]:
    """A heading and one line a way, for one workload of a suite of layers."""
    found = list(found)
    records = [record for record in found if isinstance(record, Record)]
    rivals = _rivals({record.way: record.timing.p50_ms for record in records})
    lines = [f"{one.case} {one.what}" for one in found[:1]]
    lines += [_wrong(w) for w in found if isinstance(w, Wrong)]
    return lines + [_row(record, rivals) for record in records]


def _row(record: Record, rivals: Mapping[str, float]) -> str:
    ms = record.timing.p50_ms
    ratios = " ".join(
        f"{rivals[rival] / ms:>7.2f}" if rival in rivals else f"{'-':>7}"
        for rival in ("torch nhwc", "torch nchw", "torch")
    )
    gflops = (record.useful_flops or 0) / ms / 1e6
    share = f"{gflops / record.peak_gflops:>7.0%}" if record.peak_gflops else f"{'-':>7}"
    targets = [target for target in _targets(record) if record.way.startswith("operator")]
    verdicts = "; ".join(_verdict(target, rivals, ms) for target in targets)
    return (
        f"  {record.way:<15} {record.backend:<11} {ms:>9.3f} {_spread(record.timing):>17} {ratios} {gflops:>8.1f} "
        f"{share}  {verdicts}".rstrip()
    )


def _rivals(times: Mapping[str, float]) -> dict[str, float]:
    found = {way: ms for way, ms in times.items() if way.startswith("torch ")}
    return {**found, "torch": min(found.values())} if found else {}


def _targets(record: Record) -> list[Target]:
    cases: dict[str, Case | Stack] = {case.name: case for case in SUITES[record.suite].cases}
    return [target for target in cases[record.case].targets if target.what == record.what]


def _verdict(target: Target, rivals: Mapping[str, float], ms: float) -> str:
    if target.rival not in rivals:
        return f"{target.ratio:g}x {target.rival}: not measured"
    return f"{target.ratio:g}x {target.rival}: {'met' if rivals[target.rival] / ms >= target.ratio else 'missed'}"


def _spread(timing: Timing) -> str:
    return f"{timing.p20_ms:.3f}..{timing.p80_ms:.3f}"


def _wrong(w: Wrong) -> str:
    return f"  {w.way:<15} wrong by {w.excess:.3g} times the bound, not timed"


def large_against_small(records: Iterable[Record]) -> list[str]:
    """Table 1 in one line for each N and R: what 31x31 costs in the operator against 3x3 in torch."""
    best: dict[tuple[int, int, int, str], float] = {}
    for record in records:
        if record.suite != "table1" or record.what != "forward" or record.shape is None or record.kernel is None:
            continue
        key = record.shape[0], record.shape[2], record.kernel, record.way.split()[0]
        best[key] = min(best.get(key, record.timing.p50_ms), record.timing.p50_ms)
    lines = []
    for n, r, k, who in best:
        if (k, who) == (31, "operator") and (n, r, 3, "torch") in best:
            ratio = best[n, r, 31, "operator"] / best[n, r, 3, "torch"]
            verdict = ""
            if r == 16 or n == 64:
                verdict = f"; at most {_TARGET_LARGE:g}: {'met' if ratio <= _TARGET_LARGE else 'missed'}"
            lines.append(f"31x31 of the operator takes {ratio:.2f} times torch's 3x3 at N={n}, R={r}{verdict}")
    return lines


def worst_of_grid(records: Iterable[Record], shown: int = 10) -> list[str]:
    """Where the operator loses to torch's better layout, by how much, and how often."""
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        if record.suite == "grid":
            groups.setdefault((record.case, record.what), {})[record.way] = record
    ratios = []
    for (case, what), group in groups.items():
        rivals = _rivals({way: record.timing.p50_ms for way, record in group.items()})
        for way, record in group.items():
            if way.startswith("operator") and rivals:
                ratios.append((record.timing.p50_ms / rivals["torch"], case, what, way, record.backend))
    if not ratios:
        return []
    ratios.sort(reverse=True)
    slow = sum(ratio > _TOO_SLOW for ratio, *_ in ratios)
    lines = [f"slower than torch's better layout by more than 5 %: {slow} of {len(ratios)}; the worst:"]
    lines += [
        f"  {ratio:5.2f}x its time  {case} {what}, {way} ({backend})"
        for ratio, case, what, way, backend in ratios[:shown]
    ]
    return lines


def overhead_rows(found: Iterable[Found]) -> list[str]:
    """Microseconds a call, and how many of them the operator adds to torch's own call, or to torch's casts."""
    records = [record for record in found if isinstance(record, Record)]
    times = {record.way: 1e3 * record.timing.p50_ms for record in records}
    lines = []
    for record in records:
        us = times[record.way]
        who, layout = record.way.split()
        beyond = verdict = ""
        if who == "operator":
            extra = us - times[f"torch {layout}"]
            beyond, verdict = f"{extra:.1f}", _under(extra, TARGET_US)
        elif who == "host":
            extra = us - times.get(f"casts {layout}", 0.0)
            beyond, verdict = f"{extra:.1f}", _under(extra, GPU_TARGETS_US[record.what])
        lines.append(
            f"{record.case:<12} {record.what:<17} {record.way:<14} {record.backend:<11} {us:>8.1f} {beyond:>13}  "
            f"{verdict}".rstrip()
        )
    return lines


def _under(us: float, target: float) -> str:
    return f"under {target:g}: {'met' if us < target else 'missed'}"


def plan_rows(found: Iterable[Found]) -> list[str]:
    """The chosen plan of a shape, its time, and this time divided by the best candidate's."""
    chosen, best = [record for record in found if isinstance(record, Record)]
    ratio = chosen.timing.p20_ms / best.timing.p20_ms
    lines = [f"{chosen.case:<20} {1e3 * chosen.timing.p20_ms:>9.1f} {ratio:>7.2f}  {chosen.way}"]
    if best.way.removeprefix("best: ") != chosen.way.removeprefix("chosen: "):
        lines.append(f"{'':<38}  {best.way}")
    if ratio > TARGET_PLANS:
        lines.append(f"{'':<38}  at most {TARGET_PLANS:g}: missed")
    return lines


def network_rows(found: Iterable[Found]) -> list[str]:
    """One line a way, with its speed relative to "before" in the same layout."""
    found = list(found)
    times = {record.way: record.timing.p50_ms for record in found if isinstance(record, Record)}
    lines = []
    for record in found:
        if isinstance(record, Wrong):
            lines.append(f"{record.case}{_wrong(record)}")
            continue
        before = times.get(record.way.replace("after", "before"))
        ratio = "-" if before is None else f"{before / record.timing.p50_ms:.2f}"
        lines.append(
            f"{record.case:<22} {record.what:<14} {record.way:<12} {record.timing.p50_ms:>10.1f} "
            f"{_spread(record.timing):>19} {ratio:>22}"
        )
    return lines


def disturbance(records: Iterable[Record]) -> list[str]:
    """A warning if other processes worked while something was timed."""
    busy = [record.load.get("others") or 0.0 for record in records]
    if not busy or max(busy) < 0.1:
        return []
    return [
        f"other processes kept up to {max(busy):.1f} processors busy while this was timed: a figure to rely on "
        "comes from a quiet machine"
    ]


def curves(records: Iterable[Record]) -> dict[str, dict[str, list[tuple[int, float, float, float]]]]:
    """Table 1 for the plot: a panel for each N, R and direction; way -> kernel side, p20, p50, p80 in ms."""
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    for record in records:
        if record.suite == "table1" and record.shape is not None and record.kernel is not None:
            n, c, r, _ = record.shape
            panel = panels.setdefault(f"{record.what}, {n}x{c}x{r}x{r}", {})
            t = record.timing
            panel.setdefault(record.way, []).append((record.kernel, t.p20_ms, t.p50_ms, t.p80_ms))
    return panels
