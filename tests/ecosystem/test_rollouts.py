"""Preference and RL training: the training pass makes the same decisions as the pass that generated the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ecosystem.tool import stirred
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from train.tool import DENSE, MODELS

PROMPT, NEW = 12, 20
ROUTED: dict[str, Any] = {
    **{name: MODELS[name] for name in ("predictor", "threshold", "token_selective", "early_exit", "polyglu", "all")},
    "gate_skip": {**DENSE, "mechanisms": [{"name": "gate_skip", "layers": ":", "start_bias": 0.0}]},
}


def build(model: dict[str, Any], **options: Any) -> SkipstoneForCausalLM:
    return stirred(SkipstoneConfig.from_plain({"vocab_size": 31, **model, **options}))


def prompts() -> tuple[Tensor, Tensor]:
    """Two rows, the second padded on the left, as a trainer gives them to `generate`."""
    ids = torch.randint(1, 31, (2, PROMPT))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


def rollout(model: SkipstoneForCausalLM) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled rows, their mask, and the log-probability of each new token from the step that drew it."""
    ids, mask = prompts()
    settings = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings)
    logits_BNV = torch.stack(out.logits, 1)
    whole = torch.nn.functional.pad(mask, (0, NEW), value=1)
    return out.sequences, whole, chosen(logits_BNV, out.sequences[:, PROMPT:])


def chosen(logits_BNV: Tensor, token_BN: Tensor) -> Tensor:
    return logits_BNV.log_softmax(-1).gather(-1, token_BN[..., None])[..., 0]


def recomputed(model: SkipstoneForCausalLM, sequences: Tensor, mask: Tensor) -> Tensor:
    """The same tokens by one pass in training mode."""
    logits_BTV = model.train()(sequences, attention_mask=mask).logits
    return chosen(logits_BTV[:, PROMPT - 1 : -1], sequences[:, PROMPT:])


@pytest.mark.filterwarnings("ignore:.*was never advanced")
@pytest.mark.parametrize("name", ROUTED)
def test_causal_training_recomputes_what_generation_did(name: str) -> None:
    model = build(ROUTED[name], training_routing="causal")
    sequences, mask, written = rollout(model.train())
    again = recomputed(model, sequences, mask)
    torch.testing.assert_close(again, written, atol=1e-4, rtol=0)
    assert again.requires_grad
    model.config.training_routing = "oracle"
    apart = recomputed(model, sequences, mask) - written
    assert apart.abs().max() > 1e-3


def test_a_topk_policy_is_refused() -> None:
    model = build(MODELS["topk"], training_routing="causal")
    ids, mask = prompts()
    with pytest.raises(ValueError, match="'topk' ranks the whole row"):
        model.train()(ids, attention_mask=mask)


def test_the_choice_is_saved_and_checked(tmp_path: Any) -> None:
    build(MODELS["dense"], training_routing="causal").save_pretrained(tmp_path)
    assert SkipstoneForCausalLM.from_pretrained(tmp_path).config.training_routing == "causal"
    assert SkipstoneForCausalLM.from_pretrained(tmp_path, training_routing="oracle").config.training_routing == "oracle"
    with pytest.raises(ValueError, match="unknown training_routing 'casual'; did you mean 'causal'"):
        SkipstoneConfig.from_plain({"training_routing": "casual"})
