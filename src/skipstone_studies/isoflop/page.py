"""Render the result of an isoFLOP grid (losses of several sizes at equal FLOPs) as Markdown and as an HTML page.

Equal stored results give equal bytes. The HTML page has charts and is made of the parts of `skipstone report`; it is
self-contained and downloads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from jinja2 import ChoiceLoader, PackageLoader

from skipstone.core.strict import PlainDict
from skipstone.evaluate.tables import amount, markdown
from skipstone.report.axes import bounds
from skipstone.report.drawn import Drawn
from skipstone.report.palette import Style, style
from skipstone.report.templating import environment, script
from skipstone_studies.charts import STEPS, ArmSeries, Dot, Level, log_bounds, panel
from skipstone_studies.isoflop import table
from skipstone_studies.isoflop.curves import INSIDE, Curve, GridPoint
from skipstone_studies.isoflop.grid import compact
from skipstone_studies.isoflop.result import EqualTime, IsoFlopResult, seconds_of
from skipstone_studies.page import provenance

ALONE = 0.9  # a run that had less than this share of its cores shared the machine
Figure = tuple[str, Drawn]
_panel = partial(panel, y_title="executed loss, nats a token")


def as_markdown(result: IsoFlopResult) -> str:
    """Return the page of an isoFLOP result in Markdown, the text of OUT/NAME.md: verdicts, all tables, and notes."""
    spec = result.collected.grid.spec
    said = "\n".join(f"* {line}" for line in table.verdicts(result))
    parts = [
        f"# {spec.name}: equal training FLOPs",
        table.about(result),
        _arms(result),
        *(["Best losses:", said] if said else []),
    ]
    parts += [markdown(table.sections(result)).rstrip("\n"), "### Notes"]
    parts.append("\n".join(f"* {line}" for line in notes(result)))
    found = result.collected.records
    parts += [f"`{command}`" for command in dict.fromkeys(record.command for record in found)]
    return "\n\n".join([*parts, provenance(found)]) + "\n"


def _arms(result: IsoFlopResult) -> str:
    """Return a Markdown list of the arms, each with the options of the model in which it differs from the recipe."""
    grid = result.collected.grid
    return "\n".join(f"* *{arm}*: {table.own(grid, arm)}" for arm in grid.spec.arms)


def as_html(result: IsoFlopResult) -> str:
    """Return the HTML page of an isoFLOP result; runs may be missing in `result`."""
    pages = environment()
    ours = PackageLoader("skipstone_studies.isoflop", "templates")
    assert pages.loader is not None
    pages.loader = ChoiceLoader([ours, pages.loader])
    return pages.get_template("isoflop.html").render(context(result), **script())


def context(result: IsoFlopResult) -> PlainDict:
    """Return the variables of the HTML page's template, `templates/isoflop.html`, by name, for the result `result`.

    Keys: `title`, the name of the grid; `base`, the arm (compared recipe) that others are compared with; `about`, a
    paragraph on the runs; `arms`, a tuple of name, line style and options in words for each arm; `verdicts`, sentences;
    `iso_flop`, `relative` and `iso_time`, charts; `first`, `second` and `last`, lists of tables; `notes`, `commands`
    and `provenance`, how the runs were made.
    """
    spec, found = result.collected.grid.spec, result.collected.records
    return {
        "title": spec.name,
        "base": spec.base,
        "about": table.about(result),
        "arms": [(arm, _look(result, arm), table.own(result.collected.grid, arm)) for arm in spec.arms],
        "verdicts": table.verdicts(result),
        "iso_flop": _iso_flop(result),
        "relative": _relative(result),
        "iso_time": _iso_time(result),
        "first": [table.same(result), table.optima(result)],
        "second": [section for section in (table.times(result), table.speeds(result)) if section.rows],
        "last": [section for section in (table.rates(result), table.runs(result)) if section.rows],
        "notes": notes(result),
        "commands": list(dict.fromkeys(record.command for record in found)),
        "provenance": provenance(found),
    }


def _look(result: IsoFlopResult, arm: str) -> Style:
    return style(result.collected.grid.spec.arms.index(arm))


def _loss_range(result: IsoFlopResult, margin: float = 0.06) -> tuple[float, float]:
    """Return the least and greatest loss of all runs, widened at both ends, as the y axis of every chart of a row.

    margin: by which share of the range it is widened.
    """
    losses = [loss for point in result.collected for loss in point.losses]
    curves = [curve for arms in result.curves.values() for curve in arms.values()]
    return bounds([*losses, *(curve.fit.optimum.loss for curve in curves)], margin)


def _iso_flop(result: IsoFlopResult) -> list[Figure]:
    """Return charts of loss over parameters, as pairs of title and picture, one for each budget of training FLOPs."""
    xs = [point.parameters for point in result.collected]
    made = []
    for budget, curves in result.curves.items():
        drawn = [
            ArmSeries(
                style=_look(result, arm),
                dots=_dots(result.collected.curves[arm, budget]),
                line=_parabola(curve),
                star=_star(curve, curve.fit.optimum.x),
            )
            for arm, curve in curves.items()
        ]
        title = f"{compact(budget)} training FLOPs"
        picture = _panel(drawn, x_title="parameters", title=title, x_range=log_bounds(xs), y_range=_loss_range(result))
        made.append((title, picture))
    return made


def _dots(points: Sequence[GridPoint]) -> list[Dot]:
    """Return a dot for each point's mean loss and, if it has several seeds, pale ones for their losses."""
    made = []
    for point in points:
        said = f"{point.cell.arm} {point.cell.size}, {point.parameters:,} parameters, {point.cell.steps:,} steps"
        seeds = point.losses if len(point.losses) > 1 else []
        made += [
            Dot(x=point.parameters, y=loss, hover=f"{said}: one seed, loss {loss:.4f}", faint=True) for loss in seeds
        ]
        made.append(Dot(x=point.parameters, y=point.loss, hover=f"{said}: loss {point.loss:.4f}"))
    return made


