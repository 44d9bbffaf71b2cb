"""Renders the page of a study as Markdown, from its records (one JSON file per run) alone.

Equal records give equal bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipstone.core.strict import PlainMapping
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies.record import Record, digest
from skipstone_studies.study import SCALES, Column, Study

SPREAD = "Mean ± standard deviation over seeds."
OTHER_SESSION = "The arms of a seed were not all timed in one session, so their speeds are less comparable."


def render(study: Study, records: Sequence[Record]) -> str:
    """Return the page of a study, results/NAME.md, as Markdown, made from its records alone.

    A record is the stored result of one run. study: the study. records: all records of the study. Records of
    configurations that the study no longer has are left out, and counted at the end of the page.
    """
    parts = [f"# {study.name}", study.purpose, study.about]
    shown = 0
    for current in groups(study, records):
        parts += [f"## {heading(current)}", *_section(study, current)]
        shown += len(current)
    parts.append(left_out(shown, len(records)))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def left_out(shown: int, known: int) -> str:
    """Return a sentence on records (stored results of runs) that a study's page leaves out; "" if there are none.

    shown: number of records that the page shows. known: number of all records.
    """
    return f"{known - shown} records of other configurations are left out." if shown < known else ""


def groups(study: Study, records: Sequence[Record], scale: str | None = None) -> Iterable[list[Record]]:
    """Yield the records of each table of a study: one table for every scale and corpus that has records.

    A record is the stored result of one run. study: the study. records: all records of the study. scale: the only scale
    (size of the study, such as "laptop") to yield; None means all.
    """
    for name in (name for name in SCALES if name in study.seeds and scale in (None, name)):
        for arms in study.variants(name):
            if current := current_records(arms, [record for record in records if record.scale == name]):
                yield current


def current_records(arms: Mapping[str, PlainMapping], records: Iterable[Record]) -> list[Record]:
    """Return the records that were made with the arms' current recipes, ordered by arm (compared recipe) and seed.

    A record is the stored result of one run. arms: the recipe of each arm, by name, without seeds. records: records of
    the study. Records that were converted from the output of earlier scripts have no recipe and are included.
    """
    order = list(arms)
    kept = [r for r in records if r.arm in arms and (r.converted is not None or r.digest == digest(arms[r.arm]))]
    return sorted(kept, key=lambda record: (order.index(record.arm), record.seed))


def heading(records: Sequence[Record]) -> str:
    """Return the heading of one part of a study's page: scale and corpora, such as `laptop, tiny-shakespeare`.

    records: the stored results of the runs that this part shows, at least one.
    """
    corpora = dict.fromkeys(record.config.get("data", {}).get("corpus") for record in records)
    return ", ".join([records[0].scale, *(str(corpus) for corpus in corpora if corpus)])


def _section(study: Study, records: Sequence[Record]) -> list[str]:
    details = [] if study.details is None else [study.details(figures_of(study, records))]
    images = [f"![{study.purpose}: {name}]({file})" for file, name in _files(study, records).items()]
    return [block(study, records), *images, *details, provenance(records)]


def pictures(study: Study, records: Sequence[Record]) -> dict[str, str]:
    """Return the SVG files that belong to a study's page, {file name: SVG text}.

    study: the study. records: the stored results of its runs.
    """
    found: dict[str, str] = {}
    for current in groups(study, records):
        drawn = {} if study.pictures is None else study.pictures(figures_of(study, current))
        found |= {file: drawn[name] for file, name in _files(study, current).items()}
    return found


def _files(study: Study, records: Sequence[Record]) -> dict[str, str]:
    """Return the SVG files that belong to a table, {file name: name of the picture in `Study.pictures`}."""
    drawn = {} if study.pictures is None else study.pictures(figures_of(study, records))
    scale = "" if records[0].scale == SCALES[0] else f"-{records[0].scale}"
    return {f"{study.name}{scale}-{name}.svg": name for name in drawn}


def block(study: Study, records: Sequence[Record]) -> str:
    """Return the table of one scale and corpus as Markdown, with its notes and the command that makes it.

    study: the study. records: the stored results of its runs of one scale (size, such as "laptop") and corpus, at least
    one.
    """
    columns = [(column, _cells(column, figures_of(study, records))) for column in study.columns]
    section = Section(
        title=heading(records),
        columns=["arm", *(column.title for column, _ in columns)],
        rows=[[arm, *(_marked(cells[arm]) for _, cells in columns)] for arm in _arms(records)],
        notes=_notes(study, records),
    )
    # The page has a heading above the table already; drop that of `markdown`.
    text = markdown([section]).partition("\n\n")[2]
    return text.strip("\n") + f"\n\n`{command(records)}`"


def terminal(study: Study, records: Sequence[Record]) -> Section:
    """Return the table of one scale and corpus for a terminal: compared recipes as columns, figures as rows.

    study: the study. records: the stored results of its runs of one scale (size, such as "laptop") and corpus, at least
    one. Ratios to the first recipe are on rows of their own.
    """
    rows = []
    for column in study.columns:
        cells = _cells(column, figures_of(study, records))
        rows.append([column.title, *(cell.text for cell in cells.values())])
        if any(cell.ratio for cell in cells.values()):
            rows.append([f"  × {_arms(records)[0]}", *(cell.ratio for cell in cells.values())])
    return Section(title=heading(records), columns=["", *_arms(records)], rows=rows, notes=_notes(study, records))


def _arms(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.arm for record in records))


def figures_of(study: Study, records: Sequence[Record]) -> dict[str, dict[int, PlainMapping]]:
    """Return the figures of a study's runs, {arm: {seed: figures}}, and the figures that the study derives from them.

    An arm is a compared recipe; derived figures are entries of its figures. study: the study. records: the stored
    results of its runs of one scale (size, such as "laptop") and corpus.
    """
    found: dict[str, dict[int, PlainMapping]] = {record.arm: {} for record in records}
    for seed in sorted({record.seed for record in records}):
        of_seed: dict[str, PlainMapping] = {r.arm: r.figures for r in records if r.seed == seed}
        derived = {} if study.derive is None else study.derive(of_seed)
        for arm, figures in of_seed.items():
            found[arm][seed] = {**figures, **derived.get(arm, {})}
    return found


def lookup(figures: PlainMapping, key: str) -> float | None:
    """Return the number at a dotted path in nested figures; None if there is none or it is not finite.

    key: the path, such as "training.tokens".
    """
    at: Any = figures
    for step in key.split("."):
        if not isinstance(at, Mapping) or step not in at:
            return None
        at = at[step]
    return float(at) if isinstance(at, (int, float)) and math.isfinite(at) else None


def column_values(column: Column, seeds: Mapping[int, PlainMapping]) -> list[float]:
    """Return the figure of a compared recipe in a column for every seed that has it, divided by the column's unit.

    column: the column, with the path of its figure and its unit. seeds: the recipe's figures by seed. For a column with
    a spread, the figure is the median.
    """
    key = f"{column.key}.median" if column.spread else column.key
    return [value / column.unit for figures in seeds.values() if (value := lookup(figures, key)) is not None]


def _range(column: Column, seeds: Mapping[int, PlainMapping]) -> str:
    """Return the text ` (min to max)` of a column with a spread: the least and greatest figure of all seeds of an arm.

    seeds: the figures of the arm by seed.
    """
    ends = []
    for end, best in (("min", min), ("max", max)):
        found = [value for figures in seeds.values() if (value := lookup(figures, f"{column.key}.{end}")) is not None]
        ends += [_shown(best(found) / column.unit, column.format)] if found else []
    return f" ({' to '.join(ends)})" if ends else ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a study's table.

    text: mean and spread. ratio: the ratio of the mean to that of the first of the compared recipes; "" if the column
    shows none. best: whether it is the best of its column.
    """

    text: str
    ratio: str = ""
    best: bool = False


