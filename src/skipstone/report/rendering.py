"""`write_report`: write one self-contained HTML file about one or more run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from skipstone.core.atomic_write import write_whole
from skipstone.core.progress_bar import advance, work
from skipstone.report.budget_chart import read_budgets
from skipstone.report.report_page import Pieces, context
from skipstone.report.run_view import load_view, map_view
from skipstone.report.templating import environment, script
from skipstone.runs import Run, distinct_names


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    names: Sequence[str] | None = None,
    samples: Mapping[str, Pieces] | None = None,
    evaluations: Sequence[Path] = (),
    traces: Sequence[Path] = (),
    replace: bool = False,
) -> Path:
    """Write one self-contained HTML page about runs, which fetches nothing, and return its path.

    runs: run folders. out: the file to write. names: the runs' names on the page; None means the names of their
    folders. samples: generated text by name of the run, as pairs of a piece of text and the share of the blocks'
    computation that was executed for it, in [0, 1]. evaluations: files of `skipstone eval --budget --json`, whose
    losses by budget are drawn. traces: files of `skipstone trace`, whose tokens are drawn beside those of the runs.
    replace: whether an existing file may be overwritten. Raises FileExistsError if `out` exists and may not be
    overwritten, FileNotFoundError for a folder that does not exist, and ValueError for no runs and for evaluations of
    runs that are not on the page.
    """
    out = Path(out)
    if not runs:
        raise ValueError("a report needs at least one run")
    if out.exists() and not replace:
        raise FileExistsError(f"{str(out)!r} exists already; nothing is overwritten; name another file or remove it")
    titles = list(names) if names is not None else distinct_names([Path(run) for run in runs])
    opened = [Run(Path(run)) for run in runs]
    measured = read_budgets(evaluations, opened, titles)
    maps = [map_view(path, len(opened) + i) for i, path in enumerate(traces)]
    shown = []
    with work(len(opened), "runs"):
        for i, (run, name) in enumerate(zip(opened, titles, strict=True)):
            shown.append(load_view(run, name, i))
            advance("runs", note=name)
    html = environment().get_template("page.html").render(**context(shown, samples or {}, measured, maps), **script())
    write_whole(out, html)
    return out