def _sizes(curve: Curve) -> list[float]:
    """Return sizes for drawing a curve, from its smallest to its largest, evenly spaced on a logarithmic axis."""
    low, high = math.log(curve.fit.low), math.log(curve.fit.high)
    return [math.exp(low + (high - low) * i / STEPS) for i in range(STEPS + 1)]


def _parabola(curve: Curve) -> list[tuple[float, float]]:
    if len(curve.parameters) < 3:
        return []
    return [(x, curve.fit(min(max(x, curve.fit.low), curve.fit.high))) for x in _sizes(curve)]


def _star(curve: Curve, x: float) -> Dot | None:
    best = curve.fit.optimum
    if not curve.fit.usable:
        return None
    said = f"{curve.arm}: optimum {best.loss:.4f} at {amount(best.x)} parameters, {best.where}"
    return Dot(x=x, y=best.loss, hover=said, hollow=best.where != INSIDE)


def _relative(result: IsoFlopResult) -> list[Figure]:
    """Return charts of loss over forward FLOPs per token, as pairs of title and picture, one for each training budget.

    FLOPs are divided by those of the base arm's best size.
    """
    base = result.base
    based = {budget: curves for budget, curves in result.curves.items() if base in curves}
    units = {budget: curves[base].forward(curves[base].fit.optimum.x) for budget, curves in based.items()}
    xs = [f / units[b] for b, curves in based.items() for curve in curves.values() for f in curve.forward_flops]
    made = []
    for budget, curves in based.items():
        unit = units[budget]
        drawn = [
            _against_flops(result, curve, result.collected.curves[arm, budget], unit) for arm, curve in curves.items()
        ]
        drops = [
            (found.share, f"{found.arm} {'≤ ' if found.at_most else ''}{found.share:.2f}")
            for found in result.same[budget]
            if found.share is not None
        ]
        title = f"{compact(budget)} training FLOPs"
        picture = _panel(
            drawn,
            x_title=f"FLOPs of a forward pass, {base} optimum = 1",
            title=title,
            x_range=log_bounds(xs),
            y_range=_loss_range(result, 0.12),
            level=Level(y=curves[base].fit.optimum.loss, label=f"{base} optimum", drops=drops),
        )
        made.append((title, picture))
    return made


