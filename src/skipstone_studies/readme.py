"""Write a study's table into a README, between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skipstone.core.atomic_write import write_whole
from skipstone_studies.page import block, heading
from skipstone_studies.record import Record
from skipstone_studies.study import Study


def check(path: Path, name: str) -> None:
    """Raise an error unless a README exists and has two marks, between which a table can be written.

    path: the file. name: the name in the marks, `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Raises FileNotFoundError
    if the file does not exist, and ValueError unless both marks occur once.
    """
    if not path.is_file():
        raise FileNotFoundError(f"README {str(path)!r} does not exist")
    _cut(path.read_text(encoding="utf-8"), path, name)


def write(path: Path, study: Study, records: Sequence[Record]) -> None:
    """Write a study's table into a README between the marks with the study's name, and change nothing else.

    path: the README. The marks are `<!-- NAME:begin -->` and `<!-- NAME:end -->`. study: the study, whose name is NAME.
    records: the stored results of runs that the table shows. Raises ValueError unless both marks occur once.
    """
    write_between(path, study.name, f"**{heading(records)}**\n\n{block(study, records)}")


def write_between(path: Path, name: str, text: str) -> None:
    """Write `text` into a README between the marks `<!-- NAME:begin -->` and `<!-- NAME:end -->`; change nothing else.

    path: the README. name: the name in the marks. Raises ValueError unless both occur once.
    """
    before, after = _cut(path.read_text(encoding="utf-8"), path, name)
    write_whole(path, f"{before}\n{text}\n{after}")


def _cut(text: str, path: Path, name: str) -> tuple[str, str]:
    """Return the text up to and including the begin mark of `name`, and the text from its end mark on.

    path: the file, for errors. Raises ValueError unless each mark occurs once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"{str(path)!r} has no place for the table: it needs one line {begin} and below it one {end}")
    head, _, rest = text.partition(begin)
    return head + begin, end + rest.partition(end)[2]
