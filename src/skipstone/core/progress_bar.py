"""`ProgressBar`: what a long command has done, the time left and its last figures, on stderr.

The library says what it works on (`work`, `advance`); nothing is shown unless the process has called `show`, as the
command line does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

FRAME = 0.1  # seconds between two drawings of a bar
SECONDS = 10.0  # between two lines where there is no terminal
STAGES = "stages"  # the unit of a few parts that take different times, each of which is announced


class ProgressBar:
    """Progress of a long command on stderr: a bar in a terminal, and plain lines elsewhere (a file or a pipe).

    total: the number of units of the whole; None if unknown. unit: plural name of what is counted, such as "tokens".
    done: units finished by an earlier process, which the estimate of the time left leaves out. seconds: least time
    between two lines that `update` prints where there is no terminal; None means that only `line` prints. alive:
    whether a thread redraws the bar between updates, so that its clock keeps moving; if False, no thread disturbs what
    is being timed.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        done: int = 0,
        seconds: float | None = SECONDS,
        *,
        alive: bool = True,
    ) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.total, self.unit, self.done, self.seconds = total, unit, done, seconds
        self.note, self.alive = "", alive
        self._first, self._began, self._said, self._drawn = done, monotonic(), monotonic(), 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self.console.is_terminal:
            self._open()

    def _open(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            BarColumn(24, complete_style="blue", finished_style="blue", pulse_style="blue"),
            TextColumn("{task.fields[said]}", markup=False),
        )
        self._bar = Progress(*columns, console=self.console, auto_refresh=self.alive)
        self._task = self._bar.add_task("", total=self.total, completed=self.done, said=self.said())
        self._bar.start()

    def update(self, done: int, note: str | None = None) -> None:
        """Set the number of finished units and redraw the bar, or print a line if no bar is shown and one is due.

        done: finished units in total. note: the latest figures, such as a loss; None keeps the figures of the last
        call. A line is due `seconds` (an argument of the constructor) after the last one, and when all units are done;
        none is due if `seconds` is None.
        """
        self.done, self.note = done, self.note if note is None else note
        if self._bar is not None and self._task is not None:
            if self.finished or self.unit == STAGES or monotonic() - self._drawn >= FRAME:
                self._drawn = monotonic()
                self._bar.update(self._task, completed=done, said=self.said(), refresh=not self.alive)
        elif self.seconds is not None and (self.finished or monotonic() - self._said >= self.seconds):
            self.line()

    @property
    def finished(self) -> bool:
        """Whether all units are done; False if their total is unknown."""
        return self.total is not None and self.done >= self.total

    def line(self) -> None:
        """Print the current progress as a line, unless a bar is shown."""
        if self._bar is None:
            self._said = monotonic()
            self.console.print(self.said(), highlight=False, markup=False, soft_wrap=True)

    def said(self) -> str:
        """Return the current progress as text: finished units, the latest note and the time left.

        For a bar of stages (`stages`), it is the number and the name of the current stage.
        """
        if self.unit == STAGES:
            return "done" if self.finished else f"stage {self.done + 1} of {self.total}: {self.note or 'beginning'}"
        of = "" if self.total is None else f" of {self.total:,}"
        return "  ".join(filter(None, (f"{self.done:,}{of} {self.unit}", self.note, self.left())))

    def left(self) -> str:
        """Return the estimated time left, such as "3:05 left"; "" if it is unknown or nothing is left."""
        finished = self.done - self._first
        if self.total is None or finished <= 0 or self.finished:
            return ""
        minutes, seconds = divmod(round((monotonic() - self._began) * (self.total - self.done) / finished), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"

    def close(self) -> None:
        """Stop drawing and release the terminal. It may be called twice, and must be called after an error too."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, said=self.said())
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Begun:
    """A `work` block that has begun.

    unit: plural name of what it counts. bar: its bar; None if it shows none, because it is nested in another block or
    nothing is shown. done: number of units that are done.
    """

    def __init__(self, unit: str, bar: ProgressBar | None) -> None:
        self.unit, self.bar, self.done = unit, bar, 0


_shown = False
_begun: list[_Begun] = []


def show(shown: bool = True) -> None:
    """Show the bars of `work` and the lines of `say` on stderr from now on; a process shows none before it calls this.

    shown: False hides them again. With several processes, only the first (RANK 0) shows anything.
    """
    global _shown
    _shown = shown and os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print the line `text` to stderr if this process has switched progress on by `show`."""
    if _shown:
        print(text, file=sys.stderr)  # noqa: T201


@contextmanager
def work(total: int | None, unit: str, *, alive: bool = True) -> Iterator[None]:
    """Show a progress bar for the work done inside a `with` block, which reports each step by calling `advance`.

    total: number of units of the whole; None if unknown. unit: plural name of what is counted, such as "tokens". alive:
    whether a thread redraws the bar between steps; False where it would disturb what is being timed. A block nested in
    another one shows no bar of its own. Nothing is shown unless `show` was called.
    """
    own = _shown and not _begun
    seconds = 0.0 if unit == STAGES else SECONDS
    begun = _Begun(unit, ProgressBar(total, unit, seconds=seconds, alive=alive) if own else None)
    _begun.append(begun)
    try:
        yield
    finally:
        _begun.remove(begun)
        if begun.bar is not None:
            begun.bar.close()


def advance(unit: str, count: int = 1, note: str | None = None) -> None:
    """Report that `count` more units of the innermost `work` block are done, so that its progress bar moves.

    unit: what is counted; the report is ignored unless `work` was given the same unit. note: the latest figures to show
    beside the bar; None keeps the figures of the last call.
    """
    if _begun and _begun[-1].unit == unit and (bar := _begun[-1].bar) is not None:
        _begun[-1].done += count
        bar.update(_begun[-1].done, note)


@contextmanager
def stages(*names: str) -> Iterator[Iterator[str]]:
    """Show the progress of a few named stages inside a `with` block.

    names: the stages, in their order. Yields an iterator: each call of `next` announces the next stage and returns its
    name.
    """

    def announced() -> Iterator[str]:
        for number, name in enumerate(names):
            advance(STAGES, min(number, 1), name)
            yield name

    with work(len(names), STAGES):
        yield announced()
        advance(STAGES)
