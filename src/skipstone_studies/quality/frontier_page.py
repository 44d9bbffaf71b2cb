"""What stands below the table of a study that adapts a checkpoint to compute less: generated texts and charts.

The charts show loss by executed FLOPs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.resources import files

from skipstone.report import svg
from skipstone.report.axes import bounds
from skipstone.report.palette import Style, style
from skipstone_studies.charts import FRAME, ArmSeries, Dot, log_bounds, panel
from skipstone_studies.claims import ByArm, values

TEXTS = {  # corpora and splits for evaluation
    "wikitext-2": ("wikitext-2", "test"),
    "dictionary": ("gcide", "validation"),
    "plays": ("tiny-shakespeare", "validation"),
}
TUNED = "dense, tuned"
DEAR = "neurons by magnitude"  # the only kind that saves FLOPs in decoding only
KINDS = ("fewer blocks", "mixture of depths", "random skipping", DEAR)
TITLE = "A pretrained model computes less: loss against executed FLOPs"
PROMPT_TEXT, SAMPLED_TOKENS = "The old bridge across the river was built in", 40


def samples(figures: ByArm) -> str:
    """Return the text that the first seed of each arm generates, as a Markdown list.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    first = {arm: seeds[min(seeds)] for arm, seeds in figures.items()}
    texts = {arm: " ".join(found["greedy"].split()) for arm, found in first.items() if "greedy" in found}
    lines = [f"* {arm}: “{PROMPT_TEXT} **{text}**”" for arm, text in texts.items()]
    return "\n".join([f"Greedy continuations of the same words, {SAMPLED_TOKENS} tokens each:", "", *lines])


def pictures(figures: ByArm) -> dict[str, str]:
    """Return {name of the evaluated text: chart as SVG}, where a chart shows loss by FLOPs on that text.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    return {text: picture(figures, text) for text in TEXTS if values(figures, "source", f"{text}.loss")}


def picture(figures: ByArm, text: str) -> str:
    """Return an SVG chart of the loss on one text by executed FLOPs (share of the source's), a line for each method.

    The source is the checkpoint before it is adapted. Lines begin at the source trained further, or at the source
    itself if no arm trains it further. FLOPs of neurons by magnitude are those of decoding, the only ones that they
    save. figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    text: name of the text, a key of `TEXTS`.
    """
    start = TUNED if TUNED in figures else "source"
    kinds: dict[str, list[tuple[float, float]]] = {}
    known = [kind for kind in KINDS if any(arm.startswith(kind) for arm in figures)]
    for arm in figures:
        if arm == "source" and start == TUNED:
            continue
        share = values(figures, arm, "decode.flops" if DEAR in arm else f"by_text.{text}.share")
        point = (statistics.fmean(share), statistics.fmean(values(figures, arm, f"{text}.loss")))
        own = DEAR if DEAR in arm else arm.split(" at ")[0]  # all shares of neurons are one line
        for kind in known if arm == start else [own]:
            kinds.setdefault(kind, []).append(point)
    drawn = []
    for i, (kind, points) in enumerate(kinds.items()):
        dots = [Dot(x=x, y=y, hover=f"{kind}: {x:.1%}, {y:.3f} nats") for x, y in sorted(points)]
        drawn.append(ArmSeries(style=style(i), dots=dots, line=sorted(points)))
    xs, ys = zip(*(point for points in kinds.values() for point in points), strict=True)
    drawing = panel(
        drawn,
        x_title="executed FLOPs / the source's",
        y_title="executed loss, nats a token",
        title=f"{TITLE}: {text}",
        x_range=log_bounds(xs),
        y_range=bounds(ys, 0.08),
        label="{:.0%}".format,
    )
    names = [f"{kind}, decoding" if kind == DEAR else kind for kind in kinds]
    return standalone(drawing, [(name, each.style) for name, each in zip(names, drawn, strict=True)])


def standalone(drawing: str, names: Sequence[tuple[str, Style]]) -> str:
    """Return the text of an SVG file that needs no page around it, with the style sheet of the reports and a legend.

    drawing: an <svg> element. names: the legend's entries and their styles.
    """
    style = (files("skipstone.report") / "templates" / "style.css").read_text(encoding="utf-8")
    right = FRAME.width - FRAME.right
    legend = [
        svg.text(right, FRAME.top + 14 * i, name, "said", text_anchor="end", style=f"fill: {to.colour}")
        for i, (name, to) in enumerate(names, 1)
    ]
    inner = drawing.removeprefix("<svg").removesuffix("</svg>")
    return f'<svg xmlns="http://www.w3.org/2000/svg"{inner}<style>{style}</style>{"".join(legend)}</svg>\n'
