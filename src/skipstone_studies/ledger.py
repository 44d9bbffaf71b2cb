"""The ledger: what all studies cost and what they found, as two tables for the results' README and a page of charts.

A claim is a sentence that a study sets out to test, such as "the loss is below the dense model's"; the second table
lists each with its verdict (yes, no, not told apart) and the seeds and sizes that it rests on.
A record is the stored result of one run of a study. Its FLOPs are the executed training FLOPs that it states (as
studies at equal FLOPs do), else three times the executed forward FLOPs per token (one forward and two for backward)
times the number of tokens. Models whose gates only scale updates in training compute everything there, so their
training took more than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from skipstone.core.atomic_write import write_whole
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies import ledger_page, readme
from skipstone_studies import record as records
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.intervals import Claim, Verdict
from skipstone_studies.isoflop.run import PLAN, load
from skipstone_studies.isoflop.table import claims as grid_claims
from skipstone_studies.page import figures_of, groups, lookup
from skipstone_studies.record import Record

PAGE = "ledger.html"
FEW = 3  # up to so many arms are named
COMPUTE, CLAIMS = "compute", "claims"  # names of the marks in the README
CHANGES: dict[Verdict, str] = {
    "no headroom": "a text or a training length on which depth pays",
    "inconclusive": "more seeds, or less noise",
}
SCALE = "another scale"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The cost of one run's training.

    tokens: number of tokens read in training. hours: GPU hours if it ran on a GPU, else core hours. flops: FLOPs of the
    training, or None. parameters: number of parameters of the model, or None. None means that the run's record (stored
    result) does not say. gpu: whether it ran on a GPU.
    """

    tokens: float
    hours: float
    flops: float | None
    parameters: float | None
    gpu: bool


def compute_of(record: Record) -> Compute | None:
    """Return the cost of the training of one run; None if nothing was trained or the record does not say.

    record: the stored result of the run.
    """
    tokens, seconds = (lookup(record.figures, f"training.{name}") for name in ("tokens", "seconds"))
    if tokens is None or seconds is None:
        return None
    machine = record.environment["machine"]
    flops, forward = (
        lookup(record.figures, key) for key in ("training_flops.executed", "evaluation.flops_per_token.counted")
    )
    if flops is None and forward is not None:
        flops = 3 * forward * tokens
    gpu = bool(machine.get("gpu"))
    hours = seconds * (1 if gpu else machine["threads"]) / 3600
    parameters = lookup(record.figures, "training.parameters")
    return Compute(tokens=tokens, hours=hours, flops=flops, parameters=parameters, gpu=gpu)


def compute(out: Path) -> str:
    """Return a Markdown table of the training costs of every study with records (stored results of runs) in `out`.

    out: the folder of all studies' records.
    """
    return without_title(compute_section(out))


def compute_section(out: Path) -> Section:
    """Return the table of the training costs of every study with records (stored results of runs) in `out`.

    out: the folder of all studies' records. The table has a row for each study and a last one with the sums.
    """
    found = {name: [compute_of(record) for record in records.read_all(out, name)] for name in names(out)}
    rows = [_row(name, each) for name, each in found.items()]
    everything = [one for each in found.values() for one in each]
    columns = [
        *("study", "records", "of trainings", "core hours", "GPU hours", "FLOPs", "GFLOP/s per core"),
        "largest run: tokens, parameters",
    ]
    note = (
        "*Of trainings* counts the records that say what the training took. The others are timings, evaluations of a "
        "model that another arm trained, or records converted from an earlier script's output, which did not say it. "
        "FLOPs are three times the executed forward FLOPs per token, times tokens (for isoFLOP grids: by the cost "
        "model with the realised capacities); gates trained soft compute everything in training and took more. "
        "GFLOP/s are these FLOPs divided by the time of the training, on machines that were often shared. "
        "Measurements are not included."
    )
    return Section(title="Compute", columns=columns, rows=[*rows, _row("**all**", everything)], notes=[note])


def without_title(section: Section) -> str:
    """Return the table `section` as Markdown, without its heading."""
    return markdown([section]).partition("\n\n")[2].strip("\n")


def names(out: Path) -> list[str]:
    """Return the names of all studies with records (stored results of runs) in the folder `out`, sorted."""
    return sorted(path.parent.name for path in out.glob("*/records"))


