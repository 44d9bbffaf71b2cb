"""Print generated text as it is generated, with a background colour for each token that shows its share of compute."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

# Five colours from the least to the most compute, dark blue to yellow, readable for colour-blind users.
STEPS = (
    "#ffffff on #30346b",
    "#ffffff on #2d6a8a",
    "#000000 on #2fa08b",
    "#000000 on #84d05a",
    "#000000 on #f4e04d",
)


class ShadedPiece(Protocol):
    """A piece of generated text, and the share (0 to 1) of the blocks' computation that was executed for it."""

    @property
    def text(self) -> str:
        """The text of the piece."""

    @property
    def compute(self) -> float:
        """The share of the blocks' computation that the piece took, from 0 to 1."""


def style(compute: float) -> str:
    """Return the rich style (text and background colour) of a token that took the share `compute` (0 to 1)."""
    return STEPS[min(int(max(compute, 0.0) * len(STEPS)), len(STEPS) - 1)]


def show(pieces: Iterable[ShadedPiece], *, colour: bool, console: Console | None = None) -> None:
    """Print pieces of text as they arrive; with `colour`, shade each by its share of compute and add a legend.

    If the output is not a terminal with colours (a pipe, or NO_COLOR is set), `colour` writes one line for each piece
    instead: its share in per cent, a tab, and its text as JSON. Without `colour`, the text alone is written. console:
    where to print; None means stdout.
    """
    from rich.console import Console

    console = console or Console(soft_wrap=True, highlight=False)
    if colour and (console.no_color or not console.is_terminal):
        _list(pieces, console)
    elif colour:
        _shade(pieces, console)
    else:
        for piece in pieces:
            console.file.write(visible(piece.text) if console.is_terminal else piece.text)  # rich would expand tabs
            console.file.flush()
        console.print()


def _list(pieces: Iterable[ShadedPiece], console: Console) -> None:
    for piece in pieces:
        console.file.write(f"{100 * piece.compute:.1f}\t{json.dumps(piece.text, ensure_ascii=False)}\n")
        console.file.flush()


def _shade(pieces: Iterable[ShadedPiece], console: Console) -> None:
    from rich.text import Text

    seen = []
    for piece in pieces:
        seen.append(piece.compute)
        # Line ends get a visible character, so that their colour can be seen.
        text = visible(piece.text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
        console.print(Text(text, style=style(piece.compute)), end="")
        console.file.flush()
    console.print("\n")
    average = f"   mean {100 * sum(seen) / len(seen):.0f}%" if seen else ""
    console.print(
        Text.assemble("compute spent to choose a token: ", *((f" {bound} ", s) for bound, s in _legend()), average)
    )


def visible(text: str) -> str:
    """Return `text` with control characters, which could be terminal escape codes, replaced by U+FFFD.

    Tab and newline are kept.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text
    )


def _legend() -> list[tuple[str, str]]:
    width = 100 // len(STEPS)
    return [(f"{i * width}–{(i + 1) * width}%", step) for i, step in enumerate(STEPS)]
