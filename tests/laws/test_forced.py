"""Law 13: forced decisions follow any given mask, and an invalid mask is one clear error."""

from __future__ import annotations

import pytest
import torch

from laws.builders import (
    DEPTH,
    LENGTH,
    NESTED,
    ORDERS,
    SITES,
    VARIANTS,
    Case,
    assert_close,
    case,
    depth_records,
    entry,
    fresh,
    ids,
    lively,
)

CASES = [c for c in ORDERS + SITES + NESTED + VARIANTS if c.mechanisms]


@pytest.mark.parametrize("executor", ["gathered", "masked"])
@pytest.mark.parametrize("chosen", CASES, ids=str)
@torch.no_grad()
def test_forced_decisions_reproduce_any_mask(chosen: Case, executor: str) -> None:
    model, real = lively(chosen), torch.ones(3, LENGTH, dtype=torch.long)
    real[0, :3], real[1, 12:] = 0, 0
    for seed, training in ((1, False), (2, True)):
        generator = torch.Generator().manual_seed(seed)
        masks = {
            i: torch.rand(3, LENGTH, generator=generator) < 0.5 for i in (1, 2) if model.model.layers[i].mechanisms
        }
        out = model.train(training)(ids(), attention_mask=real, routing=masks, executor=executor, output_records=True)
        for layer, name, record in depth_records(out):
            if layer in masks and name in model.model.layers[layer].mechanisms:
                # only a segment that begins earlier keeps tokens from a block that has a mask of its own
                reached = record.reached_BT if model.model.layers[layer].segment_start() is not None else real.bool()
                assert torch.equal(record.kept_BT, masks[layer] & reached), f"block {layer} {name}"


@pytest.mark.parametrize("chosen", [c for c in CASES if not c.oracle_only], ids=str)
@torch.no_grad()
def test_forcing_what_was_decided_changes_nothing(chosen: Case) -> None:
    """For a block with one mechanism: the model's own causal decisions, imposed, give the same logits."""
    model = lively(chosen)
    free = model(ids(), routing="causal", output_records=True)
    masks: dict[int, list[torch.Tensor]] = {}
    for layer, _, record in depth_records(free):
        masks.setdefault(layer, []).append(record.kept_BT)
    single = {layer: kept[0] for layer, kept in masks.items() if len(kept) == 1}
    assert_close(model(ids(), routing=single or "causal").logits, free.logits)


@torch.no_grad()
def test_one_mask_serves_all_rows_and_the_forced_decision_needs_one() -> None:
    model = fresh(case(entry("mixture_of_depths", decision="forced", layers=(1,))))
    mask = torch.arange(LENGTH)[None] % 3 == 0
    out = model(ids(), routing={1: mask}, output_records=True)
    assert torch.equal(out.records[1]["mixture_of_depths"].kept_BT, mask.expand(3, -1))
    for routing in ("oracle", "causal"):
        with pytest.raises(ValueError, match="decision 'forced' needs"):
            model(ids(), routing=routing)


@pytest.mark.parametrize("name", DEPTH)
def test_wrong_masks_are_refused(name: str) -> None:
    model, mask = lively(case(entry(name))), torch.ones(3, LENGTH, dtype=torch.bool)
    for wrong, message in [
        ({3: mask}, "routing names block 3, but the model has blocks 0 to 2"),
        ({1: mask[:, 1:]}, r"routing\[1\] must be a bool mask of shape \[3, 15\], got torch.bool \[3, 14\]"),
        ({1: mask[:2]}, r"routing\[1\] must be a bool mask of shape \[3, 15\], got torch.bool \[2, 15\]"),
        ({1: mask.float()}, r"routing\[1\] must be a bool mask of shape \[3, 15\], got torch.float32"),
        ({0: mask}, "routing names block 0, which has no depth mechanism"),
        ("orcale", "unknown routing 'orcale'; did you mean 'oracle'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            model(ids(), routing=wrong)
        assert "\n" not in str(error.value)
