"""The test cases of the laws are not trivial: about half of the tokens are kept, and rows and blocks differ."""

from __future__ import annotations

import pytest
import torch

from laws.builders import ALL, DEPTH, ROUTED, Case, case, depth_records, entry, ids, lively

TRIVIAL = ("topk", "random", "positional")  # decisions that keep the same number or places in every row


@pytest.mark.parametrize("chosen", [c for c in ALL if c.mechanisms], ids=str)
def test_decisions_are_not_trivial(chosen: Case) -> None:
    model = lively(chosen)
    with torch.no_grad():
        routing = "oracle" if chosen.oracle_only else "causal"
        out = model(ids(), routing=routing, noise=False, output_records=True)
    assert {layer for layer, _, _ in depth_records(out)} <= {0, *ROUTED}
    differ = 0
    for layer, name, record in depth_records(out):
        share = record.kept_BT[record.reached_BT].float().mean().item()
        if model.model.layers[layer].mechanism(name).skips:
            assert 0.04 < share < 0.95, f"block {layer} {name} keeps {share:.2f}: it declares that it skips"
        else:
            assert share == 1, f"block {layer} {name} keeps {share:.2f}: it declares that it does not skip"
            assert "soft" not in chosen.name or record.weight_BT.std() > 0.05
        differ += len(set(record.kept_BT.sum(1).tolist())) > 1
    skips = any(mechanism.skips for block in model.model.layers for mechanism in block.mechanisms.values())
    assert differ or not skips or any(word in chosen.name for word in TRIVIAL)


@pytest.mark.parametrize("name", DEPTH)
def test_decisions_matter(name: str) -> None:
    """The logits of a token change when its block is skipped, by far more than the laws' tolerance."""
    model, mask = lively(case(entry(name))), torch.ones(3, 15, dtype=torch.bool)
    with torch.no_grad():
        gap = model(ids(), routing={1: mask}).logits - model(ids(), routing={1: ~mask}).logits
    assert gap.abs().max() > 0.02
