"""How commands such as `eval` and `compare` print a table, and write its figures as JSON and Markdown files."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skipstone_cli.errors import UserError
from skipstone_cli.paths import new_path

if TYPE_CHECKING:
    from rich.table import Table

    from skipstone.core.progress_bar import ProgressBar


class Figures(Protocol):
    """The interface of results that can be printed as a table and written as JSON and Markdown."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values for JSON."""

    def markdown(self) -> str:
        """Return the table as Markdown."""

    def table(self) -> Table:
        """Return the table as an object of rich, for printing on a terminal."""


class Reporter:
    """A progress bar that appears at the first call with (amount done, total amount), and closes with the `with` block.

    unit: what is counted, such as "tokens".
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._bar: ProgressBar | None = None

    def __call__(self, done: int, total: int) -> None:
        from skipstone.core.progress_bar import ProgressBar

        self._bar = self._bar or ProgressBar(total, self.unit)
        self._bar.update(done)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def check_targets(*, json: Path | None, markdown: Path | None) -> None:
    """Raise an error if an output file exists or cannot be created, before anything is measured.

    json, markdown: the paths of the files; None means that the file is not wanted. The two must differ. Raises
    UserError, or OSError or `WriteError` where nothing can be written.
    """
    from skipstone.core.atomic_write import check_writable

    for path, option in ((json, "--json"), (markdown, "--markdown")):
        if path is not None:
            new_path(path, option)
            check_writable(path)
    if json is not None and markdown is not None and json.resolve() == markdown.resolve():
        raise UserError(f"--json and --markdown name the same file, {str(json)!r}; name two")


def publish(figures: Figures, *, json: Path | None, markdown: Path | None) -> None:
    """Print the table of `figures`, and write it to the files that the user wants.

    json, markdown: the paths of the files; None means that the file is not wanted. Raises UserError if a file exists.
    """
    from rich.console import Console

    Console().print(figures.table())
    if json is not None:
        _write(json, json_module.dumps(figures.to_dict(), indent=2, sort_keys=True) + "\n")
    if markdown is not None:
        _write(markdown, figures.markdown())


def _write(path: Path, text: str) -> None:
    from skipstone.core.atomic_write import write_whole

    new_path(path, "output file")  # a file that was created meanwhile is not overwritten either
    write_whole(path, text)
