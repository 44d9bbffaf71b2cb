"""The rows of `compare`'s table: how each figure is called and written, once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from skipstone.evaluate.metrics import DECODE_BATCHES, RunMetrics
from skipstone.evaluate.tables import UNKNOWN, Section, amount, number, percent
from skipstone.measure.accuracy import MEASURED
from skipstone.measure.energy import NOT_MEASURABLE
from skipstone.measure.passes import NEEDS_MASKS, NO_CAUSAL_FORM

NOTHING = percent(0.0)
Cell = Callable[[RunMetrics], str]


def _trained(*path: str) -> Callable[[RunMetrics], float | None]:
    def get(run: RunMetrics) -> float | None:
        value: Any = run.result
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return get


def _counted(run: RunMetrics) -> str:
    e = run.flops
    if e.unknown:
        return f"{amount(e.counted)} + ?"
    return amount(e.counted) if e.agree else f"{amount(e.counted)} (cost: {amount(e.predicted)})"


def _rate(name: str) -> Cell:
    def cell(run: RunMetrics) -> str:
        rate = run.rates.get(name)
        return UNKNOWN if rate is None else f"{amount(rate.tokens_per_second)} ±{rate.spread:.0%}"

    return cell


def _joules(name: str) -> Cell:
    def cell(run: RunMetrics) -> str:
        rate = run.rates.get(name)
        if rate is None:
            return UNKNOWN
        return NOT_MEASURABLE if rate.joules_per_token is None else f"{rate.joules_per_token:.3g}"

    return cell


def _cache(field: str) -> Cell:
    return lambda run: UNKNOWN if run.cache is None else amount(getattr(run.cache, field))


ROWS: dict[str, Cell] = {
    "parameters": lambda run: amount(run.parameters),
    "validation loss, oracle": lambda run: number(_trained("validation", "oracle_loss")(run)),
    "validation loss, causal": lambda run: number(_trained("validation", "causal_loss")(run)),
    "routing, rows below": lambda run: run.pass_name,
    "forward FLOPs/token": _counted,
    "of the dense model's": lambda run: percent(run.flops.share),
    "host syncs/forward": lambda run: number(run.flops.syncs, 1),
    "training tokens/s": lambda run: amount(_trained("tokens_per_second")(run)),
    "router + gather, of a step": lambda run: percent(run.overhead.routing),
    "activation mixing, of a step": lambda run: percent(run.overhead.activation),
    "prefill tokens/s, batch 1": _rate("prefill"),
    **{f"decode tokens/s, batch {rows}": _rate(f"decode {rows}") for rows in DECODE_BATCHES},
    "KV bytes/token": _cache("kv"),
    "mechanisms' cache bytes/token": _cache("state"),
    "allocated cache bytes/token": _cache("allocated"),
    "joules/token, decode, batch 1": _joules("decode 1"),
    "joules/token, prefill": _joules("prefill"),
}


def main_section(runs: Sequence[RunMetrics]) -> Section:
    """Metrics as rows, runs as columns. A row that says nothing of any run is left out, or said once below."""
    rows, notes = [], []
    for name, cell in ROWS.items():
        cells = [cell(run) for run in runs]
        said = {text for text in cells if text != UNKNOWN}
        if said == {NOT_MEASURABLE}:
            notes.append(f"{name}: {NOT_MEASURABLE}")
        elif said and said != {NOTHING}:
            rows.append([name, *cells])
    columns = ["", *(run.name for run in runs)]
    return Section(title="comparison", columns=columns, rows=rows, notes=[*notes, *_notes(runs)])


def _notes(runs: Sequence[RunMetrics]) -> Iterator[str]:
    agree = all(run.flops.agree for run in runs)
    yield f"FLOPs are counted while executing and {'equal' if agree else 'DO NOT all equal'} the cost model's."
    for run in runs:
        if run.pass_name == "oracle":
            yield f"{run.name}: {NO_CAUSAL_FORM}, so it cannot generate; its figures are those of training's decisions."
        elif run.pass_name == "forced":
            yield f"{run.name}: {NEEDS_MASKS}, so it cannot generate; its figures are those of the known difficulty."


def capacity_section(runs: Sequence[RunMetrics]) -> Section | None:
    """Kept share of asked tokens by layer and mechanism; None without any depth mechanism."""
    names = {
        (i, name): None
        for run in runs
        for i, layer in enumerate(run.layers)
        for name, figures in layer.items()
        if "capacity" in figures
    }
    if not names:
        return None
    rows = [[f"{i} {name}", *(_capacity(run, i, name) for run in runs)] for i, name in sorted(names)]
    return Section(title="kept tokens by layer", columns=["layer, mechanism", *(run.name for run in runs)], rows=rows)


def _capacity(run: RunMetrics, layer: int, name: str) -> str:
    figures = run.layers[layer].get(name) if layer < len(run.layers) else None
    return UNKNOWN if figures is None else percent(figures["capacity"])


def headroom_section(
    runs: Sequence[RunMetrics], dense: RunMetrics, forced: RunMetrics, captured: Mapping[str, Mapping[str, float]]
) -> Section:
    """Accuracy by difficulty of every run and both twins, and the headroom that each run captured."""
    rows = []
    for run in (dense, forced, *runs):
        accuracy = run.accuracy or {}
        rows.append([f"{run.name}, {run.pass_name}: right", *(percent(accuracy.get(b)) for b in MEASURED)])
    for name, found in captured.items():
        rows.append([f"{name}: headroom captured", *(percent(found[b], 0) for b in MEASURED)])
    flops = {run.name: run.flops.counted for run in (dense, forced, *runs)}
    each = ", ".join(f"{name} {amount(value)}" for name, value in flops.items())
    return Section(
        title=f"Reset-S3: (learned - {dense.name}) / ({forced.name} - {dense.name}), by operations since the reset",
        columns=["", *MEASURED],
        rows=rows,
        notes=[f"compares at equal executed FLOPs per token only: {each}"],
    )
