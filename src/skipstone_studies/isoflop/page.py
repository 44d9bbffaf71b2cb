"""Render the result as one self-contained HTML page by the parts of `skipstone report`, which downloads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jinja2 import ChoiceLoader, PackageLoader

from skipstone.core.strict import PlainDict
from skipstone.evaluate.tables import amount
from skipstone.report.axes import bounds, short
from skipstone.report.drawn import Drawn
from skipstone.report.palette import Style, style
from skipstone.report.templating import environment, script
from skipstone_studies.charts import STEPS, ArmSeries, Dot, Level, log_bounds, panel
from skipstone_studies.isoflop import table
from skipstone_studies.isoflop.curves import INSIDE, Curve, GridPoint
from skipstone_studies.isoflop.grid import compact
from skipstone_studies.isoflop.notes import notes
from skipstone_studies.isoflop.result import EqualTime, IsoFlopResult, seconds_of
from skipstone_studies.page import provenance

Figure = tuple[str, Drawn]


def render(result: IsoFlopResult) -> str:
    """Return the HTML page of an isoFLOP result, which may be incomplete."""
    pages = environment()
    ours = PackageLoader("skipstone_studies.isoflop", "templates")
    assert pages.loader is not None
    pages.loader = ChoiceLoader([ours, pages.loader])
    return pages.get_template("isoflop.html").render(context(result), **script())


def context(result: IsoFlopResult) -> PlainDict:
    """Return the variables of `templates/isoflop.html`."""
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
    """Return one range of losses for all panels of a row."""
    losses = [loss for point in result.collected for loss in point.losses]
    curves = [curve for arms in result.curves.values() for curve in arms.values()]
    return bounds([*losses, *(curve.fit.optimum.loss for curve in curves)], margin)


def _iso_flop(result: IsoFlopResult) -> list[Figure]:
    """Return charts of loss over parameters, one panel per budget."""
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
        picture = panel(drawn, x_title="parameters", title=title, x_range=log_bounds(xs), y_range=_loss_range(result))
        made.append((title, picture))
    return made


def _dots(points: Sequence[GridPoint]) -> list[Dot]:
    """Return the mean of each cell, and its seeds if there are several."""
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
    """Return sizes from the smallest to the largest, evenly spaced on a logarithmic axis."""
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
    """Return charts of loss over forward FLOPs relative to the base's optimum, one panel per budget."""
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
        picture = panel(
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
    """Return charts of loss over parameters after equal times, and one of every run over its seconds."""
    xs = [point.parameters for point in result.collected]
    made = []
    for time in result.times:
        title = f"{time.seconds:,.0f} seconds of training"
        drawn = [_at_time(result, time, curve) for curve in time.curves.values()]
        picture = panel(drawn, x_title="parameters", title=title, x_range=log_bounds(xs), y_range=_loss_range(result))
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
    seconds = [seconds_of(collected, point) for point in collected] or [1.0, 10.0]
    return panel(
        drawn,
        x_title="seconds of training",
        title="loss over seconds of training; the line joins the best runs so far",
        x_range=log_bounds(seconds),
        y_range=_loss_range(result),
        label=short,
    )


def _frontier(dots: Sequence[Dot]) -> list[tuple[float, float]]:
    """Return the points that no faster run beats."""
    best: list[tuple[float, float]] = []
    for dot in sorted(dots, key=lambda dot: dot.x):
        if not best or dot.y < best[-1][1]:
            best.append((dot.x, dot.y))
    return best
