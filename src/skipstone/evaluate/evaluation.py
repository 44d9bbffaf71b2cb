"""`evaluate`: measure losses, accuracy, mechanisms and FLOPs of a trained model.

It is measured in each kind of forward pass that it supports, such as one that decides as in training, and one that
really skips tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skipstone.core.progress_bar import work
from skipstone.core.strict import PlainDict
from skipstone.evaluate.budget_curve import AtBudget, at_budgets, budget_section, table_of
from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.evaluate.tables import (
    UNKNOWN,
    Section,
    amount,
    layer_sections,
    markdown,
    number,
    percent,
    plain,
    rich_table,
)
from skipstone.measure.flops import COUNTED_BATCHES, FlopCheck, flop_check
from skipstone.measure.losses import LossResult, measure_hard_mix, measure_loss, mixes_activations

if TYPE_CHECKING:
    from rich.table import Table

    from skipstone.data.prepare import PreparedData
    from skipstone.model.causal_lm import SkipstoneForCausalLM


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The figures of one run on one split of its data.

    A pass is a way to run the model: oracle (routing as in training, which may look at later tokens), causal (decides
    without later tokens, computes all tokens and masks), executed (decides in the same way, computes only kept tokens),
    forced (keeps the tokens that a synthetic corpus marks as needing depth).

    name: the run's name. corpus, split: the data that was read. rows: number of rows of the split. num_bytes: UTF-8
    bytes of their text; None if it is not text. measured: losses and other figures, by the name of the pass.
    unavailable: why a pass is missing, by its name. primary: the pass whose figures represent the model: executed if
    possible, else oracle or forced. flops: FLOPs per token of the primary pass, counted and predicted. notes: remarks
    for the reader. hard_mix: loss of the primary pass if each neuron uses only the activation function with its largest
    mixing weight; None if neurons do not mix functions. budgets: the same model at several FLOP budgets, the first as
    trained; empty unless requested. budget_table: a description of the thresholds for these budgets.
    """

    name: str
    corpus: str
    split: str
    rows: int
    num_bytes: int | None
    measured: dict[str, LossResult]
    unavailable: dict[str, str]
    primary: str
    flops: FlopCheck
    notes: tuple[str, ...]
    hard_mix: LossResult | None = None
    budgets: tuple[AtBudget, ...] = ()
    budget_table: str = ""

    @property
    def executed_minus_causal(self) -> float | None:
        """The loss of the executed pass minus the loss of the causal pass, in nats per prediction.

        Both decide alike, and only the first really skips tokens, so more than rounding is an error. None if the model
        has no such passes.
        """
        if "executed" not in self.measured:
            return None
        return self.measured["executed"].loss - self.measured["causal"].loss

    @property
    def hard_minus_soft(self) -> float | None:
        """The rise of the loss, in nats per prediction, if each neuron uses only its most heavily weighted activation.

        None if neurons do not mix activation functions.
        """
        return None if self.hard_mix is None else self.hard_mix.loss - self.measured[self.primary].loss

    def to_dict(self) -> PlainDict:
        """Return plain values for JSON: losses in nats, FLOPs per token, shares in [0, 1].

        "ways" has the figures of each pass by its name, among them "loss", "perplexity", "bits_per_byte", "accuracy"
        and "layers" (from block 0 on); "lacking" says why other passes are missing; "main" names the primary pass.
        Further keys are "run", "corpus", "split", "rows", "predictions", "bytes", "executed_minus_causal",
        "hard_minus_soft", "flops_per_token", "host_syncs_per_forward", "budgets" and "notes".
        """
        passes = {
            name: {
                "loss": m.loss,
                "perplexity": m.perplexity,
                "bits_per_byte": m.bits_per_byte(self.num_bytes),
                "accuracy": m.accuracy,
                "token_accuracy": m.right / m.predictions,
                "kinds": m.kinds,
                "layers": m.summaries.layers(),
            }
            for name, m in self.measured.items()
        }
        return plain(
            {
                "run": self.name,
                "corpus": self.corpus,
                "split": self.split,
                "rows": self.rows,
                "predictions": self.measured[self.primary].predictions,
                "bytes": self.num_bytes,
                "ways": passes,
                "lacking": self.unavailable,
                "executed_minus_causal": self.executed_minus_causal,
                "hard_minus_soft": self.hard_minus_soft,
                "main": self.primary,
                "flops_per_token": {
                    "counted": self.flops.counted,
                    "cost": self.flops.predicted,
                    "needed": self.flops.needed,
                    "dense": self.flops.dense,
                    "unknown_operations": self.flops.unknown,
                },
                "host_syncs_per_forward": self.flops.syncs,
                "budgets": [vars(point) for point in self.budgets],
                "notes": self.notes,
            }
        )

    def markdown(self) -> str:
        """Return the evaluation's tables in Markdown."""
        return markdown(self._sections())

    def table(self) -> Table:
        """Return the evaluation's tables as an object of rich, for printing on a terminal."""
        return rich_table(self._sections())

    def _sections(self) -> list[Section]:
        layers = self.measured[self.primary].summaries.layers()
        bins = [self._accuracy(), self._kinds()] if self.measured[self.primary].accuracy else []
        budgets = [budget_section(self.budgets, self.budget_table)] if self.budgets else []
        return [self._losses(), *bins, *layer_sections(layers, self.primary), self._cost(), *budgets]

    def _losses(self) -> Section:
        rows = []
        for name in ("oracle", "causal", "executed", "forced"):
            if name in self.measured:
                m = self.measured[name]
                cells = [number(m.loss), number(m.bits_per_byte(self.num_bytes)), number(m.perplexity, 2)]
                rows.append([name, *cells])
            elif name in self.unavailable:
                rows.append([name, self.unavailable[name], UNKNOWN, UNKNOWN])
        gap = self.executed_minus_causal
        notes = [] if gap is None else [f"executed - causal: {gap:+.1e} nats"]
        if self.hard_minus_soft is not None:
            notes.append(f"strongest activation of each neuron alone - mix: {self.hard_minus_soft:+.1e} nats")
        predictions = self.measured[self.primary].predictions
        return Section(
            title=f"{self.name}: {self.corpus}, {self.split}, {self.rows:,} rows, {predictions:,} predictions",
            columns=["routing", "loss (nats)", "bits per byte", "perplexity"],
            rows=rows,
            notes=[*notes, *self.notes],
        )

    def _accuracy(self) -> Section:
        found = {name: m.accuracy for name, m in self.measured.items() if m.accuracy}
        bins = list(found[self.primary])
        return Section(
            title="accuracy by difficulty (operations since the reset)",
            columns=["routing", *bins],
            rows=[[name, *(percent(accuracy[b]) for b in bins)] for name, accuracy in found.items()],
        )

    def _kinds(self) -> Section:
        kinds = self.measured[self.primary].kinds or {}
        return Section(
            title=f"by kind of token, {self.primary}",
            columns=["kind", "loss (nats)", "blocks that update it"],
            rows=[[name, number(found["loss"]), number(found["depth"], 2)] for name, found in kinds.items()],
        )

    def _cost(self) -> Section:
        e = self.flops
        difference = "equal" if e.agree else f"differs by {amount(e.counted - e.predicted)}"
        notes = [f"operations that the counter does not know: {', '.join(e.unknown)}"] if e.unknown else []
        return Section(
            title=f"forward pass, {self.primary}",
            columns=["per token", ""],
            rows=[
                ["FLOPs, counted while it ran", amount(e.counted)],
                ["FLOPs by the cost model, same decisions", f"{amount(e.predicted)} ({difference})"],
                ["of these needed, without filling up shorter rows", amount(e.needed)],
                ["FLOPs without mechanisms", amount(e.dense)],
                ["share of them executed", percent(e.share)],
                ["host syncs a forward pass", number(e.syncs, 1)],
            ],
            notes=notes,
        )


