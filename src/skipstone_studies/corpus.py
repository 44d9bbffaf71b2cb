"""The first of several corpora that can be had on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.data.corpora import load_corpus


def first_available(names: Sequence[str]) -> tuple[str | None, str]:
    """(its name, why those before it could not be had, "" if it is the first). (None, "") for no names.

    Raises FileNotFoundError with the last one's reason when none can be had.
    """
    reason = ""
    for name in names:
        try:
            load_corpus(name).documents("train")
        except FileNotFoundError as error:
            reason = str(error)
        else:
            return name, reason
    if names:
        raise FileNotFoundError(reason)
    return None, ""
