"""Dynamic chunking: the smoothing against a plain loop, the ratio loss, and what the router learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.records import Records
from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms import DynamicChunking

B, T, D = 3, 20, 8
NAME = "DynamicChunking"


def tokens(**options: Any) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(routing="oracle"), **options)


def double(x: Tensor, given: Tokens) -> tuple[Tensor, Records]:
    return 2 * x, {}


def held_by_a_loop(x: Tensor, p: Tensor, kept: Tensor, document: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for b in range(B):
        state = torch.zeros(D)
        for t in range(T):
            if t and document[b, t] != document[b, t - 1]:
                state = torch.zeros(D)
            if kept[b, t]:
                state = p[b, t] * 2 * x[b, t] + (1 - p[b, t]) * state
            out[b, t] = state
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_the_smoothing_equals_a_plain_loop(packed: bool, forced: bool) -> None:
    torch.manual_seed(1)
    x, document = torch.randn(B, T, D), torch.zeros(B, T, dtype=torch.long)
    if packed:
        document[0, 7:], document[1, 3:] = 1, 1
        document[1, 11:] = 5
    given = tokens(document_BT=document if packed else None, forced_BT=torch.rand(B, T) < 0.3 if forced else None)
    mechanism = DynamicChunking(D)
    delta, records = mechanism(double, x, given)
    record = records[NAME]
    assert 0 < record.kept_BT.float().mean() < 1
    p = (1 + record.score_BT) / 2
    torch.testing.assert_close(delta, held_by_a_loop(x, p, record.kept_BT, document))
    first = torch.cat((torch.ones(B, 1, dtype=torch.bool), document[:, 1:] != document[:, :-1]), 1)
    assert (record.score_BT[first] == 1).all()
    neighbours = torch.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
    torch.testing.assert_close(record.score_BT[:, 1:][~first[:, 1:]], -neighbours[~first[:, 1:]])


def test_the_router_learns_through_smoothing_held_updates_and_ratio() -> None:
    torch.manual_seed(1)
    x = torch.randn(B, T, D)
    for part in ("update", "ratio"):
        mechanism = DynamicChunking(D, ratio_weight=1.0)
        delta, records = mechanism(double, x, tokens())
        loss = (delta * torch.randn_like(delta)).sum() if part == "update" else records[NAME].loss_BT.mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mechanism.parameters()), part


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_ratio_loss_is_one_at_the_share_and_pulls_towards_it(share: float) -> None:
    mechanism = DynamicChunking(D, share=share, ratio_weight=1.0)
    kept = torch.arange(T)[None] < round(share * T)
    reached = torch.ones_like(kept)

    def loss(mean: float, kept: Tensor) -> tuple[float, float]:
        p = torch.full((1, T), mean, requires_grad=True)
        value = mechanism._ratio_loss(p, kept, reached, tokens())
        assert value is not None
        value.mean().backward()
        assert p.grad is not None
        return value.mean().item(), p.grad.sum().item()

    assert loss(share, kept)[0] == pytest.approx(1)
    assert loss(0.9, torch.arange(T)[None] < round(0.9 * T))[1] > 0  # too many are kept: p should fall
    assert loss(0.05, torch.arange(T)[None] < 1)[1] <= 0


@torch.no_grad()
def test_generation_holds_the_update_between_boundaries() -> None:
    torch.manual_seed(0)
    entry = {"name": "dynamic_chunking", "layers": "1:3"}
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(mechanisms=[entry], intermediate_size=48, **sizes)).eval()
    ids = torch.arange(2 * 16).view(2, 16) ** 2 % 31
    whole = model(ids, output_records=True)
    kept = whole.records[1]["dynamic_chunking"].kept_BT
    assert 0.1 < kept.float().mean() < 0.9
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.tensor_split([3, 4, 5, 9], 1):
        parts.append(model(part, past_key_values=cache).logits)  # noqa: PERF401
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=0, atol=1e-5)
    assert cache.layers[1].kv.stored() == cache.layers[2].kv.stored() == kept.sum()
    assert cache.layers[3].kv.stored() == ids.numel()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"share": 1.0}, "share must be above 0 and below 1, got 1.0"), ({"ratio_weight": -1}, "got -1")],
)
def test_bad_options_are_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DynamicChunking(D, **options)
