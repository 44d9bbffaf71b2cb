"""The choice of the first of several corpora that is on this machine or can be downloaded."""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.data.corpora import load_corpus


def first_available(names: Sequence[str]) -> tuple[str | None, str]:
    """Return the first of these corpora that is available, and why those before it are not.

    The second part is a text, "" if the first corpus is available. names: the corpora in order of preference; for an
    empty list, (None, "") is returned. Corpora that can be downloaded are downloaded. Raises FileNotFoundError with the
    last one's reason if none is available.
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