def evaluate(
    run: Path,
    *,
    split: str = "validation",
    batch_size: int = 8,
    corpus: str | None = None,
    context: int | None = None,
    budgets: Sequence[float] = (),
) -> Evaluation:
    """Evaluate a run on a whole split: each token is predicted once, without exploration noise.

    run: a run folder, or a saved model with `corpus`. split: train, validation or test, as far as the corpus has it.
    batch_size: rows of a forward pass. corpus: name of the corpus to evaluate on, such as "enwik8". context: tokens of
    a row. For both, None means the value of the run's recipe. budgets: shares of the dense model's FLOPs at which the
    model is also evaluated, with the thresholds stored beside its weights, or else with thresholds measured on rows
    that are not evaluated. Returns the figures by kind of pass, which can be printed as tables and written as JSON or
    Markdown. Raises FileNotFoundError if the folder or its data do not exist, and ValueError for a saved model without
    a corpus, data that do not fit the model, and a budget out of reach.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for budget in budgets:
        if not 0 < budget < math.inf:
            raise ValueError(f"budgets must be shares of the dense FLOPs above 0, got {budget:g}")
    loaded = load_run(run, split, corpus, context)
    if loaded.data is None:
        raise ValueError(f"{run} is a saved model without a recipe; name the corpus to evaluate on")
    budget_table = table_of(loaded, split) if budgets else None
    if budget_table is not None:
        for budget in budgets:
            budget_table.thresholds(budget)  # raises for one out of reach, before anything is measured
    with work(_rows_to_read(loaded, loaded.data, batch_size, len(budgets)), "rows"):
        if budget_table is None:
            return _evaluated(loaded, loaded.data, split, batch_size)
        points = at_budgets(loaded, loaded.data, budget_table, budgets, batch_size)
        found = _evaluated(loaded, loaded.data, split, batch_size)
    return replace(found, budgets=points, budget_table=str(budget_table))


def _rows_to_read(loaded: LoadedRun, data: PreparedData, batch_size: int, budgets: int) -> int:
    """Return how many rows all passes of an evaluation read together, for the progress bar.

    batch_size: rows of a forward pass. budgets: at how many budgets the model is evaluated as well.
    """
    whole = len(data.validation)
    counted = min(whole, COUNTED_BATCHES * batch_size)
    own = whole * (len(loaded.passes) + mixes_activations(loaded.model)) + counted
    return own + ((1 + budgets) * (2 * whole + counted) if budgets else 0)


def _evaluated(loaded: LoadedRun, data: PreparedData, split: str, batch_size: int) -> Evaluation:
    model, primary = loaded.model, loaded.primary
    device = model.device
    return Evaluation(
        name=loaded.run.name,
        corpus=data.config.corpus,
        split=split,
        rows=len(data.validation),
        num_bytes=data.validation_bytes,
        measured={
            name: measure_loss(model, each, batches(data, batch_size, device), activations=each is primary)
            for name, each in loaded.passes.items()
        },
        unavailable=loaded.unavailable,
        primary=primary.name,
        flops=flop_check(model, primary, batches(data, batch_size, device, rows=COUNTED_BATCHES * batch_size)),
        notes=_notes(model, data.config.context),
        hard_mix=measure_hard_mix(model, primary, batches(data, batch_size, device)),
    )


def _notes(model: SkipstoneForCausalLM, context: int) -> tuple[str, ...]:
    found = sorted({reason for mechanism in model.routing_modules() if (reason := mechanism.not_ready_reason())})
    if (model.config.neuron_groups or {}).get("decision") == "magnitude":
        share = model.cost(tokens=1, past=context // 2).ratio
        found.append(f"FLOPs of whole rows; neurons by magnitude save in decoding, {share:.1%} of dense a token")
    return tuple(found)
