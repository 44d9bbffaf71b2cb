"""Measurement of a `ModelView`, the part of a report about the model itself, which training stores with the run.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from skipstone.data.prepare import PreparedData
from skipstone.measure.passes import known_to_need_depth
from skipstone.measure.token_trace import ModelView
from skipstone.measure.trace import category_of, trace_tokens
from skipstone.mechanisms import ACTIVATION
from skipstone.model.causal_lm import SkipstoneForCausalLM

ROWS = 8  # validation rows that a capacity is measured on
TOKENS = 256  # of the first row, shown as text


def view_model(model: SkipstoneForCausalLM, data: PreparedData, forced: bool) -> ModelView:
    """Run a model on up to 8 validation rows and return what a report shows about it.

    data: the prepared data of the run, whose first validation rows are used; up to 256 tokens of the first one are
    shown as text. forced: whether blocks keep the tokens that a synthetic corpus marks as needing depth, instead of the
    tokens that the routers choose. Raises ValueError if `forced` is False and the model needs the caller to say which
    tokens blocks keep.
    """
    rows = data.validation
    batch = data.collate(rows.__getitems__(range(min(ROWS, len(rows)))))
    ids = batch["input_ids"][0, :TOKENS].tolist()
    names = [data.tokenizer.decode([i]) if data.tokenizer else str(i) for i in ids]
    known_BT = known_to_need_depth(batch) if forced else None
    if known_BT is not None:
        known_BT = known_BT.to(model.device)
    trace = trace_tokens(model, batch, names, known_BT, _categories(batch["input_ids"], data.tokenizer))
    return ModelView(mechanisms=mechanisms_in_words(model), capacities=configured_capacities(model), trace=trace)


def mechanisms_in_words(model: SkipstoneForCausalLM) -> str:
    """Return the names of the model's mechanisms and the indices of their blocks as text.

    An example is `mixture of depths on blocks 1, 3, 5; polyglu`; the text is `no mechanism` for a dense model.
    """
    names = [f"{entry.key} on blocks {', '.join(map(str, entry.layers))}" for entry in model.config.mechanism_entries]
    activation = model.config.activation_options["name"]
    parts = [
        *names,
        *([activation] if activation in ACTIVATION else []),
        model.decoder.layers[0].mlp.in_words(),
    ]
    return "; ".join(filter(None, parts)).replace("_", " ") or "no mechanism"


def configured_capacities(model: SkipstoneForCausalLM) -> dict[int, dict[str, float]]:
    """Return the configured capacity of each depth mechanism of `model`, {layer: {mechanism name: share}}.

    The capacity is the largest share of a row's tokens that the mechanism keeps. Mechanisms that guarantee none are
    left out; the dict of a layer may therefore be empty.
    """
    blocks = list(model.decoder.layers)
    return {
        layer: {name: m.capacity for name, m in block.mechanisms.items() if m.capacity is not None}
        for layer, block in enumerate(blocks)
    }


def _categories(ids_BT: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Return the category of each token's text (letters, digits, signs, white space) as an index in `CATEGORIES`.

    ids_BT: token ids. The result is int64 [B, T]; None without a tokenizer.
    """
    if tokenizer is None:
        return None
    known, at_BT = ids_BT.unique(return_inverse=True)
    return torch.tensor([category_of(tokenizer.decode([i])) for i in known.tolist()])[at_BT]
