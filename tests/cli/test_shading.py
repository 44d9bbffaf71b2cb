"""Streamed text is unchanged in a pipe, and shaded by compute without escape codes of the model on a terminal."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
from rich.console import Console

from skipstone_cli.shading import STEPS, show, style, visible


@dataclass(frozen=True)
class Piece:
    text: str
    compute: float


PIECES = [Piece("def f():\n", 0.1), Piece("\treturn [bold]1[/bold]  \n", 0.9), Piece("\x1b[2J", 1.0)]


def shown(*, colour: bool, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, soft_wrap=True, highlight=False, color_system="truecolor", width=20
    )
    show(PIECES, colour=colour, console=console)
    return file.getvalue()


def test_piped_text_is_unchanged() -> None:
    assert shown(colour=False, terminal=False) == "".join(piece.text for piece in PIECES) + "\n"


def test_a_terminal_gets_no_escape_codes_from_a_model() -> None:
    assert "\x1b" not in shown(colour=False, terminal=True)
    assert visible("a\x1b\x07\x9b\n\tb") == "a\ufffd\ufffd\ufffd\n\tb"


def test_colour_tells_the_compute() -> None:
    text = shown(colour=True, terminal=True)
    assert "48;2;48;52;107" in text.split("def f()")[0]  # the darkest step before the cheapest token
    assert "def f():\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" in text  # a line's end can be seen
    assert "compute spent to choose a token" in text
    assert "mean 67%" in text
    assert "[bold]1[/bold]" in text


def test_without_colours_compute_is_a_number() -> None:
    lines = shown(colour=True, terminal=False).splitlines()
    assert [line.split("\t")[0] for line in lines] == ["10.0", "90.0", "100.0"]
    assert "".join(json.loads(line.split("\t")[1]) for line in lines) == "".join(piece.text for piece in PIECES)


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(colour=True, terminal=True)
    assert "\x1b" not in text
    assert text.startswith("10.0\t")


@pytest.mark.parametrize(("compute", "step"), [(-0.1, 0), (0.0, 0), (0.19, 0), (0.2, 1), (0.99, 4), (1.0, 4), (1.3, 4)])
def test_steps(compute: float, step: int) -> None:
    assert style(compute) == STEPS[step]
