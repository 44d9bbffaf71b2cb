"""Report all mistakes of a recipe together, as they were typed, and without loading torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from skipstone_cli.errors import UserError
from skipstone_cli.overrides import split


def check_recipe(config: Mapping[str, Any], overrides: Sequence[str], **how: Any) -> None:
    """Raise UserError with a message for each mistake in a recipe.

    config: the recipe with the overrides applied. overrides: as typed, "key=value". how: further arguments of
    `skipstone.train.early.check`, such as `out`, the run folder, and `resume`.
    """
    from skipstone.train.early import check

    with told_as_typed(overrides):
        check(config, **how)


@contextmanager
def told_as_typed(overrides: Sequence[str]) -> Iterator[None]:
    """Turn a ValueError of the `with` block into a UserError whose messages show values as they were typed.

    overrides: the words of the command line, "key=value".
    """
    from skipstone.core.strict import mistakes

    try:
        yield
    except ValueError as error:
        raise UserError(*(as_typed(line, overrides) for line in dict.fromkeys(mistakes(error)))) from None


def as_typed(line: str, overrides: Sequence[str]) -> str:
    """Return an error message, with the override appended if the message shows its value in another form.

    For example, `0` may be shown as `0.0`; " (typed: train.learning_rate=0)" is then appended. line: the message.
    overrides: the words of the command line, "key=value".
    """
    for word in reversed(overrides):
        key, value = split(word)
        *_, section, name = ["", *key.split(".")]
        near = section.isdecimal() or section in line or key.startswith("model.")
        shown = line.rpartition(" got ")[2].strip("'\"")
        if re.search(rf"\b{re.escape(name)}\b.* got ", line) and near and shown != value.strip("'\" "):
            return f"{line} (typed: {word})"
    return line
