"""Generated text on the terminal as it comes, each token on a background that tells how much compute it took."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

# Five steps from the least to the most compute: dark blue to yellow, readable for the colour-blind.
STEPS = ("white on #30346b", "white on #2d6a8a", "black on #2fa08b", "black on #84d05a", "black on #f4e04d")


class Piece(Protocol):
    """A piece of generated text, and the share of the model's FLOPs per token that it took (0 to 1)."""

    @property
    def text(self) -> str: ...

    @property
    def compute(self) -> float: ...


def style(compute: float) -> str:
    """The rich style of a token that took `compute` (0 to 1) of the full depth."""
    return STEPS[min(int(max(compute, 0.0) * len(STEPS)), len(STEPS) - 1)]


def show(pieces: Iterable[Piece], *, colour: bool, console: Console | None = None) -> None:
    """Print `pieces` as they come: as they are, or with `colour` shaded and a legend after the text."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(soft_wrap=True, highlight=False)
    for piece in pieces:
        text = visible(piece.text) if console.is_terminal else piece.text
        if colour:
            console.print(Text(text, style=style(piece.compute)), end="")
        else:
            console.file.write(text)  # rich would expand tabs
        console.file.flush()
    console.print()
    if colour:
        console.print(Text.assemble("compute of a token: ", *((f" {bound} ", s) for bound, s in _legend())))


def visible(text: str) -> str:
    """`text` without control characters but tab and newline: a byte model can write escape codes to the terminal."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text
    )


def _legend() -> list[tuple[str, str]]:
    width = 100 // len(STEPS)
    return [(f"{i * width}–{(i + 1) * width}%", step) for i, step in enumerate(STEPS)]
