"""The mistakes of a recipe: all of them, as they were typed, and before torch is loaded where that can be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from skipstone_cli.errors import UserError
from skipstone_cli.overrides import split

PARTS = re.compile(r"model(\.(mechanisms|activation|neuron_groups|experts)\b|=)")


def check_recipe(config: Mapping[str, Any], overrides: Sequence[str], **how: Any) -> None:
    """Raise UserError with a line for each mistake in `config`, which `overrides` are part of. how: as `early.check`.

    Where the command line names a mechanism or another part, its options are checked, too: that loads torch.
    """
    from skipstone.core.strict import mistakes
    from skipstone.train.early import check

    try:
        check(config, **how)
    except ValueError as error:
        lines = mistakes(error)
        if "read" not in how and any(PARTS.match(word) for word in overrides):
            lines += _about_the_model(config.get("model"))
        raise UserError(*(as_typed(line, overrides) for line in dict.fromkeys(lines))) from None


def _about_the_model(model: object) -> list[str]:
    if not isinstance(model, Mapping):
        return []
    from skipstone.train.setup import model_mistakes

    return model_mistakes(model)


def as_typed(line: str, overrides: Sequence[str]) -> str:
    """The line, with what was typed where the value that it shows was written otherwise, as `0` that became `0.0`."""
    for word in reversed(overrides):
        key, value = split(word)
        *_, section, name = ["", *key.split(".")]
        near = section.isdecimal() or section in line or key.startswith("model.")
        shown = line.rpartition(" got ")[2].strip("'\"")
        if re.search(rf"\b{re.escape(name)}\b.* got ", line) and near and shown != value.strip("'\" "):
            return f"{line} (typed: {word})"
    return line
