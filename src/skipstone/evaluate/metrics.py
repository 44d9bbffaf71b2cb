"""`RunMetrics`: losses, FLOPs, speeds and cache sizes that `compare` measures of a run, and their rows in its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.evaluate.loaded_run import LoadedRun, batches
from skipstone.evaluate.tables import UNKNOWN, Section, amount, number, percent
from skipstone.measure.flops import FlopCheck, flop_check
from skipstone.measure.losses import MEASURED, measure_loss
from skipstone.measure.overhead import Overhead, overhead
from skipstone.measure.passes import NEEDS_MASKS, NO_CAUSAL_FORM
from skipstone.measure.speed import NOT_MEASURABLE, CacheBytes, Rate, Task, cache_bytes, decode_task, prefill_task
from skipstone.measure.summaries import Summaries
from skipstone.model.causal_lm import SkipstoneForCausalLM

ROWS, SAMPLE = 8, 32  # rows a batch; rows on which capacity is measured
DECODE_BATCHES = (1, 8)
NEW_TOKENS = 32  # at most, while decoding is timed


@dataclass(frozen=True, kw_only=True, eq=False)
class RunMetrics:
    """The figures that `compare` reports of one run.

    name: the run's name. parameters: the model's number of parameters. pass_name: the pass that was measured: executed
    (really skips), oracle (as trained) or forced (keeping the tokens that a synthetic corpus marks as needing depth).
    context: tokens of a row. flops: forward FLOPs per token, counted and predicted. layers: for each block, the figures
    of its mechanisms by the mechanism's name. cache: the cache's bytes per token; None if the model cannot decide
    without later tokens. overhead: the shares of a training step's time that routing and activation mixing take; None
    for a model that is not trained (quantised). result: the content of result.json, which training writes at its end;
    empty for a saved model or unfinished run. rates: timings by task: "prefill", "decode 1", "decode 8" (number of
    rows). accuracy: on a synthetic corpus with these marks, accuracy by bin of difficulty (the number of operations on
    which a token depends); else None.
    """

    name: str
    parameters: int
    pass_name: str
    context: int
    flops: FlopCheck
    layers: list[dict[str, PlainDict]]
    cache: CacheBytes | None
    overhead: Overhead | None
    result: PlainMapping
    rates: Mapping[str, Rate]
    accuracy: Mapping[str, float] | None

    def to_dict(self) -> PlainDict:
        """Return plain values for JSON.

        The keys are "run", "parameters", "decided" (the name of the pass), "context", "flops_per_token", "layers",
        "cache_bytes_per_token", "training_overhead", "training" (the content of result.json), "speed" (by task) and
        "accuracy".
        """
        rates = {
            name: {
                "tokens_per_second": rate.tokens_per_second,
                "spread": rate.spread,
                "each": rate.each,
                "joules_per_token": rate.joules_per_token,
            }
            for name, rate in self.rates.items()
        }
        return {
            "run": self.name,
            "parameters": self.parameters,
            "decided": self.pass_name,
            "context": self.context,
            "flops_per_token": vars(self.flops) | {"agree": self.flops.agree},
            "layers": self.layers,
            "cache_bytes_per_token": None if self.cache is None else vars(self.cache),
            "training_overhead": None if self.overhead is None else vars(self.overhead),
            "training": dict(self.result),
            "speed": rates,
            "accuracy": None if self.accuracy is None else dict(self.accuracy),
        }


def sample_ids(loaded: LoadedRun, rows: int, length: int, others: LoadedRun | None = None) -> Tensor:
    """Return token ids for timing, int64 [rows, length].

    They are the first tokens of the first rows of data of `loaded`, or of `others` if `loaded` has no usable rows: rows
    of at least `length` tokens whose ids fit the model of `loaded`. Rows are repeated if there are too few. Random ids
    are returned if neither has any.
    """
    vocabulary = loaded.model.config.vocab_size
    for source in (loaded, others):
        if source is not None and source.data is not None and source.data.vocab_size <= vocabulary:
            items = (source.data.validation[i]["input_ids"] for i in range(min(rows, len(source.data.validation))))
            full = [ids[:length] for ids in items if len(ids) >= length]
            if full:
                return torch.stack([full[i % len(full)] for i in range(rows)]).to(loaded.model.device)
    drawn = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(loaded.model.device)


def speed_tasks(loaded: LoadedRun, ids_BT: Tensor) -> dict[str, Task]:
    """Return the timing tasks of a model by name: "prefill" of one row, "decode 1" and "decode 8" of 1 and 8 rows.

    loaded: the run; the result is empty if its model cannot decide without later tokens. ids_BT: int64, at least 8 rows
    of T tokens; the first half of a row is the prompt.
    """
    if "executed" not in loaded.passes:
        return {}
    half = max(ids_BT.shape[1] // 2, 1)
    new = min(NEW_TOKENS, half)
    decoding = {f"decode {rows}": decode_task(loaded.model, ids_BT[:rows, :half], new) for rows in DECODE_BATCHES}
    return {"prefill": prefill_task(loaded.model, ids_BT[:1]), **decoding}


def run_metrics(loaded: LoadedRun, others: LoadedRun | None, rates: Mapping[str, Rate]) -> RunMetrics:
    """Measure all figures of a run except its speeds, which `compare` times for all runs in turns.

    loaded: the run. others: a run whose text is used if `loaded` has none; None means random tokens. rates: the speeds,
    by task ("prefill", "decode 1", "decode 8"). Raises ValueError for a model that needs the caller to say which tokens
    to keep, on data that do not mark them.
    """
    model, forward = loaded.model, loaded.primary
    ids_BT = sample_ids(loaded, ROWS, loaded.context, others)
    trained = loaded.passes.get("oracle", forward)
    statistics = Summaries(model, activation_rows=0)
    sample = _sample(loaded, ids_BT)
    for batch in sample:
        statistics.add(forward.run(model, batch, output_records=True).records or ())
    return RunMetrics(
        name=loaded.run.name,
        parameters=model.num_parameters(),
        pass_name=forward.name,
        context=loaded.context,
        flops=flop_check(model, forward, sample[:1]),
        layers=statistics.layers(),
        cache=cache_bytes(model, ids_BT) if "executed" in loaded.passes else None,
        overhead=overhead(model, trained, sample[0]) if is_trainable(model) else None,
        result=loaded.run.result() if loaded.run.finished and not loaded.run.is_saved_model else {},
        rates=rates,
        accuracy=_accuracy(loaded),
    )


def is_trainable(model: SkipstoneForCausalLM) -> bool:
    """Return whether a model can take a training step.

    It cannot if its weights are quantised, or if its output head computes exact logits for a few tokens only.
    """
    return model.config.weight_format == "float" and model.head_preview is None


def _sample(loaded: LoadedRun, ids_BT: Tensor) -> list[dict[str, Tensor]]:
    if loaded.data is None:
        return [{"input_ids": ids_BT}]
    return list(batches(loaded.data, ROWS, loaded.model.device, rows=SAMPLE))


def _accuracy(loaded: LoadedRun) -> Mapping[str, float] | None:
    """Return the accuracy by difficulty on all evaluation rows; None for data without a known difficulty."""
    if loaded.data is None or not loaded.data.config.tells_difficulty:
        return None
    rows = batches(loaded.data, ROWS * 4, loaded.model.device)
    return measure_loss(loaded.model, loaded.primary, rows, activations=False).accuracy


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


CELLS: dict[str, Cell] = {
    "parameters": lambda run: amount(run.parameters),
    "validation loss, oracle": lambda run: number(_trained("validation", "oracle_loss")(run)),
    "validation loss, causal": lambda run: number(_trained("validation", "causal_loss")(run)),
    "routing, rows below": lambda run: run.pass_name,
    "forward FLOPs/token": _counted,
    "of the dense model's": lambda run: percent(run.flops.share),
    "host syncs/forward": lambda run: number(run.flops.syncs, 1),
    "training tokens/s": lambda run: amount(_trained("tokens_per_second")(run)),
    "router + gather, of a step": lambda run: percent(None if run.overhead is None else run.overhead.routing),
    "activation mixing, of a step": lambda run: percent(None if run.overhead is None else run.overhead.activation),
    "prefill tokens/s, batch 1": _rate("prefill"),
    **{f"decode tokens/s, batch {rows}": _rate(f"decode {rows}") for rows in DECODE_BATCHES},
    "KV bytes/token": _cache("kv"),
    "mechanisms' cache bytes/token": _cache("state"),
    "allocated cache bytes/token": _cache("allocated"),
    "joules/token, decode, batch 1": _joules("decode 1"),
    "joules/token, prefill": _joules("prefill"),
}


def main_section(runs: Sequence[RunMetrics]) -> Section:
    """Tabulate metrics as rows and runs as columns.

    runs: the measured runs. A metric that no run has is left out; one that cannot be measured on this machine is named
    in a note instead.
    """
    rows, notes = [], []
    for name, cell in CELLS.items():
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
    """Tabulate by block the share of tokens that each depth mechanism keeps of those that reach it, one column per run.

    runs: the measured runs. None if no run has depth mechanisms.
    """
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
    """Tabulate accuracy by difficulty, and the share of the gap between dense and forced accuracy that each run closes.

    runs: the runs whose accuracies are placed in the gap. dense: a run without routing. forced: a run that keeps the
    tokens marked as needing depth. Difficulty is the number of operations on which a token of a synthetic corpus
    depends. captured: the shares, {run: {bin of difficulty: share}}.
    """
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
