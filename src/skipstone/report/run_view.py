"""What a report needs to know of a run, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.measure.trace import TokenTrace, category_of, trace_tokens
from skipstone.mechanisms import ACTIVATION
from skipstone.model.build import parse_mechanisms
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.report.palette import Style, style
from skipstone.runs import Run

ROWS = 8  # validation rows that a capacity is measured on
TOKENS = 256  # of the first row, shown as text


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run under the name and style that it has on the page.

    mechanisms: in words. set_capacity: what the configuration promises, {layer: {mechanism: share}}.
    trace: None where the model could not be looked into; `trouble` then says why.
    """

    name: str
    style: Style
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    mechanisms: str
    set_capacity: Mapping[int, Mapping[str, float]]
    trace: TokenTrace | None
    trouble: str


def load_view(run: Run, name: str, index: int) -> RunView:
    """Everything about one run. A model or a corpus that is not there costs its pictures, not the page."""
    trace, mechanisms, capacity, trouble = None, "", {}, ""
    try:
        model = run.load_model()
        mechanisms, capacity = describe(model), _set_capacity(model)
        trace = _look_inside(run, model)
    except (OSError, ValueError) as error:
        trouble = " ".join(str(error).split())
    return RunView(
        name=name,
        style=style(index),
        config=run.config(),
        environment=run.environment(),
        metrics=run.metrics(),
        result=run.result() if run.finished else {},
        mechanisms=mechanisms,
        set_capacity=capacity,
        trace=trace,
        trouble=trouble,
    )


def describe(model: SkipstoneForCausalLM) -> str:
    """`mixture of depths on blocks 1, 3, 5; polyglu`, or `no mechanism`."""
    names = [f"{entry.key} on blocks {', '.join(map(str, entry.layers))}" for entry in parse_mechanisms(model.config)]
    activation = model.config.activation_options["name"]
    parts = [
        *names,
        *([activation] if activation in ACTIVATION else []),
        model.decoder.layers[0].mlp.in_words(),
    ]
    return "; ".join(filter(None, parts)).replace("_", " ") or "no mechanism"


def _set_capacity(model: SkipstoneForCausalLM) -> dict[int, dict[str, float]]:
    blocks: list[Any] = list(model.model.layers)
    return {
        layer: {name: m.capacity for name, m in block.mechanisms.items() if getattr(m, "capacity", None) is not None}
        for layer, block in enumerate(blocks)
    }


def _look_inside(run: Run, model: SkipstoneForCausalLM) -> TokenTrace:
    data = run.data()
    rows = data.validation
    batch = data.collate(rows.__getitems__(range(min(ROWS, len(rows)))))
    ids = batch["input_ids"][0, :TOKENS].tolist()
    names = [data.tokenizer.decode([i]) if data.tokenizer else str(i) for i in ids]
    known_BT = batch["difficulty"] >= 0 if run.config()["train"].get("routing") == "difficulty" else None
    return trace_tokens(model, batch, names, known_BT, _categories(batch["input_ids"], data.tokenizer))


def _categories(ids_BT: Tensor, tokenizer: Any) -> Tensor | None:
    """int64 [B, T]; None for tokens that stand for no text."""
    if tokenizer is None:
        return None
    known, at_BT = ids_BT.unique(return_inverse=True)
    return torch.tensor([category_of(tokenizer.decode([i])) for i in known.tolist()])[at_BT]