def _row(name: str, found: Sequence[Compute | None]) -> list[str]:
    known = [one for one in found if one is not None]
    counted = [one for one in known if one.flops is not None and not one.gpu]
    flops = sum(one.flops for one in known if one.flops is not None)
    on_cores, on_gpu = (sum(one.hours for one in known if one.gpu is gpu) for gpu in (False, True))
    largest = max(known, key=lambda one: one.flops or 0.0, default=None)
    hours = sum(one.hours for one in counted)
    rate = sum(one.flops for one in counted if one.flops is not None) / hours / 3.6e12 if hours else None
    return [
        name,
        str(len(found)),
        str(len(known)),
        f"{on_cores:.2f}" if on_cores else UNKNOWN,
        f"{on_gpu:.2f}" if on_gpu else UNKNOWN,
        f"{flops:.1e}" if flops else UNKNOWN,
        UNKNOWN if rate is None else f"{rate:.1f}",
        UNKNOWN if largest is None else f"{largest.tokens / 1e6:.2f} M, {(largest.parameters or 0) / 1e6:.3f} M",
    ]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The claims of one table of a study.

    study: name of the study. claims: the claims with their verdicts. records: the stored results of runs from which the
    claims were derived. seeds: the number of seeds of these runs, in words.
    """

    study: str
    claims: Sequence[Claim]
    records: Sequence[Record]
    seeds: str


def claims(out: Path) -> str:
    """Return a Markdown table of every claim of all studies in `out`, with verdicts for each compared recipe.

    The last column says what could change the verdict. out: the folder of all studies' records (stored results of
    runs).
    """
    return without_title(claims_section(judged(out)))


def claims_section(found: Iterable[Judged]) -> Section:
    """Return a table of all claims of studies: a row has the verdicts on one claim and what they are based on.

    Its columns are the study, the claim, the verdicts with the compared recipes that got them, the number of seeds, the
    size of the largest model, the training FLOPs, and what could change the verdict. found: the claims of all studies,
    one entry for each table of a study.
    """
    columns = ["study", "claim, by rule", "verdicts", "seeds", "largest model", "FLOPs", "what would change it"]
    return Section(title="Claims", columns=columns, rows=[[one.study, *row] for one in found for row in _rows(one)])


def judged(out: Path) -> list[Judged]:
    """Return the claims of every study with records in the folder `out`, each judged by its confidence interval.

    out: the folder of all studies' records (stored results of runs). The list has an entry for each table of a study.
    """
    return [one for name in names(out) for one in _judged(out, name)]


def _judged(out: Path, name: str) -> Iterator[Judged]:
    if (out / name / PLAN).is_file():
        collected = load(out, name)
        seeds = f"1, {collected.grid.spec.optimum_seeds} at each optimum"
        of = records.read_all(out, name)
        yield Judged(study=name, claims=list(grid_claims(collected)), records=of, seeds=seeds)
        return
    study = STUDIES[name]
    if study.claims is not None:
        for current in groups(study, records.read_all(out, name)):
            seeds = str(len({record.seed for record in current}))
            found = list(study.claims(figures_of(study, current)))
            yield Judged(study=name, claims=found, records=current, seeds=seeds)


def _rows(found: Judged) -> Iterator[list[str]]:
    by_text: dict[str, dict[Verdict, list[str]]] = {}
    for claim in found.claims:
        by_text.setdefault(claim.text, {}).setdefault(claim.verdict, []).append(claim.arm)
    taken = [one for one in map(compute_of, found.records) if one is not None]
    largest = max((one.parameters or 0 for one in taken), default=0)
    flops = sum(one.flops or 0 for one in taken)
    for text, verdicts in by_text.items():
        shown = [f"{verdict} {_arms(arms)}" for verdict, arms in verdicts.items()]
        change = next((told for verdict, told in CHANGES.items() if verdict in verdicts), SCALE)
        yield [text, ", ".join(shown), found.seeds, f"{largest / 1e6:.3f} M", f"{flops:.1e}", change]


def _arms(arms: Sequence[str]) -> str:
    return f"({'; '.join(arms)})" if len(arms) <= FEW else f"({len(arms)} arms)"


def write(out: Path) -> Path:
    """Write tables of all studies' costs and claims into OUT/README.md, and a page that draws them, OUT/ledger.html.

    out: the folder of all records (stored results of runs), which has the README. There the table of costs replaces
    what is between the marks `<!-- compute:begin -->` and `<!-- compute:end -->`, and the table of claims what is
    between such marks with the word claims. Returns the path of the README. Raises ValueError unless each mark occurs
    once, FileNotFoundError if there is no README.
    """
    path = out / "README.md"
    for name in (COMPUTE, CLAIMS):
        readme.check(path, name)
    costs, found = compute_section(out), judged(out)
    for name, section in ((COMPUTE, costs), (CLAIMS, claims_section(found))):
        readme.write_between(path, name, without_title(section))
    write_whole(out / PAGE, ledger_page.render(costs, claims_section(found), by_study(found)))
    return path


def by_study(found: Iterable[Judged]) -> dict[str, list[Claim]]:
    """Return the claims of each study that has any, by its name.

    found: the claims of all studies, one entry for each table of a study.
    """
    of: dict[str, list[Claim]] = {}
    for one in found:
        of.setdefault(one.study, []).extend(one.claims)
    return {name: claims for name, claims in of.items() if claims}
