"""`reproduce`: train and measure those runs of a study that have no record yet, and render its page."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

from rich.console import Console

from skipstone.core.atomic_write import write_whole
from skipstone.core.lock import locked
from skipstone.core.strict import choose
from skipstone.evaluate.tables import rich_table
from skipstone.report.rendering import write_report
from skipstone.runs import METRICS
from skipstone_studies import readme as readmes
from skipstone_studies import record as records
from skipstone_studies import side_by_side, study_page
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.corpus import first_available
from skipstone_studies.page import figures_of, groups, pictures, render, terminal
from skipstone_studies.record import Record
from skipstone_studies.session import Session
from skipstone_studies.study import RecipeDict, Study

RUNS = Path("runs")  # default folder of runs and tables, ignored by git


def describe() -> dict[str, str]:
    """Return {name: purpose} for every study; the purpose is one line."""
    return {name: study.purpose for name, study in STUDIES.items()}


def reproduce(
    name: str,
    *,
    scale: str = "laptop",
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    out: Path | None = None,
    runs: Path = RUNS,
    readme: Path | None = None,
    render_only: bool = False,
    jobs: int = 1,
    html: bool = False,
) -> Path:
    """Run what is not yet recorded of a study, write its page OUT/NAME.md, and return the path of the page.

    name: the name of the study. scale: "laptop", "paper" or "quick", as far as the study has them. arms: names of the
    arms (compared recipes) to run; None means all. The page shows all arms that are recorded. seeds: the seeds to run;
    None means the study's own. out: folder of pages and records (results of runs, one file each); None means `runs`.
    runs: parent folder of the run folders. readme: a file into which the table is written, too, between `<!--
    NAME:begin -->` and `<!-- NAME:end -->`. render_only: whether to train and measure nothing. jobs: number of arms
    that run at a time, each in a process of its own, as several small models fit on one GPU. html: whether to write
    OUT/NAME.html as well, with pictures of the table and the claims. Recorded runs are not run again, and arms that
    another process is running are left out with a message. Raises ValueError for unknown names, scales and arms, seeds
    that are negative or given twice, jobs below 1, a timing with several jobs, unreadable records, and if there is no
    record to show; at the end, if arms have failed.
    """
    study = choose("study", name, STUDIES)
    chosen = _seeds(study, scale, seeds)
    if readme is not None:
        readmes.check(readme, name)
    out, console = runs if out is None else out, Console(stderr=True)
    failures = [] if render_only else _run(study, scale, arms, chosen, runs, out, console, jobs)
    with locked(table_path(out, name), wait=True):  # another process may be rendering what it has run
        found = records.read_all(out, name)
        if not found and not failures:
            raise ValueError(f"no records of {name!r} in {str(out)!r}: nothing to render")
        if found:
            _publish(study, scale, found, out, readme)
            if html:
                write_whole(out / f"{name}.html", study_page.render(study, found))
    if failures:
        raise ValueError(f"{len(failures)} of {name}'s runs failed: {'; '.join(failures)}")
    return table_path(out, name)


def _seeds(study: Study, scale: str, seeds: Sequence[int] | None) -> list[int]:
    own = choose(f"scale of study {study.name!r}", scale, study.seeds)
    chosen = list(own if seeds is None else seeds)
    if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be at least one seed, none negative, none twice; got {chosen}")
    return chosen


def _run(
    study: Study,
    scale: str,
    only: Sequence[str] | None,
    seeds: list[int],
    runs: Path,
    out: Path,
    console: Console,
    jobs: int,
) -> list[str]:
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    only = None if only is None else named_arms(only, study.arms(scale))
    for arm in only or ():
        choose(f"arm of {study.name!r}", arm, study.arms(scale))
    corpus, reason = first_available(study.corpora)
    if reason:
        console.print(f"using {corpus}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    arms = study.recipes(scale, corpus)
    session = Session(study=study, scale=scale, arms=arms, only=only, runs=runs, out=out, console=console)
    done, total = session.finished(seeds), len(arms) * len(seeds)
    session.say(f"{study.purpose} ({done} of {total} runs recorded)")
    try:
        if jobs == 1:
            session.run(seeds)
        else:
            side_by_side.run(session, seeds, jobs)
    except (KeyboardInterrupt, SystemExit):
        session.say("stopped; repeat the command to continue")
        raise
    _report(session, arms, seeds[0])
    return session.failures


def named_arms(words: Sequence[str], known: Container[str]) -> list[str]:
    """Return the names of arms (compared recipes) in a comma-separated list; names may contain commas themselves.

    words: the list, split at every comma. known: all names of arms. A part that belongs to no known name is returned by
    itself.
    """
    rest, found = list(words), []
    while rest:
        ends = (end for end in range(len(rest), 0, -1) if end == 1 or ", ".join(rest[:end]) in known)
        end = next(ends)
        found.append(", ".join(rest[:end]))
        rest = rest[end:]
    return found


def _report(session: Session, arms: dict[str, RecipeDict], seed: int) -> None:
    """Write the report of the run folders of one seed (`write_report`) as report.html beside them.

    arms: the recipes by name.
    """
    found = {arm: record for arm in arms if (record := session.recorded(arm, seed)) is not None}
    here = {arm: session.folder(arm, seed) for arm in found if (session.folder(arm, seed) / METRICS).is_file()}
    if not here:
        return
    samples = {arm: _sample(record) for arm, record in found.items() if "sample" in record.figures}
    path = session.runs / session.study.name / session.scale / "report.html"
    write_report(list(here.values()), path, names=list(here), samples=samples, replace=True)
    session.say(f"report: {path}")


def _sample(record: Record) -> list[tuple[str, float]]:
    sample = record.figures["sample"]
    return [(sample["prompt"], 0.0), *((text, compute) for text, compute in sample["pieces"])]


def table_path(out: Path, name: str) -> Path:
    """Return the path of the page of the study `name`, OUT/NAME.md, for the folder `out`."""
    return out / f"{name}.md"


def _publish(study: Study, scale: str, found: Sequence[Record], out: Path, readme: Path | None) -> None:
    """Write the study's page, print the table of `scale`, and write it into the README if one is given.

    found: the study's records. out: folder of the page. readme: path of the README, or None.
    """
    write_whole(table_path(out, study.name), render(study, found))
    for file, drawing in pictures(study, found).items():
        write_whole(out / file, drawing)
    for current in groups(study, found, scale):
        Console().print(rich_table([terminal(study, current)]))
        if study.closing is not None:
            text = study.closing(scale, figures_of(study, current))
            Console().print(text, markup=False, highlight=False, soft_wrap=True)
        if readme is not None:
            readmes.write(readme, study, current)
