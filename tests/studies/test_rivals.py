"""The ways that leave out weights: with nothing left out they are the source, and they read what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone_studies.speed.rivals import engines, source, thin

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
IDS = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SkipstoneForCausalLM:
    torch.manual_seed(0)
    made = SkipstoneForCausalLM(SkipstoneConfig(**SIZES, tie_word_embeddings=True)).eval().requires_grad_(False)
    text = torch.randint(0, 40, (8, 16), generator=torch.Generator().manual_seed(2))
    for module in (thin, engines, source):
        monkeypatch.setattr(module, "source", lambda name: made)
    monkeypatch.setattr(thin, "calibration", lambda name, count=4: text[:count])
    return made


@pytest.mark.parametrize("way", [thin.teal, thin.cats])
def test_a_threshold_leaves_out_its_share(model: SkipstoneForCausalLM, way: Any) -> None:
    with torch.inference_mode():
        whole = model(IDS).logits[0]
        logits, read = way("", 0.5)
        assert not torch.allclose(logits(IDS), whole, atol=1e-4)
    candidates = thin.weights(model) - 40 * 16 if way is thin.teal else 4 * 2 * 24 * 16
    spared = (thin.weights(model) - read()) / candidates
    assert 0.35 < spared < 0.6
    assert torch.equal(model(IDS).logits[0], whole)  # its hooks are gone


def test_a_preview_of_all_directions_is_the_head(model: SkipstoneForCausalLM) -> None:
    with torch.inference_mode():
        logits, read = thin.previewed("", 16, 5)
        torch.testing.assert_close(logits(IDS), model(IDS).logits[0], rtol=1e-3, atol=1e-4)
        few, _ = thin.previewed("", 4, 40)  # every logit is computed in full
        torch.testing.assert_close(few(IDS), model(IDS).logits[0], rtol=1e-3, atol=1e-4)
    assert read() == thin.weights(model)


def test_narrower_and_shorter_models_are_smaller_and_decode(model: SkipstoneForCausalLM) -> None:
    same, half = thin.narrower("", 0.0), thin.narrower("", 0.5)
    torch.testing.assert_close(same(IDS).logits, model(IDS).logits)
    assert thin.weights(model) - thin.weights(half) == 4 * 3 * 12 * 16
    short = thin.shorter("", 2)
    assert thin.weights(model) - thin.weights(short) > 2 * 3 * 24 * 16
    assert engines.Torch(short).lap(IDS, 2).tokens == 2


def test_transformers_llama_has_the_weights(model: SkipstoneForCausalLM) -> None:
    theirs = engines.llama("")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    torch.testing.assert_close(engines.llama("")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
