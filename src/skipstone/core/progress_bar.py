"""`ProgressBar`: what a long command has done, the time left and its last figures, on stderr."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS = 10.0  # between two lines where there is no terminal


class ProgressBar:
    """Shows a bar in a terminal and plain lines elsewhere, such as in a file or a pipe.

    unit: plural name of what is counted. done: what an earlier process has finished; the time left is estimated from
    what is finished after it. seconds: between two lines that `update` prints, None if `line` alone prints.
    """

    def __init__(self, total: int, unit: str, done: int = 0, seconds: float | None = SECONDS) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.total, self.unit, self.done, self.seconds = total, unit, done, seconds
        self.note = ""
        self._first, self._began, self._said = done, monotonic(), monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self.console.is_terminal:
            self._open()

    def _open(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self.console)
        self._task = self._bar.add_task("", total=self.total, completed=self.done)
        self._bar.start()

    def update(self, done: int, note: str | None = None) -> None:
        """Tell how much is done; note: the last figures, shown until there are newer ones."""
        self.done, self.note = done, self.note if note is None else note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=self.note)
        elif self.seconds is not None and (done >= self.total or monotonic() - self._said >= self.seconds):
            self.line()

    def line(self) -> None:
        """Print a line where there is no bar."""
        if self._bar is None:
            self._said = monotonic()
            parts = [f"{self.done:,} of {self.total:,} {self.unit}", self.note, self.left()]
            self.console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)

    def left(self) -> str:
        """Return the time left in words, empty if it is not known or nothing is left."""
        finished = self.done - self._first
        if finished <= 0 or self.done >= self.total:
            return ""
        minutes, seconds = divmod(round((monotonic() - self._began) * (self.total - self.done) / finished), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"

    def close(self) -> None:
        """Give the terminal back; may be called twice, and must be called after an error, too."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
