"""The ledger: costs and claims of all records, as two tables for the README of the results.

The FLOPs of a record are those that its grid counted, else three times the executed forward FLOPs per token (one
forward and two for backward) times the number of tokens. Gates that are trained soft compute everything, so their
training took more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies import readme
from skipstone_studies import record as records
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.intervals import Claim, Verdict
from skipstone_studies.isoflop.run import PLAN, load
from skipstone_studies.isoflop.table import claims as grid_claims
from skipstone_studies.page import figures_of, groups, lookup
from skipstone_studies.record import Record

FEW = 3  # up to so many arms are named
COMPUTE, CLAIMS = "compute", "claims"  # names of the marks in the README
CHANGES: dict[Verdict, str] = {
    "no headroom": "a text or a training length on which depth pays",
    "inconclusive": "more seeds, or less noise",
}
SCALE = "another scale"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The cost of one run's training: tokens, hours, FLOPs and parameters.

    hours: of a core, or of the GPU. None where the record does not contain it.
    """

    tokens: float
    hours: float
    flops: float | None
    parameters: float | None
    gpu: bool


def compute_of(record: Record) -> Compute | None:
    """Return the cost of a record's training; None if nothing was trained or the record does not contain it."""
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
    """Return a Markdown table of the costs of every study with records in `out`."""
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
    section = Section(title="Compute", columns=columns, rows=[*rows, _row("**all**", everything)], notes=[note])
    return markdown([section]).partition("\n\n")[2].strip("\n")


def names(out: Path) -> list[str]:
    """Return the names of all studies with records in `out`."""
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


def claims(out: Path) -> str:
    """Return a Markdown table of every claim judged by rule, with its verdicts by arm and what would change them."""
    columns = ["study", "claim, by rule", "verdicts", "seeds", "largest model", "FLOPs", "what would change it"]
    rows = [[name, *row] for name in names(out) for row in _claims(out, name)]
    return markdown([Section(title="Claims", columns=columns, rows=rows)]).partition("\n\n")[2].strip("\n")


def _claims(out: Path, name: str) -> Iterator[list[str]]:
    if (out / name / PLAN).is_file():
        collected = load(out, name)
        of = records.read_all(out, name)
        yield from _judged(grid_claims(collected), of, f"1, {collected.grid.spec.optimum_seeds} at each optimum")
        return
    study = STUDIES[name]
    if study.claims is not None:
        for current in groups(study, records.read_all(out, name)):
            seeds = str(len({record.seed for record in current}))
            yield from _judged(study.claims(figures_of(study, current)), current, seeds)


def _judged(found: Iterable[Claim], of: Sequence[Record], seeds: str) -> Iterator[list[str]]:
    by_text: dict[str, dict[Verdict, list[str]]] = {}
    for claim in found:
        by_text.setdefault(claim.text, {}).setdefault(claim.verdict, []).append(claim.arm)
    taken = [one for one in map(compute_of, of) if one is not None]
    largest = max((one.parameters or 0 for one in taken), default=0)
    flops = sum(one.flops or 0 for one in taken)
    for text, verdicts in by_text.items():
        shown = [f"{verdict} {_arms(arms)}" for verdict, arms in verdicts.items()]
        change = next((told for verdict, told in CHANGES.items() if verdict in verdicts), SCALE)
        yield [text, ", ".join(shown), seeds, f"{largest / 1e6:.3f} M", f"{flops:.1e}", change]


def _arms(arms: Sequence[str]) -> str:
    return f"({'; '.join(arms)})" if len(arms) <= FEW else f"({len(arms)} arms)"


def write(out: Path) -> Path:
    """Write both tables into OUT/README.md, between their marks. Raises ValueError if it has no such marks."""
    path = out / "README.md"
    for name, text in ((COMPUTE, compute(out)), (CLAIMS, claims(out))):
        readme.check(path, name)
        readme.write_between(path, name, text)
    return path
