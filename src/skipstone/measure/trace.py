"""The decisions of each layer for each token of a sample of text, from one pass without a cache.

Shape letters: B rows, T tokens, L layers, N tokens of all rows, F neurons, A activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, DepthRecord, ExpertsRecord, Records, of_kind
from skipstone.core.routing_module import causal_obstacle
from skipstone.core.strict import PlainMapping
from skipstone.measure.allocation import measure_allocation
from skipstone.measure.losses import token_nats
from skipstone.measure.passes import forced_routing, inputs_of, real_tokens, targets
from skipstone.measure.share import spent
from skipstone.measure.summaries import ACTIVATION_NAMES
from skipstone.measure.token_trace import CATEGORIES, ActivationSummary, Allocation, TokenTrace
from skipstone.model.causal_lm import IGNORED, SkipstoneForCausalLM
from skipstone.model.wrapped import require_ours
from skipstone.nn.block import SEGMENT

SUBLAYERS = ("attention", "mlp")


@torch.no_grad()
def trace_tokens(
    model: SkipstoneForCausalLM,
    batch: PlainMapping,
    names: list[str],
    known_BT: Tensor | None = None,
    category_BT: Tensor | None = None,
) -> TokenTrace:
    """Run a model on a batch, in evaluation mode and without noise, and return its decisions for every token.

    batch: dict of [B, T] tensors (rows, tokens): `input_ids`, perhaps other inputs of forward, and for losses `labels`
    or `shift_labels`. names: the texts of the first tokens of the first row, as many as the trace shows. known_BT: bool
    [B, T], the tokens that every block with a depth mechanism has to keep; None lets the model decide. category_BT:
    int64 [B, T], the kind of each token's text as an index in `CATEGORIES`, or None. Raises ValueError for a model that
    is not a Skipstone model, and, if known_BT is None, for a model that needs the caller to say which tokens blocks
    keep.
    """
    require_ours(model)
    blocks = list(model.decoder.layers)
    routing = "oracle" if causal_obstacle(model.routing_modules()) else "causal"
    routing = routing if known_BT is None else "forced"
    inputs, was_training = inputs_of(batch, model.device), model.training
    out = model.eval()(
        **inputs,
        routing=routing if known_BT is None else forced_routing(model, known_BT),
        noise=False,
        use_cache=False,
        output_records=True,
    )
    model.train(was_training)
    assert out.records is not None
    real_BT = real_tokens(inputs)
    halves = [_halves(block.sites, records, real_BT) for block, records in zip(blocks, out.records, strict=True)]
    weight_LBT = torch.stack([weight for weight, _ in halves]).float().cpu()
    kept_LBT = torch.stack([kept for _, kept in halves]).float().cpu()
    depth_BT, shown = kept_LBT.mean(0), len(names)
    flops, dense_flops = _flops_per_token(model, inputs, out.records) if routing == "causal" else (None, None)
    capacity = {i: shares for i, records in enumerate(out.records) if (shares := _capacity(records))}
    return TokenTrace(
        tokens=names,
        weight_LT=weight_LBT[:, 0, :shown].tolist(),
        kept_LT=(kept_LBT[:, 0, :shown] > 0).tolist(),
        depth_T=depth_BT[0, :shown].tolist(),
        depth=depth_BT[real_BT.cpu()].mean().item(),
        routing=routing,
        routed=frozenset(capacity),
        capacity=capacity,
        activations=summarise_activations(blocks, out.records, category_BT),
        activation_names=list(ACTIVATION_NAMES),
        experts=_experts(blocks, out.records),
        allocation=_allocation(batch, out.logits, depth_BT, real_BT.cpu(), category_BT),
        flops=flops,
        dense_flops=dense_flops,
    )


def _allocation(
    batch: PlainMapping, logits_BTV: Tensor | None, depth_BT: Tensor, real_BT: Tensor, category_BT: Tensor | None
) -> Allocation | None:
    if logits_BTV is None or not {"labels", "shift_labels"} & {*batch}:
        return None
    target_BT = targets(batch).to(logits_BTV.device)
    loss_BT = token_nats(logits_BTV, target_BT).masked_fill(target_BT == IGNORED, float("nan")).cpu()
    return measure_allocation(depth_BT, loss_BT, batch["input_ids"].cpu(), real_BT, category_BT)


def _flops_per_token(
    model: SkipstoneForCausalLM, inputs: Mapping[str, Tensor], records: Sequence[Records]
) -> tuple[float, float]:
    needed, dense = spent(model, inputs["input_ids"], records)
    return needed / inputs["input_ids"].numel(), dense / inputs["input_ids"].numel()


def _halves(sites: Mapping[str, list[str]], records: Records, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of a block's update and the computed share of the block for each token, fp32 [B, T] each.

    Both are means over attention and MLP: of the product of the weights of all mechanisms around them, and of 1 where
    all of these keep the token, else 0. sites: names of the block's mechanisms by site. records: their records by name.
    real_BT: bool, False for padding, whose weight and share are 0.
    """
    decided = of_kind(records, DepthRecord)
    weights, kept = [], []
    for half in SUBLAYERS:
        weight_BT, kept_BT = real_BT.float(), real_BT.clone()
        for name in (*sites[SEGMENT], *sites["block"], *sites[half]):
            weight_BT, kept_BT = weight_BT * decided[name].weight_BT, kept_BT & decided[name].kept_BT
        weights.append(weight_BT)
        kept.append(kept_BT.float())
    return torch.stack(weights).mean(0), torch.stack(kept).mean(0)