def _against_flops(result: IsoFlopResult, curve: Curve, points: Sequence[GridPoint], unit: float) -> ArmSeries:
    star = _star(curve, curve.forward(curve.fit.optimum.x) / unit)
    dots = [
        Dot(
            x=point.forward_flops / unit,
            y=point.loss,
            hover=f"{curve.arm} {point.cell.size}: {amount(point.forward_flops)} FLOPs/token, loss {point.loss:.4f}",
        )
        for point in points
    ]
    line = [(curve.forward(min(max(x, curve.fit.low), curve.fit.high)) / unit, y) for x, y in _parabola(curve)]
    return ArmSeries(style=_look(result, curve.arm), dots=dots, line=line, star=star)


def _iso_time(result: IsoFlopResult) -> list[Figure]:
    """Return charts of loss over parameters after equal training times, and one of every run's loss over its seconds.

    They are pairs of title and picture.
    """
    xs = [point.parameters for point in result.collected]
    made = []
    for time in result.times:
        title = f"{time.seconds:,.0f} seconds of training"
        drawn = [_at_time(result, time, curve) for curve in time.curves.values()]
        picture = _panel(drawn, x_title="parameters", title=title, x_range=log_bounds(xs), y_range=_loss_range(result))
        made.append((title, picture))
    return [*made, ("loss of every run over its training time", _all_seconds(result))]


def _at_time(result: IsoFlopResult, time: EqualTime, curve: Curve) -> ArmSeries:
    beyond = time.stretched[curve.arm]
    dots = [
        Dot(x=x, y=y, hover=f"{curve.arm}, {amount(x)} parameters: {y:.4f}", hollow=x in beyond)
        for x, y in zip(curve.parameters, curve.losses, strict=True)
    ]
    star = _star(curve, curve.fit.optimum.x)
    return ArmSeries(style=_look(result, curve.arm), dots=dots, line=_parabola(curve), star=star)


def _all_seconds(result: IsoFlopResult) -> Drawn:
    collected = result.collected
    drawn = []
    for arm in collected.grid.spec.arms:
        points = [point for (name, _), found in collected.curves.items() if name == arm for point in found]
        dots = [
            Dot(
                x=seconds_of(collected, point),
                y=point.loss,
                hover=f"{arm} {point.cell.size} at {compact(point.cell.budget)}: {point.loss:.4f}",
            )
            for point in points
        ]
        drawn.append(ArmSeries(style=_look(result, arm), dots=dots, line=_frontier(dots)))
    return _panel(
        drawn,
        x_title="seconds of training",
        title="loss over seconds of training; the line joins the best runs so far",
        x_range=log_bounds([seconds_of(collected, point) for point in collected] or [1.0, 10.0]),
        y_range=_loss_range(result),
    )


def _frontier(dots: Sequence[Dot]) -> list[tuple[float, float]]:
    """Return the points (x, y), in order of x, that have a lower y than all points with a smaller x."""
    best: list[tuple[float, float]] = []
    for dot in sorted(dots, key=lambda dot: dot.x):
        if not best or dot.y < best[-1][1]:
            best.append((dot.x, dot.y))
    return best


def notes(result: IsoFlopResult) -> list[str]:
    """Return sentences below the tables of an isoFLOP result on what limits it, such as missing runs and noise."""
    return [
        *_unfinished(result),
        *_scale(result),
        *_optima(result),
        *_noise(result),
        *_rates(result),
        *_runs(result),
    ]


def _scale(result: IsoFlopResult) -> list[str]:
    """Return sentences on how small the models are, and on whether their depth was varied."""
    points, grid = list(result.collected), result.collected.grid
    if not points:
        return []
    counts = [point.parameters for point in points]
    found = [
        f"Models have {amount(min(counts))} to {amount(max(counts))} parameters; larger ones may behave differently."
    ]
    depths = {size.blocks for size in grid.sizes}
    if len(depths) == 1 and any(grid.spec.known[arm].get("mechanisms") for arm in grid.spec.arms):
        found.append(
            f"All sizes have {depths.pop()} blocks, so it is not known whether depth pays here; without that, a router "
            "that skips blocks has nothing to gain, and no verdict is given. Add a size of the same width with fewer "
            "blocks."
        )
    return found


