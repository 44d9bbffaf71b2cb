"""Charts of the tokens to which compute went: by group of tokens, and its correlation with their loss."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from skipstone.core.strict import PlainDict
from skipstone.measure.token_trace import Allocation, TokenGroup
from skipstone.report import svg
from skipstone.report.axes import AxisScale, ticks
from skipstone.report.drawn import Drawn
from skipstone.report.palette import BLUE, VERMILION
from skipstone.report.run_view import RunView

WIDTH, LEFT, RIGHT, ROW, TOP = 350, 138, 22, 24, 6
CORRELATIONS = {
    "as it is": "correlation",
    "position removed": "without_position",
    "token removed": "without_token",
    "both removed": "without_both",
}


def card(run: RunView) -> PlainDict | None:
    """Return the pictures of how a run's compute was distributed over tokens, as variables of the page's template.

    Keys: `run`, the run itself; `groups`, pairs of a title and a picture with a bar for each group of tokens;
    `correlation`, a picture of how compute correlates with the loss. The result is None if the run skips nothing or was
    not measured.
    """
    allocation = None if run.trace is None or not run.trace.routed else run.trace.allocation
    if allocation is None:
        return None
    kinds = {
        "kind of token": allocation.by_kind,
        "frequency in this text": allocation.by_frequency,
        "position in the row": allocation.by_position,
    }
    bars = [(title, _bars(groups, f"{run.name}: compute by {title}")) for title, groups in kinds.items() if groups]
    return {
        "run": run,
        "groups": bars,
        "correlation": _correlations(allocation, f"{run.name}: correlation of compute and loss"),
    }


def _bars(groups: Sequence[TokenGroup], title: str) -> Drawn:
    """Draw, for each group of tokens, the share of the blocks' computation that was executed for its tokens.

    title: text for screen readers.
    """
    across = AxisScale(0.0, 1.0, LEFT, WIDTH - RIGHT)
    parts = _grid(across, len(groups), "{:.0%}")
    for i, group in enumerate(groups):
        loss = "" if group.loss is None else f", loss {group.loss:.3f}"
        hover = f"{group.name}: {group.compute:.1%} of the blocks{loss}, {group.tokens:,} tokens"
        parts += _row(i, group.name, across, (0.0, group.compute), f"{group.compute:.0%}", BLUE, hover)
    rows = [
        (group.name, f"{group.tokens:,}", f"{group.compute:.1%}", "–" if group.loss is None else f"{group.loss:.3f}")
        for group in groups
    ]
    picture = svg.drawing(WIDTH, TOP + ROW * len(groups) + 24, parts, title)
    return Drawn.of(picture, ("tokens", "count", "compute", "loss"), rows)


def _correlations(allocation: Allocation, title: str) -> Drawn:
    """Draw the correlation of compute and loss, as it is and without what position and token id explain of both.

    title: text for screen readers.
    """
    across = AxisScale(-1.0, 1.0, LEFT, WIDTH - RIGHT)
    found = {name: getattr(allocation, field) for name, field in CORRELATIONS.items()}
    parts = _grid(across, len(found), "{:g}")
    for i, (name, value) in enumerate(found.items()):
        said = "constant" if value is None else f"{value:+.2f}"
        ends = (0.0, 0.0) if value is None else (min(value, 0.0), max(value, 0.0))
        parts += _row(i, name, across, ends, said, BLUE if (value or 0) >= 0 else VERMILION, f"{name}: {said}")
    rows = [(name, "constant" if value is None else f"{value:+.3f}") for name, value in found.items()]
    return Drawn.of(svg.drawing(WIDTH, TOP + ROW * len(found) + 24, parts, title), ("", "correlation"), rows)


def _grid(across: AxisScale, rows: int, form: str) -> list[Markup]:
    floor = TOP + ROW * rows
    parts = []
    for value in ticks(across.low, across.high, 4):
        parts.append(svg.line(across(value), TOP, across(value), floor, "grid"))
        parts.append(svg.text(across(value), floor + 15, form.format(value), "tick", text_anchor="middle"))
    return parts


def _row(
    i: int, name: str, across: AxisScale, ends: tuple[float, float], said: str, colour: str, hover: str
) -> list[Markup]:
    y = TOP + ROW * i
    low, high = across(ends[0]), across(ends[1])
    outside = high + 34 < WIDTH - RIGHT
    return [
        svg.text(LEFT - 8, y + ROW / 2 + 4, name, "tick", text_anchor="end"),
        svg.rectangle(low, y + 4, high - low, ROW - 8, hover, fill=colour),
        svg.text(
            high + 5 if outside else high - 5,
            y + ROW / 2 + 4,
            said,
            "value" if outside else "value inside",
            text_anchor="start" if outside else "end",
        ),
    ]