def _capacity(records: Records) -> dict[str, float]:
    return {
        name: (record.kept_BT.sum() / record.reached_BT.sum().clamp(min=1)).item()
        for name, record in of_kind(records, DepthRecord).items()
    }


def _experts(blocks: Sequence[Any], all_records: Sequence[Records]) -> dict[int, dict[str, float]]:
    found = {}
    for layer, (block, records) in enumerate(zip(blocks, all_records, strict=True)):
        for record in of_kind(records, ExpertsRecord).values():
            if record.reached_BT.any():
                usage, count = block.mlp.usage(record).tolist(), block.mlp.config.count
                real, no_ops = usage[:count], sum(usage[count:])
                found[layer] = {"most chosen expert": max(real), "least chosen expert": min(real), "no-ops": no_ops}
    return found


def category_of(token: str) -> int:
    """Return the category of a token's text as an index in `CATEGORIES`: letters, digits, signs or white space.

    A text with a letter belongs to letters, else one with a digit to digits, else one with any character other than
    white space to signs, else to white space.
    """
    for category, belongs in enumerate((str.isalpha, str.isdigit)):
        if any(map(belongs, token)):
            return category
    return 2 if token.strip() else 3


def summarise_activations(
    blocks: Sequence[Any], records: Sequence[Records], category_BT: Tensor | None
) -> dict[int, ActivationSummary]:
    """Summarise the mix of activation functions in each layer that mixes them, by layer index.

    Layers that no token reached are left out. blocks: the model's blocks. records: decisions of a pass without noise, a
    dict by mechanism name for each block. category_BT: int64 [B, T] (rows, tokens), the kind of each token's text as an
    index in `CATEGORIES` (letters, digits, signs, white space); None if it is unknown.
    """
    found = {}
    for layer, (block, decided) in enumerate(zip(blocks, records, strict=True)):
        modules = block.routing_modules()
        for name, record in of_kind(decided, ActivationRecord).items():
            if record.reached_BT.any():
                found[layer] = _summary(modules[name], record, category_BT)
    return found


def _summary(module: Any, record: ActivationRecord, category_BT: Tensor | None) -> ActivationSummary:
    reached_BT = record.reached_BT.cpu()
    shares_NA, entropy_N = _each(module.shares, record), _each(module.entropy, record)
    logits_NA = record.logits_BTA.expand(*record.reached_BT.shape, -1)[record.reached_BT].float()
    by_category = {} if category_BT is None else _by_category(shares_NA, category_BT.expand_as(reached_BT)[reached_BT])
    return ActivationSummary(
        shares=shares_NA.mean(0).tolist(),
        entropy=entropy_N.mean().item(),
        strongest=(module.preference_FA + logits_NA.mean(0)).argmax(-1).tolist(),
        by_category=by_category,
    )


def _by_category(shares_NA: Tensor, category_N: Tensor) -> dict[str, list[float]]:
    """Return the mean shares of the activations, for each category of token that occurs.

    shares_NA: each token's mean share of each activation. category_N: index of the token's category in `CATEGORIES`.
    """
    return {
        category: shares_NA[category_N == k].mean(0).tolist()
        for k, category in enumerate(CATEGORIES)
        if category_N.eq(k).any()
    }


def _each(figure: Callable[[ActivationRecord], Tensor], record: ActivationRecord) -> Tensor:
    """Return a figure of every token that reached the MLP, [N, ...].

    figure: a function of an activation record, such as the mean shares of the activations. record: the record of a
    whole batch; it is read row by row, because intermediate values for all neurons of a batch would need much memory.
    """
    found = []
    for logits_TA, reached_T in zip(record.logits_BTA, record.reached_BT, strict=True):
        value_T = figure(ActivationRecord(logits_TA[None], reached_T[None]))[0]
        found.append(value_T.expand(len(reached_T), *value_T.shape[1:])[reached_T].cpu())
    return torch.cat(found)
