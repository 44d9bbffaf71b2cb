"""One pass over validation text without a cache: which tokens each layer updated, and how, as plain numbers.

Shape letters: B rows, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import DepthRecord, ExpertsRecord, Records
from skipstone.measure.activations import ActivationSummary, summarise_activations
from skipstone.model.causal_lm import SkipstoneForCausalLM

SUBLAYERS = ("attention", "mlp")
INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids")


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """tokens: text of the first row's tokens. weight_LT: factor on the block's update, its two halves averaged, 0 where
    skipped. kept_LT: whether any of the update was computed. depth_T: share of all halves of blocks that were computed.
    routed: blocks with a depth mechanism. capacity: realised share of asked tokens kept, {layer: {mechanism: share}},
    over all rows. activations: of PolyGLU's activations, by layer.
    experts: shares of all choices by layer, of the most and the least chosen expert and of the no-ops together.
    depth: mean of the computed share over all tokens of all rows. routing: "causal"; "oracle" where a decision cannot
    be made otherwise; "forced" where it was imposed.
    """

    tokens: list[str]
    weight_LT: list[list[float]]
    kept_LT: list[list[bool]]
    depth_T: list[float]
    depth: float
    routing: str
    routed: frozenset[int] = frozenset()
    capacity: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    activations: Mapping[int, ActivationSummary] = field(default_factory=dict)
    experts: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def strongest(self) -> float:
        """The largest weight of any routed block, by magnitude."""
        return max((abs(w) for layer in self.routed for w in self.weight_LT[layer]), default=0.0)


@torch.no_grad()
def trace_tokens(
    model: SkipstoneForCausalLM,
    batch: Mapping[str, Any],
    names: list[str],
    known_BT: Tensor | None = None,
    category_BT: Tensor | None = None,
) -> TokenTrace:
    """What `model` does to `batch` ([B, T] tensors as the data hands them out); `names` are the first row's tokens.

    known_BT: bool, decisions to impose on every block with a depth mechanism. category_BT: int64, the categories of all
    tokens (`activations.CATEGORIES`), if they are known. Raises ValueError for a model that needs decisions and gets
    none.
    """
    blocks: list[Any] = list(model.model.layers)
    routing = _routing(model) if known_BT is None else "forced"
    forced = {i: known_BT for i, block in enumerate(blocks) if len(block.mechanisms)}
    inputs = {name: batch[name].to(model.device) for name in INPUTS if name in batch}
    was_training = model.training
    out = model.eval()(
        **inputs, routing=routing if known_BT is None else forced, noise=False, use_cache=False, output_records=True
    )
    model.train(was_training)
    assert out.records is not None
    real_BT = (
        inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"]).bool()
    )
    halves = [_halves(block.sites, records, real_BT) for block, records in zip(blocks, out.records, strict=True)]
    weight_LBT = torch.stack([weight for weight, _ in halves]).float().cpu()
    kept_LBT = torch.stack([kept for _, kept in halves]).float().cpu()
    depth_BT, shown = kept_LBT.mean(0), len(names)
    return TokenTrace(
        tokens=names,
        weight_LT=weight_LBT[:, 0, :shown].tolist(),
        kept_LT=(kept_LBT[:, 0, :shown] > 0).tolist(),
        depth_T=depth_BT[0, :shown].tolist(),
        depth=depth_BT[real_BT.cpu()].mean().item(),
        routing=routing,
        routed=frozenset(i for i, records in enumerate(out.records) if any(_is_depth(r) for r in records.values())),
        capacity={i: shares for i, records in enumerate(out.records) if (shares := _capacity(records))},
        activations=summarise_activations(blocks, out.records, category_BT),
        experts=_experts(blocks, out.records),
    )


def _routing(model: SkipstoneForCausalLM) -> str:
    try:
        for mechanism in model.routing_modules():
            mechanism.require_causal()
    except ValueError:
        return "oracle"
    return "causal"


def _is_depth(record: Any) -> bool:
    return isinstance(record, DepthRecord)


def _halves(sites: Mapping[str, list[str]], records: Records, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and computed share of a block [B, T]: means over attention and MLP of products over their mechanisms."""
    weights, kept = [], []
    for half in SUBLAYERS:
        weight_BT, kept_BT = real_BT.float(), real_BT.clone()
        for name in (*sites["block"], *sites[half]):
            record = records[name]
            assert isinstance(record, DepthRecord)
            weight_BT, kept_BT = weight_BT * record.weight_BT, kept_BT & record.kept_BT
        weights.append(weight_BT)
        kept.append(kept_BT.float())
    return torch.stack(weights).mean(0), torch.stack(kept).mean(0)


def _capacity(records: Records) -> dict[str, float]:
    return {
        name: (record.kept_BT.sum() / record.reached_BT.sum().clamp(min=1)).item()
        for name, record in records.items()
        if isinstance(record, DepthRecord)
    }


def _experts(blocks: Sequence[Any], all_records: tuple[Records, ...]) -> dict[int, dict[str, float]]:
    found = {}
    for layer, (block, records) in enumerate(zip(blocks, all_records, strict=True)):
        for record in records.values():
            if isinstance(record, ExpertsRecord) and record.reached_BT.any():
                usage, count = block.mlp.usage(record).tolist(), block.mlp.config.count
                real, no_ops = usage[:count], sum(usage[count:])
                found[layer] = {"most chosen expert": max(real), "least chosen expert": min(real), "no-ops": no_ops}
    return found
