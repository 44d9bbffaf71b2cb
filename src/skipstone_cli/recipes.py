"""Report all mistakes of a recipe together, as they were typed, and without loading torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from skipstone_cli.errors import UserError
from skipstone_cli.overrides import split


def check_recipe(config: Mapping[str, Any], overrides: Sequence[str], **how: Any) -> None:
    """Raise UserError with a message for each mistake in `config`, which includes the overrides.

    how: options of `early.check`.
    """
    from skipstone.core.strict import mistakes
    from skipstone.train.early import check

    try:
        check(config, **how)
    except ValueError as error:
        raise UserError(*(as_typed(line, overrides) for line in dict.fromkeys(mistakes(error)))) from None


def as_typed(line: str, overrides: Sequence[str]) -> str:
    """Return the message with the typed word appended if it shows the value in another form (`0` as `0.0`)."""
    for word in reversed(overrides):
        key, value = split(word)
        *_, section, name = ["", *key.split(".")]
        near = section.isdecimal() or section in line or key.startswith("model.")
        shown = line.rpartition(" got ")[2].strip("'\"")
        if re.search(rf"\b{re.escape(name)}\b.* got ", line) and near and shown != value.strip("'\" "):
            return f"{line} (typed: {word})"
    return line
