"""Law 17: the plain formula and PyTorch's kernels compute the same attention: gathered, padded, packed and cached."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from laws.builders import LENGTH, NESTED, ORDERS, Case, assert_close, gradients, ids, lively

CASES = [c for c in ORDERS if len(c.mechanisms) < 3] + NESTED


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_eager_equals_sdpa(chosen: Case) -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :4], mask[2, 10:] = 0, 0
    documents = torch.tensor([[0] * 6 + [1] * 9] * 3)
    calls = {
        "oracle": {"routing": "oracle", "noise": False},
        "padded": {"routing": "causal", "attention_mask": mask},
        "packed": {"routing": "causal", "document_ids": documents},
    }
    model = lively(chosen)
    for name, call in calls.items():
        results = []
        for kind in ("sdpa", "eager"):
            model.set_attn_implementation(kind)
            model.zero_grad()
            out = model(ids(), labels=ids(), **call)
            out.loss.backward()
            results.append((out.logits, gradients(model)))
        assert_close(results[1][0], results[0][0], name)
        for parameter, gradient in results[0][1].items():
            tolerance = 1e-5 * max(1, gradient.abs().max().item())
            assert_close(results[1][1][parameter], gradient, f"{name} {parameter}", tolerance)


@pytest.mark.parametrize("chosen", CASES, ids=str)
@torch.no_grad()
def test_eager_with_a_cache(chosen: Case) -> None:
    model = lively(chosen)
    whole = model(ids(), use_cache=False).logits
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    parts = [
        model(ids()[:, a:b], past_key_values=cache).logits for a, b in [(0, 7), (7, 8), (8, 12), (12, 13), (13, 15)]
    ]
    assert_close(torch.cat(parts, 1), whole)
