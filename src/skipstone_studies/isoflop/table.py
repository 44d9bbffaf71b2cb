"""Result -> tables and the notes that a reader must know beside them. Pure: the same records give the same bytes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from skipstone.evaluate.tables import UNKNOWN, Section, amount, markdown, number, percent
from skipstone_studies.isoflop.curves import DOWNWARD, FEW, HIGH, INSIDE, LOW, Curve, GridPoint
from skipstone_studies.isoflop.grid import compact
from skipstone_studies.isoflop.measure import COUNTED_ROWS
from skipstone_studies.isoflop.result import DRAWS, IsoFlopResult, SameLoss
from skipstone_studies.page import provenance

PLACES = {
    INSIDE: "inside the grid",
    LOW: "**at the grid's edge** (smallest size)",
    HIGH: "**at the grid's edge** (largest size)",
    DOWNWARD: "**no optimum: the parabola opens downward**; lowest point",
    FEW: "too few sizes for a parabola; lowest point",
}


def page(findings: IsoFlopResult) -> str:
    """The whole of OUT/NAME.md."""
    spec = findings.collected.grid.spec
    said = "\n".join(f"* {line}" for line in verdicts(findings))
    parts = [f"# {spec.name}: the same training FLOPs", about(findings), *([said] if said else [])]
    parts += [markdown(sections(findings)).rstrip("\n"), "### Notes"]
    parts.append("\n".join(f"* {line}" for line in notes(findings)))
    found = findings.collected.records
    parts += [f"`{command}`" for command in dict.fromkeys(record.command for record in found)]
    return "\n\n".join([*parts, provenance(found)]) + "\n"


def about(findings: IsoFlopResult) -> str:
    grid = findings.collected.grid
    budgets = " and ".join(map(compact, grid.budgets))
    return (
        f"Arms {', '.join(grid.spec.arms)} on {grid.base.data.corpus}, each trained for {budgets} FLOPs (forward and "
        f"backward, by the cost model) at {len(grid.sizes)} sizes: an arm that skips takes more steps. Losses are "
        "causal, as executed, in nats a token, on the whole validation set. A parabola of loss over the logarithm of "
        "parameters gives each arm's optimum."
    )


def verdicts(findings: IsoFlopResult) -> list[str]:
    """One plain sentence for each arm and budget, beside the base."""
    return [
        f"At {compact(budget)}: {_verdict(found, findings.curves[budget], findings.base)}"
        for budget, compared in findings.same.items()
        for found in compared
    ]


def _verdict(found: SameLoss, curves: dict[str, Curve], base: str) -> str:
    best, level = curves[found.arm].fit.optimum, curves[base].fit.optimum
    losses = f"{found.arm}'s best loss is {best.loss:.4f}, the {base} optimum {level.loss:.4f} ({found.gap:+.4f})"
    if not curves[found.arm].fit.usable:
        return f"{losses}; there is no parabola to read a share of FLOPs from."
    if found.share is None:
        return f"{losses}; no size of {found.arm} comes down to that."
    bound = "at most " if found.at_most else ""
    return f"{losses}; {found.arm} comes down to that with {bound}{found.share:.0%} of the FLOPs a forward pass."


def sections(findings: IsoFlopResult) -> list[Section]:
    """Every table, those that have nothing yet left out."""
    made = [same(findings), optima(findings), times(findings), speeds(findings), rates(findings), runs(findings)]
    return [section for section in made if section.rows]


def same(findings: IsoFlopResult) -> Section:
    spread = findings.noise
    told = [] if spread is None else [f"90 % intervals over {DRAWS} draws of the noise."]
    return Section(
        title="Same loss at what share of FLOPs a forward pass",
        columns=[
            *("budget", "arm", "share", "90 %", "reached in", "parameters", "ratio", "90 % of it"),
            *(f"best loss − {findings.base}'s", "90 % of it"),
        ],
        rows=[
            [compact(budget), *_same(found, findings.curves[budget])]
            for budget, compared in findings.same.items()
            for found in compared
        ],
        notes=[
            (
                f"Share: forward FLOPs a token, as executed on batches of {COUNTED_ROWS} rows (shorter ones filled "
                f"up), of the arm's smallest size whose loss is that of the {findings.base} optimum, by those of that "
                "optimum. *Reached in*: the part of the draws in which some size does. *Parameters*: of that size; "
                f"*ratio*: by those of the {findings.base} optimum."
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
        _interval(found.gap_low, found.gap_high, lambda value: f"{value:+.4f}"),
    ]


def _interval(low: float | None, high: float | None, shown: object) -> str:
    assert callable(shown)
    return UNKNOWN if low is None or high is None else f"{shown(low)} to {shown(high)}"


def optima(findings: IsoFlopResult) -> Section:
    rows = []
    for budget, curves in findings.curves.items():
        for arm, curve in curves.items():
            best = curve.fit.optimum
            point = _nearest(findings.collected.curves[arm, budget], best.x)
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
        columns=["budget", "arm", "loss", "parameters", "forward FLOPs/token", "nearest size run", "where"],
        rows=rows,
        notes=["Nearest size run: mean ± standard deviation over its seeds."],
    )


def _nearest(points: Sequence[GridPoint], parameters: float) -> GridPoint:
    return min(points, key=lambda point: abs(point.parameters / parameters - 1))


def _with_deviation(losses: Sequence[float]) -> str:
    mean = number(statistics.fmean(losses))
    return mean if len(losses) < 2 else f"{mean} ± {statistics.stdev(losses):.4f} ({len(losses)})"


def times(findings: IsoFlopResult) -> Section:
    rows = []
    for time in findings.times:
        base = time.curves.get(findings.base)
        for arm, curve in time.curves.items():
            best = curve.fit.optimum
            gap = UNKNOWN if base is None or arm == findings.base else f"{best.loss - base.fit.optimum.loss:+.4f}"
            rows.append([f"{time.seconds:,.0f} s", arm, number(best.loss), gap, amount(best.x), PLACES[best.where]])
    return Section(
        title="The same seconds of training",
        columns=["time", "arm", "best loss", f"− {findings.base}'s", "parameters", "where"],
        rows=rows,
        notes=[
            (
                f"The times: half way between budgets, by the median of what {findings.base}'s sizes take. The loss of "
                "a size at a time is read off a straight line between its budgets, over the logarithm of seconds."
            )
        ],
    )


def speeds(findings: IsoFlopResult) -> Section:
    grid, found = findings.collected.grid, findings.collected.speeds
    rows = []
    for size in grid.sizes:
        base = found.get((findings.base, str(size)))
        for arm in grid.spec.arms:
            speed = found.get((arm, str(size)))
            if speed is None:
                continue
            time, flops = UNKNOWN, UNKNOWN
            if base is not None:
                time = f"{base / speed:.2f}"
                flops = f"{grid.shape(arm, size).step_flops / grid.shape(findings.base, size).step_flops:.2f}"
            rows.append([str(size), arm, f"{speed:,.0f}", time, flops])
    return Section(
        title="Training steps, timed in turns",
        columns=["size", "arm", "tokens/s", *(f"{what} a step × {findings.base}" for what in ("time", "FLOPs"))],
        rows=rows,
    )


def rates(findings: IsoFlopResult) -> Section:
    collected = findings.collected
    tried = sorted({rate for losses in collected.sweep.values() for rate in losses})
    rows = []
    for arm, losses in collected.sweep.items():
        cells = [number(losses.get(rate)) for rate in tried]
        best = collected.chosen.get(arm)
        rows.append([arm, *(f"**{c}**" if rate == best else c for rate, c in zip(tried, cells, strict=True))])
    grid = collected.grid
    rule = "serves every size" if grid.spec.rate_rule == "constant" else "times middle width / width serves the others"
    return Section(
        title=f"Learning rates, at {compact(grid.budgets[0])} FLOPs and size {grid.middle}",
        columns=["arm", *(f"{rate:g}" for rate in tried)],
        rows=rows if tried else [],
        notes=[f"The best rate of each arm {rule}."],
    )


def runs(findings: IsoFlopResult) -> Section:
    return Section(
        title="All runs of the grid",
        columns=[
            *("budget", "size", "arm", "parameters", "rate", "seed", "steps", "tokens", "corpus read"),
            *("FLOPs executed / budget", "forward FLOPs/token", "loss", "seconds"),
        ],
        rows=[_run(point, i) for point in findings.collected for i in range(len(point.records))],
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


ALONE = 0.9  # of its core: a run that had less of it shared the machine


def notes(findings: IsoFlopResult) -> list[str]:
    """One plain sentence each."""
    return [*_unfinished(findings), *_optima(findings), *_noise(findings), *_rates(findings), *_runs(findings)]


def _unfinished(findings: IsoFlopResult) -> list[str]:
    collected = findings.collected
    spec, there = collected.grid.spec, len(list(collected))
    total = len(spec.arms) * len(spec.budgets) * len(spec.sizes)
    return [f"Not finished: {there} of the grid's {total} cells are recorded."] if there < total else []


def _optima(findings: IsoFlopResult) -> list[str]:
    outside = [
        f"{arm} at {compact(budget)}"
        for budget, curves in findings.curves.items()
        for arm, curve in curves.items()
        if curve.fit.optimum.where != INSIDE
    ]
    if not outside:
        return ["Every optimum lies inside the grid."]
    return [
        (
            f"The optimum does not lie inside the grid for {', '.join(outside)}: a better size may be beyond its "
            "edge, so losses and shares that rest on it are those of the grid, not of the arm."
        )
    ]


def _noise(findings: IsoFlopResult) -> list[str]:
    spread = findings.noise
    if spread is None:
        return ["There is nothing to tell the noise from (no second seed, too few sizes): no intervals."]
    source = "seeds of the same run" if spread.source == "seeds" else "the parabolas' residuals (no second seed yet)"
    return [
        (
            f"Noise of one run's loss: standard deviation {spread.deviation:.4f} nats, from {source}, {spread.degrees} "
            "degrees of freedom. It does not cover that a parabola may be the wrong curve, nor other corpora."
        )
    ]


def _rates(findings: IsoFlopResult) -> list[str]:
    collected = findings.collected
    if len(collected.grid.spec.rates) < 2:
        return ["One learning rate for all arms: none was tuned."]
    ends = [arm for arm, rate in collected.chosen.items() if rate in _ends(list(collected.sweep[arm]))]
    if not ends:
        return []
    return [f"The best learning rate is at an end of the list for {', '.join(ends)}: one beyond it might be better."]


def _ends(rates: list[float]) -> tuple[float, float]:
    return min(rates), max(rates)


def _runs(findings: IsoFlopResult) -> list[str]:
    collected = findings.collected
    records = collected.records
    if not records:
        return []
    executed = [r.figures["training_flops"]["executed"] / r.figures["cell"]["budget"] for r in records]
    seen = [r.figures["corpus"]["seen"] for r in records if r.figures["corpus"]["seen"] is not None]
    found = [
        (
            f"Training FLOPs with the capacities that were realised: {min(executed):.3f} to {max(executed):.3f} of the "
            "budget (an arm whose decision keeps more or fewer tokens than its capacity differs)."
        )
    ]
    once = (
        " Windows lie side by side and none is read twice." if collected.grid.once else " Windows lie at random places."
    )
    found += [f"No run reads more than {max(seen):.1%} of the corpus.{once}"] if seen else []
    shared = sum(r.figures["sharing"]["busy"] < ALONE for r in records)
    if shared:
        found.append(
            f"{shared} of {len(records)} runs had less than {ALONE:.0%} of the cores that they asked for: the machine "
            "was shared, and the seconds of single runs compare badly."
        )
    timed = len(collected.speeds) == len(collected.grid.sizes) * len(collected.grid.spec.arms)
    found.append(
        "Times are tokens by the training speed of each arm and size, which the arms of a size measured in turns."
        if timed
        else "Times are those of the runs themselves, one after the other."
    )
    base = collected.grid.spec.base
    return [*found, *([] if base in collected.grid.spec.arms else [f"There is no arm {base!r} to compare with."])]
