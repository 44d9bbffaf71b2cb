"""Formatting of numbers, and equal sections as rich table, Markdown and JSON."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from skipstone.evaluate.tables import UNKNOWN, Section, amount, markdown, number, percent, plain, rich_table

SECTION = Section(title="a [title]", columns=["", "run|1"], rows=[["[loss]", "1.5"]], notes=["a note"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, UNKNOWN), (math.nan, UNKNOWN), (0.0, "0"), (12_345.4, "12,345"), (1_234_567, "1.235M"), (5.6e9, "5.6G")],
)
def test_amounts(value: float | None, text: str) -> None:
    assert amount(value) == text


def test_shares_and_numbers() -> None:
    assert (percent(0.1234), percent(None), percent(math.nan)) == ("12.3 %", UNKNOWN, UNKNOWN)
    assert (number(1.23456), number(2.0, 1), number(None)) == ("1.2346", "2.0", UNKNOWN)


def test_markdown_is_a_table() -> None:
    assert markdown([SECTION]) == "### a [title]\n\n|  | run\\|1 |\n| --- | ---: |\n| [loss] | 1.5 |\n\na note\n"


def test_the_rich_table_shows_names_as_they_are() -> None:
    file = io.StringIO()
    Console(file=file, width=60).print(rich_table([SECTION, SECTION]))
    text = file.getvalue()
    assert text.count("a [title]") == text.count("[loss]") == text.count("a note") == 2


def test_json_knows_no_nan() -> None:
    assert plain({1: math.nan, "b": (1.0, math.inf)}) == {"1": None, "b": [1.0, None]}
    assert json.dumps(plain({"a": [math.nan]}), allow_nan=False) == '{"a": [null]}'
