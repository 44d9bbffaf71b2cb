"""Draw the README's picture: tokens that pass or skip blocks, and neurons that choose their activation.

`python tools/picture.py docs/picture.svg` writes the file; `tests/test_picture.py` checks that it is up to date. The
picture is a scheme, not a measurement. Its colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

WIDTH, HEIGHT = 960, 440
TOKENS = ["The", "cat", "that", "we", "saw", "sat", "on", "it"]
# Blocks from the bottom: the tokens that are computed, and their gains.
BLOCKS: list[tuple[str, str, dict[int, float]]] = [
    ("block 1", "dense", dict.fromkeys(range(8), 1.0)),
    ("block 2", "Mixture-of-Depths", {1: 1.0, 4: 1.0, 5: 1.0}),
    ("block 3", "Token-Selective", {0: 0.35, 1: 0.95, 3: 0.4, 4: 1.0, 5: 0.9, 7: 0.65}),
    ("block 4", "Mixture-of-Depths", {1: 1.0, 5: 1.0, 7: 1.0}),
    ("block 5", "early exit", {0: 1.0, 1: 1.0, 4: 1.0, 5: 1.0, 7: 1.0}),
    ("block 6", "early exit", {1: 1.0, 5: 1.0, 7: 1.0}),
]
LEFT, COLUMN, BOTTOM, ROW = 168, 52, 366, 48  # layout of the grid of tokens and blocks
ACTIVATIONS: list[tuple[str, str, Callable[[float], float]]] = [
    ("ReLU", "#d1495b", lambda v: max(v, 0.0)),
    ("Tanh", "#b8860b", math.tanh),
    ("SiLU", "#2a7fba", lambda v: v / (1 + math.exp(-v))),
    ("GELU", "#2e9e6b", lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2),
]
CHOSEN = "2.02 10.3 2.21 .120 03.2 .021 2.30 1.03"  # the functions of 32 neurons; a dot is off
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f; }
  .small { font-size: 11.5px; fill: #57606a; }
  .title { font-weight: 600; }
  .stream { stroke: #8c959f; stroke-width: 1.6; }
  .skipped { fill: none; stroke: #8c959f; stroke-dasharray: 3 3; }
  .computed { fill: #2a7fba; }
  .axis { stroke: #8c959f; fill: none; }
  .off { fill: none; stroke: #8c959f; stroke-dasharray: 2 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #9da7b1; } .computed { fill: #58a6d6; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return an SVG text element.

    x, y: the baseline's start, middle or end, by `anchor`. words: the text. kind: its CSS class.
    """
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def blocks() -> Iterable[str]:
    """Yield the grid: a column for each token and a row for each block, with the stream running upwards."""
    yield text(24, 30, "Tokens choose their blocks", "title")
    yield text(24, 50, "A token that skips a block takes no part in its matrix products.", "small")
    for column, token in enumerate(TOKENS):
        x = LEFT + column * COLUMN
        yield f'<line class="stream" x1="{x}" x2="{x}" y1="{BOTTOM + 14}" y2="{BOTTOM - 6 * ROW + 4}"/>'
        yield text(x, BOTTOM + 32, token, anchor="middle")
        depth = sum(column in kept for _, _, kept in BLOCKS)
        yield text(x, BOTTOM - 6 * ROW - 2, f"{depth}/6", "small", "middle")
    for row, (name, mechanism, kept) in enumerate(BLOCKS):
        y = BOTTOM - row * ROW - 34
        yield text(24, y + 13, name)
        yield text(24, y + 28, mechanism, "small")
        for column in range(len(TOKENS)):
            x = LEFT + column * COLUMN - 17
            kind = f'class="computed" fill-opacity="{kept[column]:g}"' if column in kept else 'class="skipped"'
            paper = "" if column in kept else ' fill-opacity="0"'
            yield f'<rect {kind}{paper} x="{x}" y="{y}" width="34" height="28" rx="5"/>'


def neurons() -> Iterable[str]:
    """Yield the right panel: neurons coloured by their chosen function, and the functions."""
    left, top = 624, 92
    yield text(left, 30, "Neurons choose their activation", "title")
    yield text(left, 50, "Four functions, by PolyGLU; some neurons are off.", "small")
    for index, choice in enumerate(CHOSEN.replace(" ", "")):
        x, y = left + 14 + index % 8 * 34, top + index // 8 * 36
        shown = 'class="off"' if choice == "." else f'fill="{ACTIVATIONS[int(choice)][1]}"'
        yield f'<circle {shown} cx="{x}" cy="{y}" r="12"/>'
    for index, (name, colour, function) in enumerate(ACTIVATIONS):
        x, y = left + index * 72, 272
        points = [(v / 10, function(v / 10)) for v in range(-30, 31)]
        line = " ".join(f"{x + 28 + 8 * a:.1f},{y + 24 - 8 * b:.1f}" for a, b in points)
        yield f'<line class="axis" x1="{x + 2}" x2="{x + 54}" y1="{y + 24}" y2="{y + 24}"/>'
        yield f'<polyline fill="none" stroke="{colour}" stroke-width="2.2" points="{line}"/>'
        yield text(x + 28, y + 54, name, anchor="middle")


def legend() -> Iterable[str]:
    """Yield the explanation of filled, pale and dashed shapes."""
    y = HEIGHT - 12
    yield f'<rect class="computed" x="24" y="{y - 13}" width="22" height="16" rx="4"/>'
    yield text(54, y, "computed", "small")
    yield f'<rect class="computed" fill-opacity="0.4" x="130" y="{y - 13}" width="22" height="16" rx="4"/>'
    yield text(160, y, "computed, update scaled by a gate", "small")
    yield f'<rect class="skipped" x="392" y="{y - 13}" width="22" height="16" rx="4"/>'
    yield text(422, y, "skipped: the residual stream passes by", "small")
    yield f'<circle class="off" cx="676" cy="{y - 5}" r="8"/>'
    yield text(692, y, "off: its weights are not read", "small")


def picture() -> str:
    """Return the whole SVG."""
    parts = [*blocks(), *neurons(), *legend()]
    label = "A grid of tokens and blocks in which some tokens skip blocks, and a grid of neurons coloured by activation"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
