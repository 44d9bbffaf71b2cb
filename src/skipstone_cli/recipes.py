"""Report all mistakes of a recipe together, as they were typed, and without loading torch where possible."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from skipstone_cli.errors import UserError
from skipstone_cli.overrides import split

PARTS = re.compile(r"model(\.(mechanisms|activation|neuron_groups|experts)\b|=)")


def check_recipe(config: Mapping[str, Any], overrides: Sequence[str], **how: Any) -> None:
    """Raise UserError with a message for each mistake in `config`, which includes the overrides. how: as `early.check`.

    If the command line names a mechanism or another part, its options are checked too, which loads torch.
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
    """Return the message with the typed word appended if it shows the value in another form (`0` as `0.0`)."""
    for word in reversed(overrides):
        key, value = split(word)
        *_, section, name = ["", *key.split(".")]
        near = section.isdecimal() or section in line or key.startswith("model.")
        shown = line.rpartition(" got ")[2].strip("'\"")
        if re.search(rf"\b{re.escape(name)}\b.* got ", line) and near and shown != value.strip("'\" "):
            return f"{line} (typed: {word})"
    return line