def _cells(column: Column, figures: Mapping[str, Mapping[int, PlainMapping]]) -> dict[str, Cell]:
    values = {arm: column_values(column, seeds) for arm, seeds in figures.items()}
    means = {arm: statistics.fmean(found) for arm, found in values.items() if found}
    first, best = next(iter(values)), None
    if column.better is not None and len(means) > 1:
        best = (min if column.better == "low" else max)(means.values())
    cells = {}
    for arm, found in values.items():
        compared = column.relative and arm in means and arm != first and means.get(first)
        cells[arm] = Cell(
            text=mean_and_spread(found, column.format) + (_range(column, figures[arm]) if column.spread else ""),
            ratio=f"{means[arm] / means[first]:.2f}" if compared else "",
            best=best is not None and means.get(arm) == best,
        )
    return cells


def _marked(cell: Cell) -> str:
    text = f"{cell.text} ({cell.ratio}×)" if cell.ratio else cell.text
    return f"**{text}**" if cell.best else text


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """Format values as their mean and standard deviation, `1.234 ± 0.005`; a single one as `1.234`; none as a dash.

    form: a format specification, as for Python's format().
    """
    if not values:
        return UNKNOWN
    mean = _shown(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {_shown(statistics.stdev(values), form)}"


def _shown(value: float, form: str) -> str:
    return format(round(value) if form.endswith("d") else value, form)


def _notes(study: Study, records: Sequence[Record]) -> list[str]:
    seeds = sorted({record.seed for record in records})
    counts = {arm: sum(r.arm == arm for r in records) for arm in dict.fromkeys(r.arm for r in records)}
    some = "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    notes = [f"{some} ({', '.join(map(str, seeds))})." + (f" {SPREAD}" if len(seeds) > 1 else "")]
    short = [f"{arm} {count}" for arm, count in counts.items() if count < len(seeds)]
    notes += [f"Fewer seeds so far: {', '.join(short)}."] if short else []
    missing = [arm for arm in study.arms(records[0].scale) if arm not in counts]
    notes += [f"Not run yet: {'; '.join(missing)}."] if missing else []
    sessions: dict[int, set[str]] = {}
    for record in records:
        sessions.setdefault(record.seed, set()).add((record.timing_session or {}).get("time", ""))
    return notes + ([OTHER_SESSION] if any(len(times) > 1 for times in sessions.values()) else [])


def command(records: Sequence[Record]) -> str:
    """Return the shell command that reproduces all of these records (stored results of runs) of one study."""
    base = min(record.command for record in records)
    return f"{base} --seeds {','.join(map(str, sorted({record.seed for record in records})))}"


def provenance(records: Sequence[Record]) -> str:
    """Return a sentence with the versions, commits and machines of these records (stored results of runs)."""
    made = dict.fromkeys(_made_with(record.environment) for record in records)
    text = "Made with " + "; and with ".join(made) + "."
    files = dict.fromkeys(record.converted["file"] for record in records if record.converted is not None)
    if files:
        named = "`, `".join(files)
        text += (
            f"\n\nConverted from `{named}`, the output of an earlier script; the records have no digest until they are "
            "measured again."
        )
    return text


def _made_with(environment: PlainMapping) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in ("skipstone", "torch", "transformers", "python"))
    commit = environment.get("git_commit")
    state = " with uncommitted changes" if environment.get("git_dirty") else ""
    machine = environment["machine"]
    place = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    gpu = f", {machine['gpu']}{_precision(environment)}" if machine.get("gpu") else ""
    gpu += f", {environment['jobs']} arms at a time" if environment.get("jobs") else ""
    return f"{versions}, {f'commit {commit[:12]}{state}' if commit else 'commit unknown'}, on {place}{gpu}"


def _precision(environment: PlainMapping) -> str:
    """Return text on the precision in which the GPU multiplied fp32 matrices; "" if the record does not say it."""
    found = environment["machine"].get("fp32_products")
    return "" if found is None else f" (fp32 products {'without TF32' if found == 'highest' else f'at {found!r}'})"
