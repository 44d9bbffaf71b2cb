"""Pictures of `adapt_frontier.py`: loss by executed FLOPs, an SVG file of its own for each text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from skipstone.report import svg
from skipstone.report.axes import bounds
from skipstone.report.palette import Style, style
from skipstone_studies.isoflop.charts import FRAME, Dot, Drawn, log_bounds, panel

TUNED = "dense, tuned"
KINDS = ("fewer blocks", "mixture of depths", "random skipping", "neurons by magnitude")
IN_DECODING = "neurons by magnitude"  # the only kind whose FLOPs fall there and nowhere else
TITLE = "A pretrained model computes less: loss by executed FLOPs"


def picture(
    source: dict[str, Any],
    results: dict[str, list[dict[str, Any]]],
    speeds: dict[str, dict[str, float]],
    name: str,
) -> str:
    """An SVG: loss on the text `name` by share of FLOPs, a line an arm, from the tuned source on (or the source)."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    known = [kind for kind in KINDS if any(arm.startswith(kind) for arm in results)]
    for arm, seeds in ({TUNED: [source]} | results).items():  # results may bring a tuned one of their own
        share = statistics.fmean(s[name]["flops"] for s in seeds) / source[name]["flops"]
        share = speeds[arm]["flops"] if IN_DECODING in arm else share
        point = (share, statistics.fmean(s[name]["loss"] for s in seeds))
        own = IN_DECODING if IN_DECODING in arm else arm.split(" at ")[0]  # more or fewer neurons are one line
        for kind in [own] if arm != TUNED else known:
            kinds.setdefault(kind, []).append(point)
    drawn = []
    for i, (kind, points) in enumerate(kinds.items()):
        dots = [Dot(x=x, y=y, hover=f"{kind}: {x:.1%}, {y:.3f} nats") for x, y in sorted(points)]
        drawn.append(Drawn(style=style(i), dots=dots, line=sorted(points)))
    every = [point for points in kinds.values() for point in points]
    xs, ys = zip(*every, strict=True)
    drawing = panel(
        drawn,
        x_title="executed FLOPs by the source's",
        title=f"{TITLE}: {name}",
        x_range=log_bounds(xs),
        y_range=bounds(ys, 0.08),
        label="{:.0%}".format,
    )
    names = [f"{kind}, decoding" if kind == IN_DECODING else kind for kind in kinds]
    return standalone(drawing, [(name, each.style) for name, each in zip(names, drawn, strict=True)])


def standalone(drawing: str, names: Sequence[tuple[str, Style]]) -> str:
    """A file of its own: the style that a page would give, and a legend."""
    style = (files("skipstone.report") / "templates" / "style.css").read_text(encoding="utf-8")
    legend = [
        svg.text(
            FRAME.width - FRAME.right,
            FRAME.top + 14 * (i + 1),
            name,
            "said",
            text_anchor="end",
            style=f"fill: {to.colour}",
        )
        for i, (name, to) in enumerate(names)
    ]
    loaded, rest = drawing.removeprefix("<svg"), "</svg>"
    inner = loaded.removesuffix(rest)
    return f'<svg xmlns="http://www.w3.org/2000/svg"{inner}<style>{style}</style>{"".join(legend)}{rest}\n'
