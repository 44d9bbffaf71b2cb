"""The chart of loss against executed FLOPs of several runs, with the Pareto frontier marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from skipstone.report import svg
from skipstone.report.axes import Frame, bounds, labelled, ticks
from skipstone.report.budget_chart import Points
from skipstone.report.drawn import Drawn
from skipstone.report.run_view import RunView

FRAME = Frame(width=620, height=330, left=58)
CHARACTER = 6.3  # width of a letter of a label, about


@dataclass(frozen=True, kw_only=True)
class Place:
    """A point of the chart: a run, or a run at one FLOP budget.

    run: the run. label: the text beside the point. flops: executed forward FLOPs per token. loss: loss in nats per
    token, with decisions made without later tokens.
    """

    run: RunView
    label: str
    flops: float
    loss: float


def chart(runs: Sequence[RunView], budgets: Mapping[str, Points]) -> Drawn | None:
    """Draw loss against executed FLOPs of runs and budgets, with the Pareto frontier; None for fewer than two points.

    runs: the runs on the page; those that cannot decide without later tokens are left out. budgets: {name of a run: its
    points}, which are drawn instead of the run itself; a point is a dict with `target` (None as trained),
    `flops_per_token` and `loss` (nats per token).
    """
    places = [place for run in runs for place in _places(run, budgets.get(run.name, ()))]
    if len(places) < 2:
        return None
    best = frontier(places)
    across = FRAME.across(*bounds((p.flops for p in places), 0.08))
    up = FRAME.up(*bounds((p.loss for p in places), 0.1))
    parts = FRAME.y_axis(up, "nats a token")
    parts += FRAME.x_axis(
        "executed forward FLOPs a token",
        [(across(x), label) for x, label in labelled(ticks(across.low, across.high))],
    )
    pixels = [(across(p.flops), up(p.loss)) for p in best]
    if len(best) > 1:
        path = " ".join(f"{svg.number(x)},{svg.number(y)}" for x, y in pixels)
        parts.append(svg.element("polyline", svg.element("title", "frontier"), points=path, class_="frontier"))
    for place in places:
        parts += _dot(place, across(place.flops), up(place.loss), place in best)
    rows = [
        (p.label, f"{p.flops:,.0f}", f"{p.loss:.4f}", "yes" if p in best else "no")
        for p in sorted(places, key=lambda p: p.flops)
    ]
    picture = svg.drawing(FRAME.width, FRAME.height, parts, "loss against executed FLOPs")
    return Drawn.of(picture, ("run", "FLOPs a token", "loss", "on the frontier"), rows)


def frontier(places: Sequence[Place]) -> list[Place]:
    """Return those of the points `places` that are on the Pareto frontier, in order of FLOPs.

    A point is left out if another one has at most its FLOPs and at most its loss; of equal points, one is returned.
    """
    best: list[Place] = []
    for place in sorted(places, key=lambda p: (p.flops, p.loss)):
        if not best or place.loss < best[-1].loss:
            best.append(place)
    return best


def _places(run: RunView, points: Points) -> list[Place]:
    measured = [
        Place(
            run=run,
            label=run.name if p["target"] is None else f"{run.name} at {p['target']:.0%}",
            flops=float(p["flops_per_token"]),
            loss=float(p["loss"]),
        )
        for p in points
    ]
    loss = (run.result.get("validation") or {}).get("causal_loss")
    if measured or loss is None or run.trace is None or run.trace.flops is None:
        return measured
    return [Place(run=run, label=run.name, flops=run.trace.flops, loss=float(loss))]


def _dot(place: Place, x: float, y: float, on_frontier: bool) -> list[Markup]:
    hover = f"{place.label}: {place.flops:,.0f} FLOPs a token, loss {place.loss:.4f}"
    left = x + 10 + CHARACTER * len(place.label) > FRAME.width
    return [
        svg.element(
            "circle",
            svg.element("title", hover),
            cx=x,
            cy=y,
            r=5.5 if on_frontier else 4.0,
            fill=place.run.style.colour,
            class_="best" if on_frontier else "dominated",
        ),
        svg.text(x - 9 if left else x + 9, y - 7, place.label, "place", text_anchor="end" if left else "start"),
    ]
