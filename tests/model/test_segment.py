"""A segment: several blocks inside one decision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.budget.handles import find_handles
from skipstone.measure.compute import compute_shares
from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import PASSES

IDS = torch.arange(2 * 24).view(2, 24) ** 2 % 31


def model(*entries: dict[str, Any], layers: str = "1:4", **options: Any) -> SkipstoneForCausalLM:
    chosen = list(entries) or [{"name": "segment", "layers": layers, **options}]
    return tiny_model(mechanisms=chosen, vocab_size=31, num_hidden_layers=5, intermediate_size=48)


@torch.no_grad()
def test_a_segment_that_keeps_all_is_the_dense_model() -> None:
    routed, dense = model(capacity=1.0), model({"name": "early_exit", "layers": [0]})
    dense.load_state_dict(routed.state_dict(), strict=False)
    for mechanism in dense.routing_modules():
        mechanism.set_identity()
    torch.testing.assert_close(routed(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_skipped_token_is_that_of_the_model_without_the_blocks() -> None:
    routed = model(capacity=0.5, decision="threshold")
    none = torch.zeros(2, 24, dtype=torch.bool)
    short = SkipstoneForCausalLM(
        SkipstoneConfig(**{**routed.config.to_dict(), "mechanisms": [], "num_hidden_layers": 2})
    )
    state = {name.replace("layers.4.", "layers.1."): value for name, value in routed.state_dict().items()
             if not any(f"layers.{i}." in name for i in (1, 2, 3))}  # fmt: skip
    short.load_state_dict(state)
    torch.testing.assert_close(routed(IDS, routing={1: none}).logits, short.eval()(IDS).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_one_router_one_threshold_and_a_record_in_every_block() -> None:
    routed = model(decision="ema_threshold", capacity=0.5)
    assert [list(block.mechanisms) for block in routed.model.layers] == [[], ["segment"], [], [], []]
    assert [name for name, _ in routed.named_parameters() if "mechanisms" in name] == [
        "model.layers.1.mechanisms.segment.router.weight"
    ]
    assert len(find_handles(routed)) == 1
    out = routed(IDS, output_records=True, routing="oracle")
    kept = [records["segment"].kept_BT for records in out.records[1:4]]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert out.records[2]["segment"].loss_BT is None
    share = compute_shares(routed.model.layers, out.records)
    torch.testing.assert_close(share, torch.where(kept[0], 1.0, 2 / 5))


def test_the_router_is_counted_once() -> None:
    cost = model(decision="topk", capacity=0.25, weight="raw").cost(24, routing="oracle")
    assert cost.forward.router == 2 * 24 * 32
    assert cost.dense is not None
    assert cost.forward.linear / cost.dense.forward.linear == pytest.approx((2 + 3 * 0.25) / 5, rel=1e-12)
    assert cost.forward.attention_score / cost.dense.forward.attention_score == pytest.approx(
        (2 + 3 / 16) / 5, rel=1e-12
    )


@torch.no_grad()
def test_a_draft_may_end_inside_a_segment() -> None:
    routed = model(decision="threshold", capacity=0.5)
    plain = routed.generate(IDS[:1, :6], max_new_tokens=8, do_sample=False)
    for blocks in (1, 2, 3):
        drafted = routed.generate(IDS[:1, :6], max_new_tokens=8, do_sample=False, assistant_early_exit=blocks)
        assert torch.equal(drafted, plain)


def test_masks_of_a_segment() -> None:
    routed, mask = model(decision="forced"), torch.rand(2, 24) < 0.5
    logits = routed(IDS, routing={1: mask}).logits
    assert torch.equal(routed(IDS, routing={1: mask, 2: mask.clone()}).logits, logits)
    with pytest.raises(ValueError, match=r"routing\[2\] differs from routing\[1\], whose segment holds block 2 too"):
        routed(IDS, routing={1: mask, 2: ~mask})


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"layers": [1, 3]}], "layers must be neighbouring blocks for a segment, got .1, 3."),
        ([{"layers": "1:3"}, {"layers": "1:3"}], "segment sits twice on the same segment"),
        ([{"layers": "1:3", "on": "mlp"}], "unknown mechanisms.0..on 'mlp'"),
        ([{"layers": "1:3", "capacity": [0.5, 0.2]}], "capacity must be one number for a segment"),
        ([{"layers": "1:3", "decision": "boundry"}], "did you mean 'boundary'"),
    ],
)
def test_bad_options_are_one_line(entries: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words) as found:
        model(*({"name": "segment", **entry} for entry in entries))
    assert "\n" not in str(found.value)


def test_hidden_states_are_refused() -> None:
    with pytest.raises(ValueError, match="output_hidden_states is not supported with a segment"):
        model()(IDS, output_hidden_states=True)


def test_every_block_of_a_segment_is_summarised() -> None:
    routed = model(decision="boundary", capacity=0.5, boundary={"ids": ["0-9"]})
    labels = IDS.clone()
    labels[:, 0] = -100
    found = measure_loss(routed, PASSES["executed"], [{"input_ids": IDS, "labels": labels}]).summaries.layers()
    shares = [layer["segment"]["capacity"] for layer in found if layer]
    assert [bool(layer) for layer in found] == [False, True, True, True, False]
    assert 0 < shares[0] < 1
    assert shares == [shares[0]] * 3
