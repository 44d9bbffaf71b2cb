"""The tables, sentences and claims with which the result of an isoFLOP grid is shown.

Tables: forward FLOPs at equal loss, best sizes, losses after equal times, training speeds, learning rates, and runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from skipstone.core.strict import PlainDict
from skipstone.evaluate.tables import UNKNOWN, Section, amount, number, percent
from skipstone_studies.claims import DETECTABLE, Claim
from skipstone_studies.intervals import Verdict
from skipstone_studies.isoflop.curves import DOWNWARD, FEW, HIGH, INSIDE, LOW, Curve, GridPoint, GridRecords
from skipstone_studies.isoflop.grid import Grid, compact
from skipstone_studies.isoflop.result import DRAWS, IsoFlopResult, SameLoss, find

COUNTED_ROWS = 8  # rows per batch whose FLOPs are counted, as in `skipstone eval`
PLACES = {
    INSIDE: "inside the grid",
    LOW: "**at the grid's edge** (smallest size)",
    HIGH: "**at the grid's edge** (largest size)",
    DOWNWARD: "**no optimum: the parabola opens downward**; lowest point",
    FEW: "too few sizes for a parabola; lowest point",
}


def about(result: IsoFlopResult) -> str:
    """Return the paragraph above the tables of `result`: recipes, corpus, FLOP budgets, and how losses are measured."""
    grid = result.collected.grid
    budgets = " and ".join(map(compact, grid.budgets))
    return (
        f"The arms {', '.join(grid.spec.arms)} on {grid.base.data.corpus}, each trained for {budgets} FLOPs (forward "
        f"and backward, by the cost model) at {len(grid.sizes)} sizes; an arm that skips therefore takes more steps. "
        "Losses are those of the executed pass with causal decisions, in nats per token, on the whole validation set. "
        "The minimum of a parabola of the loss over the logarithm of the parameters is each arm's "
        f"optimum.{_router(grid)}"
    )


def _router(grid: Grid) -> str:
    """Return a sentence if some arm's Mixture-of-Depths does not scale updates, unlike the paper's; "" otherwise."""
    entries = [entry for arm in grid.spec.arms for entry in grid.spec.known[arm].get("mechanisms") or []]
    guided = any(e["name"] == "mixture_of_depths" and e.get("weight", "none") == "none" for e in entries)
    paper = " Updates are not scaled by the router's output (weight none), which differs from the paper's router."
    return paper if guided else ""


def own(grid: Grid, arm: str) -> str:
    """Return in words the options in which the model of a compared variant (arm) differs from the recipe's.

    grid: all runs of the isoFLOP study, with their specification. arm: name of the arm.
    """
    parts = []
    for key, value in grid.spec.known[arm].items():
        if key == "mechanisms":
            parts += [_entry(entry) for entry in value] or ["no mechanism"]
        else:
            parts.append(f"{key} {_entry(value) if isinstance(value, dict) and 'name' in value else value}")
    return "; ".join(parts)


def _entry(entry: PlainDict) -> str:
    options = ", ".join(f"{key} {value}" for key, value in entry.items() if key != "name")
    return f"{entry['name'].replace('_', ' ')}{f' ({options})' if options else ''}"


def verdicts(result: IsoFlopResult) -> list[str]:
    """Return one sentence for each arm and budget of `result`, which compares the arm with the base arm.

    An arm is one of the compared recipes, a budget the training FLOPs of a run.
    """
    return [
        f"At {compact(budget)}: {_verdict(found, result.curves[budget], result.base)}"
        for budget, compared in result.same.items()
        for found in compared
    ]


def _verdict(found: SameLoss, curves: dict[str, Curve], base: str) -> str:
    best, level = curves[found.arm].fit.optimum, curves[base].fit.optimum
    losses = f"{found.arm}'s best loss is {best.loss:.4f}, the {base} optimum {level.loss:.4f}: {_gap(found)}"
    if not curves[found.arm].fit.usable:
        return f"{losses}; without a parabola, the share of FLOPs is unknown."
    if found.share is None:
        return f"{losses}; no size of {found.arm} reaches that loss."
    bound = "at most " if found.at_most else ""
    spread = _interval(found.low, found.high, lambda value: f"{value:.0%}")
    known = "" if found.low is None else f" [{spread}, in {percent(found.reached, 0)} of the draws]"
    return (
        f"{losses}; {found.arm} reaches that loss with {bound}{found.share:.0%}{known} of the FLOPs of a forward pass."
    )


def claims(collected: GridRecords) -> list[Claim]:
    """Return, for each compared recipe and budget, the claim that its best loss is below the base's, with verdict.

    collected: all stored results of the isoFLOP grid. The base is the recipe with which the others are compared, a
    budget a number of training FLOPs.
    """
    result = find(collected)
    words: dict[str, Verdict] = {"better": "yes", "worse": "no", "no headroom": "no headroom"}
    return [
        Claim(
            arm=found.arm,
            text=f"best loss below {result.base}'s at {compact(budget)} training FLOPs",
            found=_gap(found),
            verdict=words.get(found.verdict, "inconclusive"),
            estimate=found.gap,
            ends=None if found.gap_low is None or found.gap_high is None else (found.gap_low, found.gap_high),
        )
        for budget, compared in result.same.items()
        for found in compared
    ]


def _gap(found: SameLoss) -> str:
    """Return the difference of an arm's best loss from the base arm's as text, with interval and verdict.

    An example is `-0.0319 [-0.0895 to +0.0191], not told apart (detectable: 0.09 / 0.11)`, in nats per token.
    """
    if found.gap_low is None:
        return f"{found.gap:+.4f}, without an interval"
    shown = f"{found.gap:+.4f} [{_interval(found.gap_low, found.gap_high, _signed)}], {found.verdict}"
    if found.gap_high is None or found.gap_low * found.gap_high > 0:
        return shown
    return f"{shown} (detectable: {' / '.join(f'{value:.3f}' for value in found.detectable)})"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def sections(result: IsoFlopResult) -> list[Section]:
    """Return all tables of this module for the isoFLOP result `result`; those that would have no rows are left out."""
    made = [same(result), optima(result), times(result), speeds(result), rates(result), runs(result)]
    return [section for section in made if section.rows]


def same(result: IsoFlopResult) -> Section:
    """Return the table of forward FLOPs with which each recipe reaches the base's best loss, by budget of `result`.

    result: the result of an isoFLOP grid, whose recipes (arms) are compared with one of them, the base.
    """
    spread = result.noise
    told = [] if spread is None else [f"Intervals are 90 % intervals over {DRAWS} draws of the noise. {DETECTABLE}"]
    return Section(
        title="FLOPs of a forward pass at equal loss",
        columns=[
            *("budget", "arm", "share", "90 % interval", "reached in", "parameters", "ratio", "90 % interval"),
            *(f"best loss − {result.base}'s", "90 % interval", "detectable"),
        ],
        rows=[
            [compact(budget), *_same(found, result.curves[budget])]
            for budget, compared in result.same.items()
            for found in compared
        ],
        notes=[
            (
                "*Share* is the forward FLOPs per token of the arm's smallest size that reaches the loss of the "
                f"{result.base} optimum, relative to that optimum, as executed on batches of {COUNTED_ROWS} rows (in "
                "which rows that keep fewer tokens are filled up). *Reached in* is the share of the draws in which "
                "some size reaches it. *Parameters* are those of that size, and *ratio* is relative to the "
                f"{result.base} optimum."
            ),
            *told,
        ],
    )


def _same(found: SameLoss, curves: dict[str, Curve]) -> list[str]:
    share = "not reached" if curves[found.arm].fit.usable else "no parabola"
    if found.share is not None:
        share = f"{'≤ ' if found.at_most else ''}{percent(found.share)}"
    return [
        found.arm,
        share,
        _interval(found.low, found.high, percent),
        percent(found.reached, 0),
        amount(found.parameters),
        number(found.ratio, 2),
        _interval(found.ratio_low, found.ratio_high, lambda value: number(value, 2)),
        f"{found.gap:+.4f}",
        _interval(found.gap_low, found.gap_high, _signed),
        " / ".join(f"{value:.3f}" for value in found.detectable) or UNKNOWN,
    ]


def _interval(low: float | None, high: float | None, shown: object) -> str:
    assert callable(shown)
    return UNKNOWN if low is None or high is None else f"{shown(low)} to {shown(high)}"


def optima(result: IsoFlopResult) -> Section:
    """Return the table of the best size of each compared recipe and training budget of `result`, with its loss."""
    rows = []
    for budget, curves in result.curves.items():
        for arm, curve in curves.items():
            best = curve.fit.optimum
            point = _nearest(result.collected.curves[arm, budget], best.x)
            rows.append(
                [
                    compact(budget),
                    arm,
                    number(best.loss),
                    amount(best.x),
                    amount(curve.forward(best.x)),
                    f"{point.cell.size}: {_with_deviation(point.losses)}",
                    PLACES[best.where],
                ]
            )
    return Section(
        title="Optima",
        columns=["budget", "arm", "loss", "parameters", "forward FLOPs/token", "nearest size that was run", "where"],
        rows=rows,
        notes=["For the nearest size, the loss is the mean ± standard deviation over its seeds."],
    )


def _nearest(points: Sequence[GridPoint], parameters: float) -> GridPoint:
    return min(points, key=lambda point: abs(point.parameters / parameters - 1))


def _with_deviation(losses: Sequence[float]) -> str:
    mean = number(statistics.fmean(losses))
    return mean if len(losses) < 2 else f"{mean} ± {statistics.stdev(losses):.4f} ({len(losses)})"


def times(result: IsoFlopResult) -> Section:
    """Return the table of each arm's best loss after equal training times in `result`, compared with the base arm's."""
    rows = []
    for time, compared in zip(result.times, result.same_times, strict=True):
        gaps = {found.arm: found for found in compared}
        for arm, curve in time.curves.items():
            best, found = curve.fit.optimum, gaps.get(arm)
            gap = [UNKNOWN] * 3
            if found is not None:
                spread = _interval(found.gap_low, found.gap_high, _signed)
                gap = [_signed(found.gap), spread, found.verdict]
            rows.append([f"{time.seconds:,.0f} s", arm, number(best.loss), *gap, amount(best.x), PLACES[best.where]])
    return Section(
        title="Equal training time",
        columns=["time", "arm", "best loss", f"− {result.base}'s", "90 % interval", "verdict", "parameters", "where"],
        rows=rows,
        notes=[
            (
                f"Each time lies half way between two budgets, by the median time of {result.base}'s sizes. The loss "
                "of a size at that time is interpolated linearly between its budgets, over the logarithm of seconds."
            )
        ],
    )


def speeds(result: IsoFlopResult) -> Section:
    """Return the table of training tokens per second in `result`, by size and compared recipe, timed in turns.

    It also has the time and the FLOPs of a step, divided by those of the recipe that the others are compared with.
    """
    grid, found = result.collected.grid, result.collected.speeds
    rows = []
    for size in grid.sizes:
        base = found.get((result.base, str(size)))
        for arm in grid.spec.arms:
            speed = found.get((arm, str(size)))
            if speed is None:
                continue
            time, flops = UNKNOWN, UNKNOWN
            if base is not None:
                time = f"{base / speed:.2f}"
                flops = f"{grid.shape(arm, size).step_flops / grid.shape(result.base, size).step_flops:.2f}"
            rows.append([str(size), arm, f"{speed:,.0f}", time, flops])
    return Section(
        title="Speed of training, timed interleaved",
        columns=["size", "arm", "tokens/s", *(f"{what} per step / {result.base}" for what in ("time", "FLOPs"))],
        rows=rows,
    )


def rates(result: IsoFlopResult) -> Section:
    """Return the table of the losses at the learning rates that each arm (compared recipe) of `result` tried."""
    collected = result.collected
    tried = sorted({rate for losses in collected.sweep.values() for rate in losses})
    rows = []
    for arm, losses in collected.sweep.items():
        cells = [number(losses.get(rate)) for rate in tried]
        best = collected.chosen.get(arm)
        rows.append([arm, *(f"**{c}**" if rate == best else c for rate, c in zip(tried, cells, strict=True))])
    grid = collected.grid
    rule = (
        "is used at every size"
        if grid.spec.rate_rule == "constant"
        else "is used at the middle width w and scaled by w / width elsewhere"
    )
    return Section(
        title=f"Learning rates, at {compact(grid.budgets[0])} FLOPs and size {grid.middle}",
        columns=["arm", *(f"{rate:g}" for rate in tried)],
        rows=rows if tried else [],
        notes=[f"The best rate of each arm {rule}."],
    )


def runs(result: IsoFlopResult) -> Section:
    """Return the table of all runs of `result`, one row each: parameters, steps, tokens, FLOPs, loss and seconds."""
    return Section(
        title="All runs of the grid",
        columns=[
            *("budget", "size", "arm", "parameters", "rate", "seed", "steps", "tokens", "corpus read"),
            *("FLOPs executed / budget", "forward FLOPs/token", "loss", "seconds"),
        ],
        rows=[_run(point, i) for point in result.collected for i in range(len(point.records))],
    )


def _run(point: GridPoint, i: int) -> list[str]:
    record, cell = point.records[i], point.cell
    figures = record.figures
    return [
        compact(cell.budget),
        str(cell.size),
        cell.arm,
        f"{point.parameters:,}",
        f"{cell.rate:g}",
        str(record.seed),
        f"{cell.steps:,}",
        f"{figures['training']['tokens']:,}",
        percent(figures["corpus"]["seen"]),
        f"{figures['training_flops']['executed'] / cell.budget:.3f}",
        amount(figures["forward_flops"]),
        number(figures["loss"]),
        f"{figures['training']['seconds']:,.0f}",
    ]