def _unfinished(result: IsoFlopResult) -> list[str]:
    collected = result.collected
    spec, there = collected.grid.spec, len(list(collected))
    total = len(spec.arms) * len(spec.budgets) * len(spec.sizes)
    return [f"Not finished: {there} of the grid's {total} cells are recorded."] if there < total else []


def _optima(result: IsoFlopResult) -> list[str]:
    outside = [
        f"{arm} at {compact(budget)}"
        for budget, curves in result.curves.items()
        for arm, curve in curves.items()
        if curve.fit.optimum.where != INSIDE
    ]
    if not outside:
        return ["Every optimum lies inside the grid."]
    return [
        (
            f"The optimum does not lie inside the grid for {', '.join(outside)}: a better size may be beyond its "
            "edge, so losses and shares that depend on it are properties of the grid, not of the arm."
        )
    ]


def _noise(result: IsoFlopResult) -> list[str]:
    spread = result.noise
    if spread is None:
        return ["There are no intervals, because nothing measures the noise (no second seed, and too few sizes)."]
    source = "seeds of the same run" if spread.source == "seeds" else "the parabolas' residuals (no second seed yet)"
    return [
        (
            f"The noise of one run's loss has a standard deviation of {spread.deviation:.4f} nats, estimated from "
            f"{source} with {spread.degrees} degrees of freedom. It does not cover the error of fitting a parabola, or "
            "other corpora."
        ),
        *_many(result),
    ]


def _many(result: IsoFlopResult) -> list[str]:
    compared = sum(map(len, result.same.values()))
    if compared < 2:
        return []
    return [
        (
            f"There are {compared} comparisons with {result.base}, each with its own 90 % interval: if nothing "
            f"differed, about {compared / 10:g} of them would still exclude 0."
        )
    ]


def _rates(result: IsoFlopResult) -> list[str]:
    collected = result.collected
    if len(collected.grid.spec.rates) < 2:
        return ["All arms use one learning rate; none was tuned."]
    grid, ends = (
        collected.grid,
        [arm for arm, rate in collected.chosen.items() if rate in _ends(list(collected.sweep[arm]))],
    )
    found = [
        (
            f"Learning rates were tuned at one size ({grid.middle}), one budget and one seed. At other sizes, an arm's "
            "loss also depends on how well that rate suits them, so arms differ in their tuning as well."
        )
    ]
    beyond = f"The best learning rate is at an end of the list for {', '.join(ends)}; one beyond it might be better."
    return [*found, *([beyond] if ends else [])]


def _ends(rates: list[float]) -> tuple[float, float]:
    return min(rates), max(rates)


def _runs(result: IsoFlopResult) -> list[str]:
    collected = result.collected
    records = collected.records
    if not records:
        return []
    executed = [r.figures["training_flops"]["executed"] / r.figures["cell"]["budget"] for r in records]
    seen = [r.figures["corpus"]["seen"] for r in records if r.figures["corpus"]["seen"] is not None]
    found = [
        (
            f"Training FLOPs at the realised capacities are {min(executed):.3f} to {max(executed):.3f} of the budget "
            "(they differ for an arm whose decision keeps more or fewer tokens than its capacity)."
        )
    ]
    once = (
        " Windows do not overlap, and none is read twice."
        if collected.grid.once
        else " Windows are at random positions."
    )
    found += [f"No run reads more than {max(seen):.1%} of the corpus.{once}"] if seen else []
    shared = sum(r.figures["sharing"]["busy"] < ALONE for r in records)
    if shared:
        found.append(
            f"{shared} of {len(records)} runs had less than {ALONE:.0%} of the cores that they requested, because the "
            "machine was shared; the seconds of single runs are therefore not comparable."
        )
    timed = len(collected.speeds) == len(collected.grid.sizes) * len(collected.grid.spec.arms)
    found.append(
        "Times are tokens divided by the training speed of each arm and size, timed with the arms of a size "
        "interleaved."
        if timed
        else "Times are those of the runs themselves, which ran one after the other."
    )
    base = collected.grid.spec.base
    return [*found, *([] if base in collected.grid.spec.arms else [f"There is no arm {base!r} to compare with."])]
