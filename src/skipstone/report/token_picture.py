"""The picture of compute by token and layer (tokens across, layers up), and the text coloured by depth."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from markupsafe import Markup, escape

from skipstone.measure.token_trace import TokenTrace
from skipstone.report import svg
from skipstone.report.drawn import Drawn

CELL_WIDTH, CELL_HEIGHT, GAP = 11.2, 23, 1
LEFT, TOP = 62, 8
MAX_LABEL = 10
FAINTEST = 0.16  # opacity of a kept token whose weight is next to nothing: kept must not look skipped
VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(token: str) -> str:
    """Return a token as a label in which white space and control characters are replaced by visible signs."""
    return "".join(
        VISIBLE.get(c, "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c) for c in token
    )


def picture(trace: TokenTrace, count: int, title: str) -> Drawn:
    """Draw the weight of each block's update for the first `count` tokens, with blocks from the bottom upwards.

    Cells of skipped tokens are empty. trace: what a model decided for a text. title: text for screen readers.
    """
    labels = [visible(token) for token in trace.tokens[:count]]
    longest = max((len(label) for label in labels), default=1)
    room = 16 if longest <= 1 else 10 + 6.2 * min(longest, MAX_LABEL)
    layers = len(trace.weight_LT)
    width = LEFT + CELL_WIDTH * len(labels) + 8
    floor = TOP + CELL_HEIGHT * layers
    parts = [_row(trace, layer, labels, floor - CELL_HEIGHT * (layer + 1)) for layer in range(layers)]
    parts += [_label(label, LEFT + CELL_WIDTH * (t + 0.5), floor + 13) for t, label in enumerate(labels)]
    turned = f"rotate(-90 12 {svg.number((TOP + floor) / 2)})"
    parts.append(svg.text(12, (TOP + floor) / 2, "layer", "axis", text_anchor="middle", transform=turned))
    layers_of = sorted(trace.routed)
    rows = [(label, *(_cell(trace, layer, t) for layer in layers_of)) for t, label in enumerate(labels)]
    heads = ("token", *(f"layer {layer}" for layer in layers_of))
    return Drawn.of(svg.drawing(width, floor + room + 4, parts, title), heads, rows)


def _cell(trace: TokenTrace, layer: int, t: int) -> str:
    return f"{trace.weight_LT[layer][t]:.3g}" if trace.kept_LT[layer][t] else "skipped"


def _row(trace: TokenTrace, layer: int, labels: Sequence[str], y: float) -> Markup:
    """Draw the cells of one block, one for each token; a block without mechanisms is a single bar.

    labels: the tokens' texts. y: upper edge of the row, in pixels.
    """
    name = svg.text(LEFT - 8, y + CELL_HEIGHT / 2 + 4, str(layer), "tick", text_anchor="end")
    if layer not in trace.routed:
        whole = CELL_WIDTH * len(labels) - GAP
        return name + svg.rectangle(
            LEFT, y, whole, CELL_HEIGHT - GAP, f"layer {layer}: every token, in full", class_="plain"
        )
    strongest = trace.strongest or 1.0
    cells = []
    weights = trace.weight_LT[layer][: len(labels)]
    for t, (weight, kept) in enumerate(zip(weights, trace.kept_LT[layer], strict=False)):
        x, box = LEFT + CELL_WIDTH * t, (CELL_WIDTH - GAP, CELL_HEIGHT - GAP)
        if kept:
            hover = f"{labels[t]}, layer {layer}: weight {weight:.3g}"
            shade = FAINTEST + (1 - FAINTEST) * min(abs(weight) / strongest, 1.0)
            cells.append(svg.rectangle(x, y, *box, hover, class_="less" if weight < 0 else "more", fill_opacity=shade))
        else:
            cells.append(svg.rectangle(x, y, *box, f"{labels[t]}, layer {layer}: skipped", class_="skipped"))
    return name + Markup().join(cells)


def _label(label: str, x: float, y: float) -> Markup:
    if len(label) <= 1:
        return svg.text(x, y, label, "token", text_anchor="middle")
    cut = label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"
    turned = f"rotate(-90 {svg.number(x + 3)} {svg.number(y - 6)})"
    return svg.text(x + 3, y - 6, cut, "token", text_anchor="end", transform=turned)


def coloured(pieces: Sequence[tuple[str, float]], hover: str = "{:.0%} of the compute") -> Markup:
    """Return HTML text in which each piece is coloured by its number in [0, 1].

    pieces: pairs of a text and its number. hover: a format string for the number, whose result is shown when the
    pointer rests on a piece. Line breaks stay; other control characters become visible.
    """
    spans = [
        Markup('<span style="--depth-share: {}" title="{}">{}</span>').format(
            svg.number(min(max(share, 0.0), 1.0)), hover.format(share), escape(_readable(text))
        )
        for text, share in pieces
    ]
    return Markup().join(spans)


def _readable(text: str) -> str:
    return "".join(c if c in "\n\t" else visible(c) if unicodedata.category(c)[0] == "C" else c for c in text)
